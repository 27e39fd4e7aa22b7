"""Models at another input size: as timm resamples them, and still known as what was published."""
from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_dfpt
from timm_dfpt.backbone.input_size import input_size_of, set_input_size
from timm_dfpt.hub.base import fingerprint
from timm_dfpt.tasks.inputs import input_config_of

_VIT = {'embed_dim': 32, 'depth': 4, 'num_heads': 2}
TEST_CASES: dict[str, tuple[dict[str, Any], int, tuple[int, int]]] = {
    'vit_small_patch14_dinov2': (_VIT, 56, (84, 56)),
    'vit_small_patch16_dinov3': (_VIT, 64, (96, 32)),
    'vit_base_patch16_siglip_224': (_VIT, 32, (64, 64)),
    'eva02_tiny_patch14_224': (_VIT, 56, (84, 84)),
    'beit_base_patch16_224': ({**_VIT, 'num_classes': 3}, 32, (64, 64)),
    'deit_tiny_distilled_patch16_224': ({**_VIT, 'num_classes': 3}, 32, (64, 64)),
    'swin_tiny_patch4_window7_224': ({'embed_dim': 24, 'depths': (1, 1, 1, 1), 'num_classes': 3}, 56, (112, 56)),
}


def make(name: str, size: Any = None) -> Any:
    kwargs, side, _ = TEST_CASES[name]
    torch.manual_seed(0)
    return timm.create_model(name, img_size=size or side, **kwargs).eval()


@pytest.mark.parametrize('name', TEST_CASES)
@torch.no_grad()
def test_another_size_is_timms_own(name: str) -> None:
    _, side, size = TEST_CASES[name]
    model, x = make(name), torch.randn(2, 3, *size)
    expected = make(name)
    expected.set_input_size(img_size=size)
    known = fingerprint(model)
    set_input_size(model, size)
    assert torch.equal(model(x), expected(x))
    assert input_size_of(model) == size
    assert input_config_of(model)['input_size'] == (3, *size)
    assert fingerprint(model) == known
    assert fingerprint(copy.deepcopy(model)) == known
    set_input_size(model, (side, side))
    assert fingerprint(model) == known


@pytest.mark.parametrize(
    ('name', 'variant'),
    [
        ('vit_small_patch14_dinov2', 'dfpt'),
        ('vit_small_patch14_dinov2', 'dfpt+'),
        ('swin_tiny_patch4_window7_224', 'dfpt+'),
        ('beit_base_patch16_224', 'dfpt+'),
    ],
)
def test_a_prompt_path_brings_the_size_along(name: str, variant: Any, tmp_path: Any) -> None:
    """It names the model as published, and sets a copy of it to the size."""
    _, side, size = TEST_CASES[name]
    model, x = make(name), torch.randn(2, 3, *size)
    set_input_size(model, size)
    teacher = timm_dfpt.wrap(model, num_classes=4, variant=variant).eval()
    with torch.no_grad():
        for param in teacher.prompt_path.parameters():
            param.add_(0.01 * torch.randn_like(param))
    teacher.save_pretrained(tmp_path)
    published = make(name)
    loaded = timm_dfpt.load_teacher(tmp_path, model=published)
    assert published(torch.randn(1, 3, side, side)).shape[0] == 1
    assert all(map(torch.equal, loaded(x), teacher(x)))
    assert timm_dfpt.load_teacher(tmp_path, model=teacher.unwrap()).model is model
    other = make(name)
    set_input_size(other, (4 * side, 4 * side))
    with pytest.raises(ValueError, match=rf'at input_size=\({size[0]}, {size[1]}\), not at \({4 * side}, {4 * side}\)'):
        timm_dfpt.load_teacher(tmp_path, model=other)


def test_networks_of_any_size_are_left_alone() -> None:
    model = timm.create_model('test_resnet', num_classes=0).eval()
    known = copy.deepcopy(model.state_dict())
    set_input_size(model, (96, 64))
    assert all(torch.equal(known[name], tensor) for name, tensor in model.state_dict().items())
    assert input_config_of(model)['input_size'] == (3, 96, 64)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'size', 'message'),
    [
        ('vit_small_patch14_dinov2', {**_VIT, 'img_size': 56}, (90, 84), 'patches of 14 x 14.*such as 84 x 84'),
        ('levit_128s', {}, (192, 192), 'levit_128s.*192 x 192 and has no set_input_size'),
        ('test_resnet', {}, (1, 1), None),
        ('densenet121', {'block_config': (1, 1, 1, 1)}, (8, 8), 'densenet121.*does not take images of 8 x 8'),
    ],
)
def test_what_cannot_be_is_said(name: str, kwargs: dict[str, Any], size: tuple[int, int], message: str | None) -> None:
    model: nn.Module = timm.create_model(name, **kwargs).eval()
    if message is None:
        set_input_size(model, size)
        return
    with pytest.raises(ValueError, match=message):
        set_input_size(model, size)
