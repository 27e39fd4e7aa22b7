"""Norm layers of its own for the prompt path, and paths without blocks."""
from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import EvoNorm2dB0, GroupNorm1, RmsNorm2d, set_reentrant_ckpt, use_reentrant_ckpt
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import nn

import timm_dfpt
from timm_dfpt import PromptConfig
from timm_dfpt.backbone.norms import find_norms

OWN = PromptConfig(norms='own')
BARE = PromptConfig(norms='own', block=False, fusion='none')
# A model of each kind of norm that timm has: BatchNorm (plain and with activation), LayerNorm (tokens, 2d, with global
# response), GroupNorm, RMSNorm, EvoNorm, affine layers.
FAMILIES = {
    'test_resnet': {},
    'test_efficientnet': {},
    'test_convnext2': {},
    'test_vit': {'img_size': 32, 'patch_size': 8},
    'test_efficientnet_gn': {},
    'mobilenetv4_conv_small_035': {},
    'convnextv2_atto': {'depths': (1, 1, 1, 1), 'dims': (8, 8, 16, 16)},
    'test_nfnet': {},
    'affine': {},
    'evonorm': {},
    'rmsnorm': {},
}
SMALL = {'layers': (1, 1, 1, 1), 'channels': (8, 8, 16, 16), 'stem_width': 4}


def make_model(name='test_resnet'):
    torch.manual_seed(0)
    if name == 'evonorm':
        model = timm.create_model('resnet18', num_classes=5, norm_layer=EvoNorm2dB0, **SMALL)
    elif name == 'affine':
        kinds = {'block_layer': ResBlock, 'norm_layer': Affine, 'mlp_ratio': 2}
        model = MlpMixer(5, img_size=32, patch_size=8, num_blocks=4, embed_dim=16, **kinds)
    elif name == 'rmsnorm':
        model = timm.create_model('resnet18', num_classes=5, norm_layer=RmsNorm2d, **SMALL)
    else:
        model = timm.create_model(name, num_classes=5, **FAMILIES.get(name, {}))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.7, 1.6)
    return model.eval()


def images(seed=0, count=4):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def train(teacher, steps=2):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([p for group in teacher.parameter_groups() for p in group['params']], 0.05)
    teacher.train()
    for step in range(steps):
        teacher.prompt(images(step)).logsumexp(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return teacher.eval()


@pytest.mark.parametrize('name', FAMILIES)
def test_starts_as_the_teacher_and_moves_nothing_but_its_own(name):
    model = make_model(name)
    before, expected = copy.deepcopy(model.state_dict()), model(images())
    norms = find_norms(model, ['fc'] if hasattr(model, 'fc') else ())
    teacher = timm_dfpt.wrap(model, prompt=BARE, input_size=(3, 32, 32)).eval()
    assert torch.equal(teacher.prompt(images()), expected)
    assert all(torch.equal(a, b) for a, b in zip(teacher(images()), (expected, expected), strict=True))
    groups = {group['name']: group['params'] for group in teacher.parameter_groups()}
    assert sum(p.numel() for p in groups.get('norms', ())) == sum(
        p.numel() for norm in norms.values() for p in norm.parameters()
    )
    own = copy.deepcopy(teacher.prompt_path.state_dict())
    train(teacher)
    after = teacher.prompt_path.state_dict()
    assert all(not torch.equal(own[key], after[key]) for key in own if 'running_' in key)
    for name_of, group in groups.items():
        assert all(p.grad is None or p.grad.isfinite().all() for p in group), name_of
    changed = {key.split('.')[0] for key in own if not torch.equal(own[key], after[key])}
    assert changed == {'head', 'norms'} & {key.split('.')[0] for key in own}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(teacher.original(images()), expected)
    assert not torch.equal(teacher.prompt(images()), expected)


def test_norms_are_found_by_what_they_are():
    class ScaleNorm(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.g = nn.Parameter(weight)

    class Gamma(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(3))

    class PreNorm(Gamma):
        def __init__(self):
            super().__init__()
            self.fn = nn.Linear(3, 3)

    model = nn.ModuleDict({
        'a': nn.BatchNorm1d(3), 'b': nn.InstanceNorm2d(3), 'c': nn.InstanceNorm2d(3, affine=True), 'd': GroupNorm1(4),
        'e': ScaleNorm(torch.ones(1, 3, 1)), 'f': ScaleNorm(torch.ones(3, 3)), 'norm1': Affine(3),
        'g': Gamma(), 'head': nn.Sequential(nn.LayerNorm(3)), 'h': nn.LayerNorm(3, elementwise_affine=False),
        'i': nn.BatchNorm2d(3, affine=False), 'j': timm.layers.BatchNormAct2d(3, act_layer=nn.PReLU),
        'convnorm': nn.Conv2d(3, 3, 3), 'k': PreNorm(),
    })  # fmt: skip
    assert list(find_norms(model, ['head'])) == ['a', 'c', 'd', 'e', 'norm1', 'i', 'j']


def test_statistics_are_used_and_updated_in_training_alone():
    model = make_model()
    teacher = timm_dfpt.wrap(model, prompt=BARE)
    assert not teacher.shares_prefix
    reference = copy.deepcopy(model)
    for module in reference.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    assert torch.equal(teacher.train().prompt(images()), reference(images()))
    mine, theirs = teacher.prompt_path.model, dict(reference.named_buffers())
    assert all(torch.equal(buffer, theirs[name]) for name, buffer in mine.named_buffers())
    before = copy.deepcopy(dict(mine.named_buffers()))
    teacher.eval().prompt(images(1))
    assert all(torch.equal(before[name], buffer) for name, buffer in mine.named_buffers())
    assert 'norm layers of its own: 15, 15 with running statistics' in teacher.summary()


def test_weights_are_not_decayed():
    teacher = timm_dfpt.wrap(make_model(), prompt=OWN)
    task = timm_dfpt.DFPTDistillationTask(make_model(), teacher, verbose=False)
    norms = {id(p) for norm in teacher.prompt_path.norms for p in norm.parameters()}
    for group in task.prompt_param_groups():
        assert (group.get('weight_decay') == 0) == all(id(p) in norms for p in group['params'])
        assert 'lr_scale' not in group


@pytest.mark.parametrize('save_memory', [True, False])
def test_gradients_are_those_of_a_copy(save_memory):
    config = PromptConfig(norms='own', new_head=False)
    own = timm_dfpt.wrap(make_model(), prompt=config, save_memory=save_memory).train()
    whole = timm_dfpt.wrap(make_model(), prompt=config, variant='dfpt+').train()
    for paths in (own, whole):
        paths.prompt(images()).square().mean().backward()
    expected = {name: param.grad for name, param in whole.prompt_path.model.named_parameters()}
    found = {name: param.grad for name, param in own.prompt_path.model.named_parameters() if param.grad is not None}
    assert len(found) == 2 * len(own.prompt_path.norms)
    assert all(torch.equal(grad, expected[name]) for name, grad in found.items())


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
def test_without_blocks_nothing_is_done_at_the_stages(variant):
    teacher = timm_dfpt.wrap(make_model(), prompt=BARE, variant=variant)
    assert not any(module._forward_hooks for module in teacher.prompt_path.model.modules())
    assert not list(teacher.prompt_path.blocks) + list(teacher.prompt_path.fusions)
    names = ['head', 'norms'] if variant == 'dfpt' else ['head', 'backbone', 'norms']
    assert [group['name'] for group in teacher.parameter_groups()] == names
    assert 'no blocks' in teacher.summary()


def test_blocks_without_fusion_add_to_the_features():
    teacher = timm_dfpt.wrap(make_model(), prompt=PromptConfig(fusion='none'))
    assert [group['name'] for group in teacher.parameter_groups()] == ['blocks', 'head']
    assert not list(teacher.prompt_path.fusions.parameters())
    train(teacher)
    assert not torch.equal(teacher.prompt(images()), teacher.original(images()))


def test_moves_and_copies_keep_norms_their_own():
    teacher = timm_dfpt.wrap(make_model(), prompt=OWN).eval()
    twin = train(copy.deepcopy(teacher))
    assert torch.equal(teacher.prompt(images()), teacher.original(images()))
    assert torch.equal(twin.original(images()), teacher.original(images()))
    double = twin.double()
    shared = {id(t) for t in double.model.state_dict(keep_vars=True).values()}
    assert not any(id(t) in shared for t in double.prompt_path.state_dict(keep_vars=True).values())
    double.train()
    moved = double.prompt_path.norms[0].running_mean.clone()
    double.prompt(images().double())
    assert not torch.equal(moved, double.prompt_path.norms[0].running_mean)
    assert double.prompt_path.model.bn1 in set(double.prompt_path.norms)


def test_refused_where_norms_would_be_trained_in_half_precision():
    with pytest.raises(ValueError, match=r"float32.*norms='teacher'"):
        timm_dfpt.wrap(make_model().bfloat16(), prompt=OWN)
    timm_dfpt.wrap(make_model().bfloat16(), prompt=OWN, variant='dfpt+')


def test_norms_that_the_model_does_not_use_are_not_trained():
    model = make_model()
    model.idle_norm = nn.LayerNorm(4)
    teacher = timm_dfpt.wrap(model, prompt=OWN).requires_grad_(True)
    assert not any(p.requires_grad for p in teacher.prompt_path.norms[-1].parameters())
    assert sum(len(list(norm.parameters())) for norm in teacher.prompt_path.norms) - 2 == len(
        teacher.parameter_groups()[-1]['params']
    )


@pytest.mark.parametrize(('variant', 'config'), [('dfpt', OWN), ('dfpt', BARE), ('dfpt+', BARE)])
def test_saved_and_loaded(variant, config, tmp_path):
    model = make_model()
    teacher = train(timm_dfpt.wrap(model, prompt=config, variant=variant))
    timm_dfpt.save_prompt_path(teacher, tmp_path)
    loaded = timm_dfpt.load_teacher(tmp_path, make_model())
    assert loaded.config == config
    assert all(map(torch.equal, loaded(images()), teacher(images())))
    for mine, theirs in zip(loaded.prompt_path.norms, teacher.prompt_path.norms, strict=True):
        assert all(map(torch.equal, mine.state_dict().values(), theirs.state_dict().values()))


@pytest.mark.parametrize('config', [OWN, BARE])
def test_compiled_to_one_graph(config):
    torch._dynamo.reset()
    plain, compiled = (timm_dfpt.wrap(make_model(), prompt=config).train() for _ in range(2))
    logits = torch.compile(compiled.prompt, fullgraph=True, backend='eager')(images())
    assert torch.equal(logits, plain.prompt(images()))
    buffers = (paths.prompt_path.norms.state_dict().values() for paths in (compiled, plain))
    assert all(map(torch.equal, *buffers))


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
@pytest.mark.parametrize('reentrant', [False, True])
def test_gradient_checkpointing_moves_statistics_once(variant, reentrant):
    before, moved = use_reentrant_ckpt(), []
    set_reentrant_ckpt(reentrant)
    try:
        for checkpointing in (False, True):
            teacher = timm_dfpt.wrap(make_model(), variant=variant, prompt=OWN).train()
            torch.manual_seed(1)
            if checkpointing:
                teacher.set_grad_checkpointing()
            for _ in range(2):
                teacher(torch.randn(4, 3, 32, 32)).prompt.square().mean().backward()
            moved.append({k: v for k, v in teacher.prompt_path.named_buffers() if 'running' in k or 'num_batches' in k})
    finally:
        set_reentrant_ckpt(before)
    assert any(name.startswith('blocks') for name in moved[0])
    for name, value in moved[0].items():
        assert torch.equal(value, moved[1][name]), name
