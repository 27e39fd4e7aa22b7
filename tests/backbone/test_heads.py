"""Heads: encoders get one where timm puts it, and nothing that was trained is lost."""
from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_dfpt
from benchmarks.coverage import architectures
from timm_dfpt.backbone.heads import ENCODER_HEAD, add_head, replace_head
from timm_dfpt.teacher.blocks import PromptConfig
from timm_dfpt.testing import check_teacher, randomize

_VIT = {'embed_dim': 32, 'depth': 4, 'num_heads': 2}
# One tiny encoder for each way to a head: arguments, side of the image, classifier, and the features that enter it as a
# function of what the encoder returns (None: layers that come with the classifier are between them).
TEST_CASES: dict[str, tuple[str, dict[str, Any], int, tuple[str, ...], Callable[[torch.Tensor], torch.Tensor] | None]]
TEST_CASES = {
    'class token': ('vit_small_patch14_dinov2', {**_VIT, 'img_size': 56}, 56, ('head',), nn.Identity()),
    'registers': ('vit_small_patch14_reg4_dinov2', {**_VIT, 'img_size': 56}, 56, ('head',), nn.Identity()),
    'rope': ('vit_small_patch16_dinov3', {**_VIT, 'img_size': 64}, 64, ('head',), nn.Identity()),
    'attention pool': ('vit_base_patch16_siglip_224', {**_VIT, 'img_size': 32}, 32, ('head',), nn.Identity()),
    'mean': ('vit_base_patch16_siglip_gap_224', {**_VIT, 'img_size': 32}, 32, ('head',), nn.Identity()),
    'masked': ('vit_base_patch16_224.mae', {**_VIT, 'img_size': 32}, 32, ('head',), nn.Identity()),
    'eva02': ('eva02_tiny_patch14_224', {**_VIT, 'img_size': 56}, 56, ('head',), nn.Identity()),
    'sam': ('samvit_base_patch16', {**_VIT, 'img_size': 64, 'neck_chans': 16, 'global_attn_indexes': (1, 3)}, 64,
            ('head.fc',), nn.Identity()),
    'clip gap': ('resnet50_clip_gap', {}, 32, ('head.fc',), nn.Identity()),
    'clip attention': ('resnet50_clip', {'num_classes': 0}, 224, ('head.proj',), nn.Identity()),
    'naflex': ('naflexvit_base_patch16_siglip', {**_VIT, 'img_size': 32}, 64, ('head',), nn.Identity()),
    'convolutional': ('dla34', {'num_classes': 0}, 64, ('fc',), nn.Identity()),
    'norm': ('repvit_m0_9', {'num_classes': 0}, 64, ('head.head.l',), None),
    'mlp': ('caformer_s18', {'num_classes': 0}, 64, ('head.fc.fc2',), None),
    'tokens': ('vit_small_patch14_dinov2', {**_VIT, 'img_size': 56, 'global_pool': ''}, 56, (ENCODER_HEAD,),
               lambda y: y[:, 1:].mean(1)),
    'map': ('resnet18', {'num_classes': 0, 'global_pool': ''}, 64, (ENCODER_HEAD,), lambda y: y.mean((2, 3))),
    'map of channels last': ('swin_tiny_patch4_window7_224', {'num_classes': 0, 'global_pool': '', 'embed_dim': 24,
                             'depths': (1, 1, 1, 1), 'img_size': 56}, 56, (ENCODER_HEAD,), lambda y: y.mean((1, 2))),
    'deepseek': ('deepseek_vit_412m_enc', _VIT, 84, (ENCODER_HEAD,), lambda y: y.mean(1)),
    'gemma': ('gemma4_vit_167m_enc', _VIT, 96, (ENCODER_HEAD,), lambda y: y.mean(1)),
    'qwen': ('qwen3_vit_88m_enc', _VIT, 64, (ENCODER_HEAD,), lambda y: y.mean(1)),
}  # fmt: skip


def make(kind: str) -> tuple[nn.Module, torch.Tensor]:
    name, kwargs, side, *_ = TEST_CASES[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    return model, torch.randn(2, 3, side, side)


@pytest.mark.parametrize('kind', TEST_CASES)
@torch.no_grad()
def test_an_encoder_gets_a_head_behind_what_it_returns(kind: str) -> None:
    model, x = make(kind)
    names, features = TEST_CASES[kind][3:]
    returned, weights = model(x), dict(model.named_parameters())
    assert add_head(model, 3, x=x) == names
    after = dict(model.named_parameters())
    assert all(after[name] is weight for name, weight in weights.items())
    if features is not None:
        head: Any = model.get_submodule(names[0])
        expected = nn.functional.linear(features(returned), head.weight.flatten(1), head.bias)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    other.get_submodule(names[0]).weight.zero_()
    assert not torch.equal(other(x), model(x))


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
@pytest.mark.parametrize('kind', ['class token', 'norm', 'qwen'])
def test_encoders_as_teachers(kind: str, variant: Any) -> None:
    model, x = make(kind)
    with torch.no_grad():
        returned = model(x)
    with pytest.raises(ValueError, match='num_classes=K'):
        timm_dfpt.wrap(model)
    teacher = timm_dfpt.wrap(model, num_classes=3, variant=variant, prompt=PromptConfig(act_layer='gelu')).eval()
    original, prompt = teacher(x)
    assert torch.equal(original, returned)
    assert torch.equal(prompt, torch.zeros(2, 3))
    assert (teacher.num_classes, teacher.prompt_path.num_classes) == (0, 3)
    assert 'an encoder' in teacher.summary()
    assert TEST_CASES[kind][3][0].split('.')[0] in teacher.summary()
    optimizer = torch.optim.SGD(teacher.parameter_groups(), lr=0.1)
    teacher.train()
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(teacher.prompt(x), torch.tensor([0, 2]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for group in teacher.parameter_groups() for p in group['params'])
    teacher.eval()
    assert torch.equal(teacher(x).original, returned)
    assert teacher.unwrap() is model
    assert torch.equal(model(x), returned)


class _Encoder(nn.Module):
    """Not timm's: features `[B, D]` of a small network, or what its last layer makes of them."""

    def __init__(self, last: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.last = last or nn.Flatten()

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.body(self.stem(x).relu()).relu().mean((2, 3)))


class _Output(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {'features': x}


def test_encoders_that_are_not_timms() -> None:
    stages = ['stem', 'body']
    teacher = timm_dfpt.wrap(_Encoder(), stages=stages, num_classes=4)
    assert teacher(torch.randn(2, 3, 64, 64)).original.shape == (2, 8)
    assert teacher.prompt(torch.randn(2, 3, 64, 64)).shape == (2, 4)
    # A linear layer at the end may be a classifier: who wraps must say.
    with pytest.raises(ValueError, match=r'name the module, e.g. classifier="last".*classifier=\(\)'):
        timm_dfpt.wrap(_Encoder(nn.Linear(8, 6)), stages=stages, num_classes=4)
    for classifier, width in (((), 6), ('last', 8)):
        teacher = timm_dfpt.wrap(_Encoder(nn.Linear(8, 6)), stages=stages, num_classes=4, classifier=classifier)
        assert teacher.prompt_path.head[0].in_features == width
    with pytest.raises(ValueError, match='returns a dict.*one tensor of features'):
        timm_dfpt.wrap(_Encoder(_Output()), stages=stages, num_classes=4)


def test_a_new_head_and_its_scale() -> None:
    model = timm.create_model('test_resnet', num_classes=5)
    torch.manual_seed(0)
    replace_head(model, ['fc'], 3)
    first = model.fc.weight.clone()
    torch.manual_seed(0)
    replace_head(model, ['fc'], 3, init_scale=0.5)
    assert torch.equal(model.fc.weight, first * 0.5)
    assert model.num_classes == 3
    replace_head(model, ['fc'], 3, init_scale=0)
    assert not any(param.any() for param in model.fc.parameters())


@pytest.mark.parametrize('kind', ['class token', 'tokens', 'qwen'])
def test_encoders_keep_what_is_promised_of_teachers(kind: str) -> None:
    model, x = make(kind)
    randomize(model, x)
    assert check_teacher(model, x)['head'] == list(TEST_CASES[kind][3])


@pytest.mark.slow
def test_encoders_on_disk(tmp_path: Path) -> None:
    """In a fresh process, on the encoder as it was published: the same bits."""
    code = ['import timm, timm_dfpt, torch']
    for kind in ('class token', 'qwen'):
        name, kwargs, *_ = TEST_CASES[kind]
        model, x = make(kind)
        teacher = timm_dfpt.wrap(model, num_classes=3).eval()
        with torch.no_grad():
            for param in teacher.prompt_path.parameters():
                param.add_(0.01 * torch.randn_like(param))
        folder = tmp_path / kind
        teacher.save_pretrained(folder)
        torch.save([x, *teacher(x)], folder / 'expected.pt')
        code += [
            'torch.manual_seed(0)',
            f'teacher = timm_dfpt.load_teacher({str(folder)!r}, timm.create_model({name!r}, **{kwargs!r}))',
            f'x, *expected = torch.load({str(folder / "expected.pt")!r})',
            'assert all(map(torch.equal, teacher(x), expected)) and teacher.num_classes == 0',
        ]
    subprocess.run([sys.executable, '-c', '\n'.join(code)], check=True)


def _encoders() -> list[str]:
    cfgs = {name: timm.get_pretrained_cfg(name) for name in architectures()}
    return [name for name, cfg in cfgs.items() if cfg is not None and not cfg.num_classes]


@pytest.mark.slow
@pytest.mark.parametrize('name', _encoders())
@torch.no_grad()
def test_every_encoder_keeps_its_weights_and_gets_a_head(name: str) -> None:
    with torch.device('meta'):
        model = timm.create_model(name).eval()
        weights = dict(model.named_parameters())
        x = torch.empty(2, *model.pretrained_cfg['input_size'])
        names = add_head(model, 3, x=x)
        after = dict(model.named_parameters())
        assert all(after[name] is weight for name, weight in weights.items())
        assert {key.rpartition('.')[0] for key in after.keys() - weights.keys()} == set(names)
        assert model(x).shape == (2, 3)
    assert (names == (ENCODER_HEAD,)) == name.endswith('_enc')
