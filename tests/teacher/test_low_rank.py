"""A head and a fusion of low rank, against whole ones with the same product of weights."""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_dfpt
from timm_dfpt import DualForwardPathTeacher, PromptConfig
from timm_dfpt.teacher.blocks import FusionBlock
from timm_dfpt.testing import check_teacher, randomize

LOW = PromptConfig(act_layer='gelu', head_rank=2, fusion_rank=2)
CLASSES = 6
_TOKENS = {'embed_dim': 24, 'depth': 3, 'num_heads': 2, 'img_size': 32, 'patch_size': 8}
# Where their classifiers are, by what is special about them.
FAMILIES: dict[str, tuple[str, dict[str, Any], int, tuple[str, ...]]] = {
    'linear': ('resnet18', {'layers': (1, 1, 1, 1), 'channels': (8, 8, 8, 16)}, 64, ('fc',)),
    'in a module of the head': ('test_convnext', {}, 64, ('head.fc',)),
    'behind a convolution': ('mobilenetv3_small_050', {}, 64, ('classifier',)),
    '1x1 convolution': ('resnetv2_50', {'layers': (1, 1, 1, 1), 'channels': (8, 8, 8, 16)}, 64, ('head.fc',)),
    'tokens': ('vit_tiny_patch16_224', _TOKENS, 32, ('head',)),
    'two heads': ('deit_tiny_distilled_patch16_224', _TOKENS, 32, ('head', 'head_dist')),
    'maps of NHWC': (
        'swin_tiny_patch4_window7_224',
        {'img_size': 32, 'window_size': 2, 'embed_dim': 12, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 1, 1)},
        32,
        ('head.fc',),
    ),
}


def make(kind: str = 'linear', num_classes: int = CLASSES) -> tuple[nn.Module, torch.Tensor]:
    name, kwargs, size, _ = FAMILIES[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes, **kwargs).eval()
    x = torch.randn(2, 3, size, size)
    randomize(model, x)
    return model, x


def move(teacher: DualForwardPathTeacher) -> None:
    """Train nothing, but give what is trained other values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for group in teacher.parameter_groups():
            for param in group['params']:
                param.add_(0.1 * torch.randn_like(param))


def heads_of(teacher: DualForwardPathTeacher) -> list[Any]:
    return [teacher.prompt_path.model.get_submodule(name) for name in teacher.prompt_path.heads]


@pytest.mark.parametrize('kind', FAMILIES)
def test_every_kind_of_classifier_is_corrected(kind: str) -> None:
    model, x = make(kind)
    row = check_teacher(model, x, thorough=kind in ('linear', 'two heads'), prompt=LOW)
    assert row['init_difference'] == 0
    teacher = timm_dfpt.wrap(model, prompt=LOW, input_size=tuple(x.shape[1:]))
    assert teacher.prompt_path.heads == FAMILIES[kind][3]
    counts = {group['name']: sum(p.numel() for p in group['params']) for group in teacher.parameter_groups()}
    features = [model.get_submodule(name).weight.shape[1] for name in teacher.prompt_path.heads]
    assert counts['head'] == sum(2 * (width + CLASSES) + CLASSES for width in features)
    assert f'head: {counts["head"]:,} parameters (the teacher\'s with a correction of rank 2)' in teacher.summary()


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
@pytest.mark.parametrize('kind', ['linear', '1x1 convolution', 'two heads'])
def test_a_whole_head_and_fusion_with_the_product_of_the_weights(kind: str, variant: Any) -> None:
    model, x = make(kind)
    low = timm_dfpt.wrap(model, prompt=LOW, variant=variant).eval()
    move(low)
    found = low(x)
    whole = timm_dfpt.wrap(model, prompt=PromptConfig(act_layer='gelu'), variant=variant).eval()
    mine, theirs = whole.prompt_path.state_dict(), low.prompt_path.state_dict()
    mine.update({name: value for name, value in theirs.items() if name in mine})
    for i, stage in enumerate(low.stages):
        (feature,) = stage.features
        up, down = (theirs[f'fusions.{i}.conv.{part}.weight'].flatten(1) for part in ('up', 'down'))
        mine[f'fusions.{i}.conv.weight'] = (up @ down).view(feature.channels, feature.channels, 1, 1)
        mine[f'fusions.{i}.conv.bias'] = theirs[f'fusions.{i}.conv.up.bias']
    whole.prompt_path.load_state_dict(mine)
    with torch.no_grad():
        for name, copied, low_head in zip(low.prompt_path.heads, heads_of(whole), heads_of(low), strict=True):
            frozen = model.get_submodule(name)
            product = low_head.up.weight.flatten(1) @ low_head.down.weight.flatten(1)
            copied.weight.copy_(frozen.weight + product.view_as(frozen.weight))
            copied.bias.copy_(frozen.bias + low_head.up.bias)
    torch.testing.assert_close(found.prompt, whole(x).prompt, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found.prompt, found.original)


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
def test_the_teachers_head_is_neither_trained_nor_saved(variant: Any, tmp_path: Path) -> None:
    model, x = make()
    before = copy.deepcopy(model.state_dict())
    teacher = timm_dfpt.wrap(model, prompt=LOW, variant=variant)
    optimizer = torch.optim.AdamW(teacher.parameter_groups(), lr=1e-2)
    for _ in range(2):
        teacher.train().requires_grad_(True)
        nn.functional.cross_entropy(teacher(x).prompt, torch.tensor([0, 1])).backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())
    assert not any(torch.equal(head.up.weight, torch.zeros_like(head.up.weight)) for head in heads_of(teacher))
    shapes = [tuple(value.shape) for value in teacher.prompt_path.state_dict().values()]
    assert tuple(model.fc.weight.shape) not in shapes
    teacher.eval()
    teacher.save_pretrained(tmp_path, base_model='')
    loaded = DualForwardPathTeacher.from_pretrained(tmp_path, model=make()[0])
    assert loaded.config == LOW
    assert torch.equal(loaded(x).prompt, teacher(x).prompt)
    assert torch.equal(copy.deepcopy(teacher)(x).prompt, teacher(x).prompt)


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
def test_other_weights_and_precisions_of_the_teacher_reach_its_head(variant: Any) -> None:
    model, x = make()
    head_alone = PromptConfig(block=False, fusion='none', head_rank=2)
    teacher = timm_dfpt.wrap(model, prompt=head_alone, variant=variant).eval()
    assert teacher.double()(x).prompt.dtype == torch.float64
    assert torch.equal(*teacher(x))
    # New tensors, not new values of the old ones.
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    state['model.fc.weight'].mul_(2)
    teacher.load_state_dict(state, assign=True)
    assert torch.equal(*teacher(x))
    (head,) = heads_of(teacher)
    assert head.frozen.weight is model.fc.weight
    half = timm_dfpt.wrap(make()[0].bfloat16(), prompt=LOW, variant=variant).eval()
    assert half(x).prompt.dtype == torch.float32
    assert {p.dtype for group in half.parameter_groups() for p in group['params']} == {torch.float32}
    torch.testing.assert_close(half(x).prompt, half(x).original.float(), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_one_graph_to_compile_and_to_export() -> None:
    model, x = make()
    teacher = timm_dfpt.wrap(model, prompt=LOW).eval()
    move(teacher)
    expected = teacher(x)
    torch.testing.assert_close(torch.compile(teacher, backend='eager', fullgraph=True)(x).prompt, expected.prompt)
    torch.testing.assert_close(torch.export.export(teacher, (x,)).module()(x)[1], expected.prompt)


def test_a_fitted_head_is_corrected_too(tmp_path: Path) -> None:
    encoder, x = make('tokens', num_classes=0)
    images = torch.randn(40, *x.shape[1:])
    fitted = timm_dfpt.fit_head(encoder, [(images, torch.arange(40) % 8)], num_classes=8)
    teacher = timm_dfpt.wrap(fitted, prompt=LOW).eval()
    assert torch.equal(*teacher(x))
    move(teacher)
    teacher.save_pretrained(tmp_path, base_model='')
    loaded = DualForwardPathTeacher.from_pretrained(tmp_path, model=encoder)
    assert torch.equal(loaded(x).prompt, teacher(x).prompt)


def test_fusion_of_low_rank_counts_two_thin_matrices() -> None:
    fusion = FusionBlock(16, rank=3)
    assert sum(p.numel() for p in fusion.parameters()) == 2 * 3 * 16 + 16
    with pytest.raises(ValueError, match=r'fusion_rank=8 .*16 x 16 weights: at most 7, or None'):
        FusionBlock(16, rank=8)


@pytest.mark.parametrize(
    ('prompt', 'more', 'message'),
    [
        ({'head_rank': 2}, {'num_classes': 9}, 'head_rank=2 corrects the head of .*num_classes=9 .*leave one of them'),
        ({'head_rank': 5}, {}, 'head_rank=5 saves nothing where the whole matrix has 6 x 16 weights: at most 4'),
        ({'head_rank': 2, 'new_head': False}, {}, 'head_rank=2 corrects .*new_head=False .*leave one of them out'),
        ({'fusion_rank': 2, 'fusion': 'none'}, {}, "fusion_rank=2 is of fusion='conv', not of fusion='none'"),
        ({'fusion_rank': 4}, {}, 'fusion_rank=4 saves nothing .*at most 3'),
        ({'head_rank': 0}, {}, 'PromptConfig.head_rank must be None or an integer from 1 to 4096, got 0'),
    ],
)
def test_ranks_that_mean_nothing_are_refused_in_words(prompt: Any, more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm_dfpt.wrap(make()[0], prompt=PromptConfig(**prompt), **more)


def test_a_classifier_that_is_not_linear_is_refused_in_words() -> None:
    model, _ = make()
    model.fc = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, CLASSES))
    with pytest.raises(ValueError, match="head_rank=2 .*but 'fc' of .* is a Sequential: leave head_rank=None"):
        timm_dfpt.wrap(model, prompt=LOW)
