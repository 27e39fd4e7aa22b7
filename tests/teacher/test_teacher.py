"""What a wrapped teacher promises, on a few small models of every layout (every family: test_wrap_families.py)."""
from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import timm
import torch
import torch._dynamo.testing
from timm.layers import BatchNormAct2d
from timm.utils import reparameterize_model
from torch import nn

import timm_dfpt
from timm_dfpt import PromptConfig

CNN, NHWC, TOKENS = 'test_resnet', 'test_mambaout', 'test_vit'
LAYOUTS = [CNN, NHWC, TOKENS]
# DropPath and Dropout, so that a teacher in training mode would be found out.
REGULARIZED = {CNN: {'drop_rate': 0.5, 'drop_path_rate': 0.5}, TOKENS: {'drop_rate': 0.5, 'drop_path_rate': 0.5}}


def make_model(name: str = CNN, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def make_teacher(name: str = CNN, **kwargs: Any) -> timm_dfpt.DualForwardPathTeacher:
    return timm_dfpt.wrap(make_model(name), **kwargs)


def move_blocks(teacher: timm_dfpt.DualForwardPathTeacher, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in teacher.parameter_groups():
            for param in group['params']:
                param.add_(0.02 * torch.randn(param.shape, generator=generator))


def images(*size: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*(size or (2, 3, 160, 160)), generator=torch.Generator().manual_seed(seed))


def frozen_logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval().requires_grad_(False)(x)


def train_step(teacher: timm_dfpt.DualForwardPathTeacher, x: torch.Tensor, lr: float = 0.05) -> None:
    groups = teacher.parameter_groups()
    optimizer = torch.optim.SGD(groups, lr=lr)
    optimizer.zero_grad()
    teacher.train()
    nn.functional.cross_entropy(teacher(x).prompt, torch.arange(len(x))).backward()
    optimizer.step()


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
@pytest.mark.parametrize('name', LAYOUTS)
def test_both_paths_start_as_the_model(name: str, variant: str) -> None:
    model, x = make_model(name), images()
    expected = frozen_logits(model, x)
    out = timm_dfpt.wrap(model, variant=variant).eval()(x)
    assert torch.equal(out.original, expected)
    assert torch.equal(out.prompt, expected)


@pytest.mark.parametrize(
    'config', [PromptConfig(norm_layer='layernorm2d'), PromptConfig(norm_layer=None, fusion='depthwise')]
)
def test_every_block_starts_as_identity(config: PromptConfig) -> None:
    out = make_teacher(prompt=config)(images(2, 3, 64, 64))
    assert torch.equal(out.prompt, out.original)


@pytest.mark.parametrize('name', [CNN, TOKENS])
@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
def test_training_moves_nothing_of_the_teacher(name: str, variant: str) -> None:
    model, x = make_model(name, **REGULARIZED[name]), images()
    expected = frozen_logits(model, x)
    state = copy.deepcopy(model.state_dict())
    teacher = timm_dfpt.wrap(model, variant=variant)
    for _ in range(2):
        # Whatever is called, the frozen path stays in evaluation.
        for module in (model, teacher, teacher.prompt_path, model.get_submodule(teacher.stages[0].module)):
            module.train()
            train_step(teacher, x)
    assert torch.equal(teacher.original(x), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(param.grad is None and not param.requires_grad for param in model.parameters())
    assert not torch.equal(teacher.prompt(x), expected)


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
@pytest.mark.parametrize('name', LAYOUTS)
def test_gradients_reach_what_is_trained_and_nothing_else(name: str, variant: str) -> None:
    teacher = make_teacher(name, variant=variant)
    move_blocks(teacher)
    teacher(images()).prompt.square().mean().backward()
    grouped = {id(p) for group in teacher.parameter_groups() for p in group['params']}
    for key, param in teacher.named_parameters():
        assert (param.grad is not None) == (id(param) in grouped), key
        if id(param) in grouped:
            assert param.grad.isfinite().all(), key
            assert param.grad.abs().max() > 0, key


def test_parameter_groups() -> None:
    names = {v: [g['name'] for g in make_teacher(variant=v).parameter_groups()] for v in ('dfpt', 'dfpt+')}
    assert names == {'dfpt': ['blocks', 'head'], 'dfpt+': ['blocks', 'head', 'backbone']}
    without_head = make_teacher(prompt=PromptConfig(new_head=False)).parameter_groups()
    assert [g['name'] for g in without_head] == ['blocks']


def test_batch_norm_of_the_copy_trains_only_where_asked() -> None:
    for norms, adapts in (('teacher', False), ('own', True)):
        teacher = make_teacher(variant='dfpt+', prompt=PromptConfig(norms=norms))
        norm = teacher.prompt_path.backbone.bn1
        before = norm.running_mean.clone()
        train_step(teacher, images())
        assert torch.equal(norm.running_mean, before) is not adapts
        assert norm.training is adapts
        assert not teacher.eval().prompt_path.backbone.bn1.training


@pytest.mark.parametrize('name', LAYOUTS)
def test_shared_prefix_changes_no_bit(name: str) -> None:
    teacher = make_teacher(name).eval()
    move_blocks(teacher)
    assert teacher.shares_prefix
    x = images()
    params = [p for group in teacher.parameter_groups() for p in group['params']]
    results = []
    for _ in range(2):
        out = teacher(x)
        results.append([out.original, out.prompt, *torch.autograd.grad(out.prompt.square().mean(), params)])
        teacher.stop_sharing_prefix()
    assert not teacher.shares_prefix
    assert all(map(torch.equal, *results))


def test_shared_prefix_computes_the_stem_once() -> None:
    teacher = make_teacher()
    calls: list[int] = []
    for tree in (teacher.model, teacher.prompt_path.model):
        conv = tree.get_submodule('layer1.0.conv1')
        conv.register_forward_hook(lambda *_: calls.append(1))
    teacher(images())
    assert len(calls) == 1
    teacher.prompt(images())
    assert len(calls) == 2


class _Toy(nn.Module):
    """A network whose stage can misbehave in a way that a shared prefix must notice."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.stage1 = nn.Conv2d(3, 8, 3, padding=1)
        self.stage2 = nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=fault == 'in place')
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage1(x)
        if self.fault == 'state':
            self.stage2.weight.shape  # noqa: B018
        x = self.stage2(self.act(x))
        return self.head(x.mean((2, 3)))


class _Remembering(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.size = tuple(x.shape[-2:])
        return super().forward(x)


def test_prefix_is_not_shared_when_its_features_are_changed_in_place() -> None:
    x = images(2, 3, 16, 16)
    assert timm_dfpt.wrap(_Toy(''), stages=['stage1', 'stage2'], classifier='head').shares_prefix
    model = _Toy('in place')
    expected = frozen_logits(model, x)
    teacher = timm_dfpt.wrap(model, stages=['stage1', 'stage2'], classifier='head')
    assert not teacher.shares_prefix
    assert torch.equal(teacher(x).prompt, expected)


def test_prefix_is_not_shared_when_a_module_leaves_state_behind() -> None:
    model = _Toy('')
    model.stage1 = _Remembering(3, 8, 3, padding=1)
    assert not timm_dfpt.wrap(model, stages=['stage1', 'stage2'], classifier='head').shares_prefix


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
@pytest.mark.parametrize('kind', ['deepcopy', 'pickle', 'save'])
def test_copies_are_independent(kind: str, variant: str) -> None:
    teacher, x = make_teacher(variant=variant).eval(), images(2, 3, 64, 64)
    move_blocks(teacher)
    expected = teacher(x)
    if kind == 'deepcopy':
        other = copy.deepcopy(teacher)
    elif kind == 'pickle':
        other = pickle.loads(pickle.dumps(teacher))
    else:
        buffer = io.BytesIO()
        torch.save(teacher, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert all(map(torch.equal, other(x), expected))
    with torch.no_grad():
        for param in other.parameters():
            param.zero_()
    assert all(map(torch.equal, teacher(x), expected))
    # Both trees of the copy see the one change.
    assert not torch.equal(other(x).prompt, expected.prompt)
    other.unwrap()
    assert teacher.shares_prefix is (variant == 'dfpt')
    assert all(map(torch.equal, teacher(x), expected))


def test_state_dict_lists_every_weight_once_and_restores() -> None:
    teacher, x = make_teacher().eval(), images(2, 3, 64, 64)
    move_blocks(teacher)
    state = teacher.state_dict()
    pointers = [value.data_ptr() for value in state.values() if value.numel()]
    assert len(set(pointers)) == len(pointers)
    assert {key.split('.')[0] for key in teacher.prompt_path.state_dict()} == {'blocks', 'fusions', 'head'}
    for assign in (False, True):
        other = make_teacher().eval()
        assert not torch.equal(other(x).prompt, teacher(x).prompt)
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        assert all(map(torch.equal, other(x), teacher(x)))
        other.load_state_dict({k: torch.zeros_like(v) if k == 'model.conv1.0.weight' else v for k, v in state.items()})
        assert all(not p.requires_grad for p in other.model.parameters())


def test_weights_assigned_to_the_model_reach_both_paths() -> None:
    teacher, x = make_teacher().eval(), images(2, 3, 64, 64)
    state = {k: v.clone() for k, v in teacher.state_dict().items()}
    state['model.bn1.running_mean'] += 1
    state['model.layer1.0.conv1.weight'] *= 2
    teacher.load_state_dict(state, assign=True)
    out = teacher(x)
    assert torch.equal(out.original, frozen_logits(teacher.model, x))
    assert torch.equal(out.original, out.prompt)


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
@pytest.mark.parametrize('name', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_conversion_reaches_both_paths(name: str, dtype: torch.dtype, variant: str) -> None:
    teacher = make_teacher(name, variant=variant).eval().to(dtype)
    out = teacher(images().to(dtype))
    assert out.prompt.dtype == out.original.dtype == dtype
    assert torch.equal(out.prompt, out.original)
    assert {p.dtype for p in teacher.parameters()} == {dtype}


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
@pytest.mark.parametrize('name', LAYOUTS)
def test_low_precision_teacher_trains_blocks_in_float32(name: str, variant: str) -> None:
    teacher = timm_dfpt.wrap(make_model(name).bfloat16(), variant=variant)
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for g in teacher.parameter_groups() for p in g['params']} == {torch.float32}
    out = teacher(images())
    assert out.original.dtype == torch.bfloat16
    assert out.prompt.dtype == torch.float32
    torch.testing.assert_close(out.prompt, out.original.float(), rtol=0.05, atol=0.05)
    train_step(teacher, images())
    assert not torch.equal(teacher(images()).prompt, out.prompt)


@pytest.mark.parametrize('name', LAYOUTS)
def test_autocast_keeps_the_start(name: str) -> None:
    teacher = make_teacher(name).eval()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = teacher(images())
        assert torch.equal(out.original, out.prompt)
    out.prompt.float().square().mean().backward()
    assert all(p.grad is not None for g in teacher.parameter_groups() for p in g['params'])


def test_channels_last_keeps_the_numbers() -> None:
    teacher, x = make_teacher().eval(), images(2, 3, 64, 64)
    move_blocks(teacher)
    expected = teacher(x)
    out = teacher.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('size', [(64, 64), (64, 96), (160, 128), (224, 224)])
@pytest.mark.parametrize('name', [CNN, NHWC])
def test_other_input_sizes(name: str, size: tuple[int, int]) -> None:
    model, x = make_model(name), images(2, 3, *size)
    expected = frozen_logits(model, x)
    teacher = timm_dfpt.wrap(model).eval()
    assert all(torch.equal(z, expected) for z in teacher(x))
    move_blocks(teacher)
    assert torch.equal(teacher(x).prompt, teacher.prompt(x))


def test_tokens_of_a_wide_image_are_a_wide_picture() -> None:
    model = make_model(TOKENS, dynamic_img_size=True)
    teacher = timm_dfpt.wrap(model).eval()
    shapes: list[torch.Size] = []
    teacher.prompt_path.blocks[0].register_forward_hook(lambda module, args, output: shapes.append(output.shape[-2:]))
    for size in ((160, 160), (64, 128), (128, 64), (96, 160)):
        x = images(2, 3, *size)
        assert torch.equal(teacher(x).prompt, frozen_logits(model, x))
        assert tuple(shapes.pop()) == (size[0] // 16, size[1] // 16)


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
@pytest.mark.parametrize('name', [CNN, TOKENS, 'test_efficientnet', 'test_convnext'])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, variant: str) -> None:
    teacher, x = make_teacher(name, variant=variant), images()
    move_blocks(teacher)
    params = [p for g in teacher.parameter_groups() for p in g['params']]
    expected = torch.autograd.grad(teacher(x).prompt.square().mean(), params)
    teacher.set_grad_checkpointing()
    assert not teacher.shares_prefix
    grads = torch.autograd.grad(teacher(x).prompt.square().mean(), params)
    assert all(map(torch.equal, grads, expected))
    teacher.set_grad_checkpointing(False)
    assert teacher.shares_prefix is (variant == 'dfpt')


def test_gradient_checkpointing_is_refused_by_name() -> None:
    teacher = timm_dfpt.wrap(timm.create_model('dla46x_c', num_classes=2), input_size=(3, 32, 32))
    with pytest.raises(ValueError, match='dla46x_c .* does not support gradient checkpointing'):
        teacher.set_grad_checkpointing()


def test_a_block_that_does_not_run_is_an_error() -> None:
    teacher, x = make_teacher(), images(2, 3, 64, 64)
    skipped = teacher.stages[1].module
    layer = teacher.prompt_path.model.get_submodule(skipped)
    # As gradient checkpointing over the children of a module does: past its __call__.
    layer.register_forward_pre_hook(lambda *_: layer._forward_hooks.clear())
    with pytest.raises(RuntimeError, match=skipped):
        teacher(x)


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
def test_unwrap_gives_the_model_back_as_it_was(variant: str) -> None:
    model, x = make_model(), images(2, 3, 64, 64)
    model.train()
    model.layer2.eval()
    model.fc.requires_grad_(False)
    before = [(name, module.training, dict(vars(module))) for name, module in model.named_modules()]
    flags = [p.requires_grad for p in model.parameters()]
    expected = frozen_logits(model, x)
    teacher = timm_dfpt.wrap(model, variant=variant)
    train_step(teacher, x)
    assert teacher.unwrap() is model
    for (name, training, attributes), (_, module) in zip(before, model.named_modules(), strict=True):
        assert module.training is training, name
        assert vars(module).keys() == attributes.keys(), name
        assert not module._forward_hooks, name
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(frozen_logits(model, x), expected)
    assert timm_dfpt.wrap(model).shares_prefix


def test_wrap_leaves_no_trace_when_it_fails() -> None:
    model = make_model().train()
    with pytest.raises(ValueError, match='stages'):
        timm_dfpt.wrap(model, stages=['layer2', 'layer1'])
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_wrap_does_not_move_the_random_state() -> None:
    # The blocks draw from it; the calibration does not.
    model = make_model()
    torch.manual_seed(5)
    timm_dfpt.find_stages(model)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def test_wrap_under_no_grad_and_inference_mode() -> None:
    for context in (torch.no_grad(), torch.inference_mode()):
        model = make_model()
        with context:
            teacher = timm_dfpt.wrap(model)
            assert teacher(images()).prompt.shape == (2, 1000)
        train_step(teacher, images())


@pytest.mark.parametrize('name', [CNN, TOKENS])
def test_new_head_for_another_number_of_classes(name: str) -> None:
    model, x = make_model(name), images()
    expected = frozen_logits(model, x)
    teacher = timm_dfpt.wrap(model, num_classes=7)
    out = teacher(x)
    assert out.prompt.shape == (2, 7)
    assert torch.equal(out.original, expected)
    assert teacher.unwrap().num_classes == 1000


def test_both_heads_of_a_distilled_model() -> None:
    model = make_model('deit_tiny_distilled_patch16_224', img_size=32, depth=4)
    teacher = timm_dfpt.wrap(model)
    assert len(teacher.prompt_path.head) == 2
    assert timm_dfpt.wrap(teacher.unwrap(), num_classes=3)(images(2, 3, 32, 32)).prompt.shape == (2, 3)


@pytest.mark.parametrize(('name', 'kwargs'), [('repvit_m1', {}), ('fastvit_t8', {})])
def test_reparameterization_after_wrapping(name: str, kwargs: dict[str, Any]) -> None:
    teacher, x = timm_dfpt.wrap(make_model(name, num_classes=5, **kwargs)).eval(), images(2, 3, 64, 64)
    expected = teacher(x)
    fused = reparameterize_model(teacher)
    out = fused(x)
    torch.testing.assert_close(out.original, expected.original, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out.prompt, expected.prompt, rtol=1e-3, atol=1e-3)
    # Its two trees are different networks now, so it can no longer be converted: refused in words.
    with pytest.raises(RuntimeError, match='changed after wrapping'):
        fused.double()
    assert torch.equal(teacher(x).prompt, expected.prompt)


@pytest.mark.parametrize(
    'name',
    [
        CNN,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (TOKENS, 'swin_s3_tiny_224', 'test_convnext', 'test_efficientnet', 'regnetx_002')
        ),
    ],
)
def test_compiles_to_one_graph(name: str) -> None:
    kwargs = {'img_size': 64, 'embed_dim': 24, 'depths': (1, 1, 1, 1)} if 'swin' in name else {}
    teacher = timm_dfpt.wrap(make_model(name, num_classes=5, **kwargs))
    move_blocks(teacher)
    x = images(2, 3, 160, 160) if name == TOKENS else images(2, 3, 64, 64)
    teacher.eval()
    expected = teacher(x)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(teacher, fullgraph=True, backend=counter)
    for _ in range(3):
        out = compiled(x)
        for a, b in zip(out, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    out.prompt.square().mean().backward()
    assert all(p.grad is not None for g in teacher.parameter_groups() for p in g['params'])


def test_switching_the_path_does_not_recompile() -> None:
    teacher, x = make_teacher().eval(), images(2, 3, 64, 64)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    original = torch.compile(teacher.original, fullgraph=True, backend=counter)
    prompt = torch.compile(teacher.prompt, fullgraph=True, backend=counter)
    for _ in range(3):
        original(x)
        prompt(x)
        teacher.train(not teacher.training)
        teacher.eval()
    assert counter.frame_count == 2


def test_naflex_batches_of_different_sizes() -> None:
    model = make_model('naflexvit_base_patch16_gap', num_classes=5, embed_dim=32, depth=4, num_heads=2)
    teacher = timm_dfpt.wrap(model, input_size=(3, 64, 64)).eval()
    grids = [(2, 3), (4, 2)]
    length = 10
    coord, valid = torch.zeros(2, length, 2, dtype=torch.long), torch.zeros(2, length, dtype=torch.bool)
    for i, (height, width) in enumerate(grids):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
        coord[i, : height * width] = torch.stack([rows.flatten(), columns.flatten()], dim=-1)
        valid[i, : height * width] = True
    batch = {'patches': images(2, length, 16 * 16 * 3), 'patch_coord': coord, 'patch_valid': valid}
    expected = model(batch)
    out = teacher(batch)
    assert torch.equal(out.original, expected)
    assert torch.equal(out.prompt, expected)
    move_blocks(teacher)
    shared, alone = teacher(batch), teacher.prompt(batch)
    assert torch.equal(shared.prompt, alone)
    assert not torch.equal(alone, expected)
    # Padding must not matter: the second image alone, without any, gives the same.
    single = {key: value[1:, : 4 * 2] for key, value in batch.items()}
    torch.testing.assert_close(teacher.prompt(single)[0], alone[1], rtol=1e-4, atol=1e-5)
    # A whole picture as a batch of patches equals the picture.
    x = images(2, 3, 64, 32)
    patches = x.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).reshape(2, 8, -1)
    whole = {
        'patches': patches,
        'patch_coord': coord[1:, :8].expand(2, -1, -1),
        'patch_valid': valid[1:, :8].expand(2, -1),
    }
    torch.testing.assert_close(teacher.prompt(whole), teacher.prompt(x), rtol=1e-4, atol=1e-5)


def test_torchvision_models() -> None:
    models = pytest.importorskip('torchvision.models')
    x = images(2, 3, 64, 64)
    for model, stages, head in (
        (models.resnet18(num_classes=4), ['layer1', 'layer2', 'layer3', 'layer4'], 'fc'),
        (models.mobilenet_v2(num_classes=4, width_mult=0.25), ['features.3', 'features.6', 'features.9'],
         'classifier.1'),
        (models.SwinTransformer([4, 4], 24, [1, 1, 1, 1], [1, 2, 4, 8], [7, 7], num_classes=4),
         ['features.1', 'features.3', 'features.5', 'features.7'], 'head'),
        (models.VisionTransformer(64, 16, 4, 2, 32, 64, num_classes=4),
         [f'encoder.layers.encoder_layer_{i}' for i in range(4)], 'heads.head'),
    ):
        expected = frozen_logits(model, x)
        teacher = timm_dfpt.wrap(model, stages=stages, classifier=head).eval()
        assert len(teacher.stages) == len(stages) - 1
        out = teacher(x)
        assert torch.equal(out.original, expected)
        torch.testing.assert_close(out.prompt, expected, rtol=1e-5, atol=1e-6)
        move_blocks(teacher)
        assert torch.equal(teacher(x).prompt, teacher.prompt(x))
        assert not torch.equal(teacher.prompt(x), expected)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'variant': 'lora'}, "variant must be one of .* 'lora'"),
        ({'num_classes': 0}, 'num_classes must be'),
        ({'num_classes': True}, 'num_classes must be'),
        (
            {'prompt': PromptConfig(block=False, fusion='none', new_head=False)},
            'nothing to train.*head and the norms of the teacher',
        ),
        ({'classifier': 'nowhere'}, "no module 'nowhere'"),
        ({'stages': ['layer1', 'nowhere']}, "'nowhere', which is not a module"),
        ({'stages': []}, 'is empty: name at least one module'),
        ({'stages': 0}, 'stages must be'),
        ({'stages': 9}, 'more than the 5 stages'),
        ({'stages': 1}, 'single stage'),
        ({'stages': ['layer1', 'layer1']}, 'twice'),
        ({'stages': ['layer2', 'layer1']}, 'in this order'),
        ({'stages': ['fc', 'layer1']}, 'does not hold features'),
        ({'input_size': (3, 64)}, 'input_size must be'),
    ],
)
def test_bad_arguments_are_refused_in_words(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm_dfpt.wrap(make_model(), **kwargs)


def test_bad_models_are_refused_in_words() -> None:
    with pytest.raises(TypeError, match='str'):
        timm_dfpt.wrap('resnet18')  # type: ignore[arg-type]
    with pytest.raises(TypeError, match='PromptConfig'):
        timm_dfpt.wrap(make_model(), prompt={})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='already'):
        timm_dfpt.wrap(make_teacher())
    with pytest.raises(ValueError, match='num_classes=0'):
        timm_dfpt.wrap(make_model(num_classes=0))
    with pytest.raises(ValueError, match='does not name its classifier'):
        timm_dfpt.wrap(_Toy(''), stages=['stage1', 'stage2'])
    with pytest.raises(ValueError, match='no feature_info'):
        timm_dfpt.wrap(_Toy(''), classifier='head')


class _Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
        self.side = nn.Conv2d(4, 4, 1)
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        self.side(x)
        return self.head(x)


def test_models_that_give_no_logits_and_unused_stages_are_refused() -> None:
    with pytest.raises(ValueError, match=r'logits \[B, K\]'):
        timm_dfpt.wrap(_Detector(), stages=['body.0', 'body.1'], classifier='head')
    with pytest.raises(ValueError, match="after 'side'"):
        timm_dfpt.wrap(_Detector(), stages=['body.0', 'side', 'head'], classifier='head')


def test_trainable_parameters_are_printed_as_peft_does(capsys: pytest.CaptureFixture[str]) -> None:
    teacher = make_teacher()
    teacher.print_trainable_parameters()
    trained = sum(p.numel() for p in teacher.parameters() if p.requires_grad)
    total = sum(p.numel() for p in teacher.parameters())
    expected = f'trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}\n'
    assert capsys.readouterr().out == expected


def test_summary_names_stages_shares_and_what_passes_by() -> None:
    teacher = make_teacher()
    text = teacher.summary()
    trained = sum(p.numel() for g in teacher.parameter_groups() for p in g['params'])
    assert all(stage.module in text for stage in teacher.stages)
    assert f'{trained:,}' in text
    assert 'share the computation' in text
    assert 'pass' not in text
    unet = timm_dfpt.wrap(_Skipping(), stages=['a', 'b', 'c'], classifier='head')
    assert unet.bypassed == ('b',)
    assert 'b: later layers also see' in unet.summary()


class _Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        return self.head((self.c(self.b(a)) + self.c.bias[0] * 0 + a).mean((2, 3)))


def test_wrap_of_fused_batch_norm_layers() -> None:
    # timm's BatchNormAct2d is a BatchNorm2d; the copy's must be found, too.
    teacher = make_teacher('test_efficientnet', variant='dfpt+', prompt=PromptConfig(norms='own')).train()
    norms = [m for m in teacher.prompt_path.backbone.modules() if isinstance(m, BatchNormAct2d)]
    assert norms
    assert all(norm.training for norm in norms)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_model_without_memory_is_wrapped_too(dtype):
    with torch.device('meta'):
        model = timm.create_model('test_resnet', num_classes=5).to(dtype)
    teacher = timm_dfpt.wrap(model)
    out = teacher(torch.empty(3, 3, 64, 64, device='meta', dtype=dtype))
    assert out.original.shape == out.prompt.shape == (3, 5)
