"""Prompt and fusion blocks against plain formulas, and the checks of their configuration."""
from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timm_dfpt import PromptConfig
from timm_dfpt.backbone.layouts import TokenOrder, from_patches, to_patches
from timm_dfpt.backbone.types import Feature, Stage
from timm_dfpt.teacher.blocks import FusionBlock, PartialConv, PromptBlock
from timm_dfpt.teacher.calls import Call, Calls
from timm_dfpt.teacher.hooks import Injection


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return module.double().eval()


@pytest.mark.parametrize('ratio', [0.1, 0.5, 1.0])
def test_partial_conv_convolves_the_first_channels_only(ratio: float) -> None:
    conv = PartialConv(10, 3, ratio).double()
    x = torch.randn(2, 10, 5, 7, dtype=torch.float64)
    out = conv(x)
    convolved = max(1, round(10 * ratio))
    torch.testing.assert_close(out[:, :convolved], F.conv2d(x[:, :convolved], conv.conv.weight, padding=1))
    assert torch.equal(out[:, convolved:], x[:, convolved:])


def reference(block: PromptBlock, x: torch.Tensor, kernels: tuple[int, ...]) -> torch.Tensor:
    """The block of arXiv 2506.18244 in plain functions, with BatchNorm and ReLU."""

    def norm(z: torch.Tensor, bn: nn.Module) -> torch.Tensor:
        return F.batch_norm(z, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)

    def pconv(z: torch.Tensor, i: int) -> torch.Tensor:
        partial, point = block.scales[i]
        n = partial.conv.weight.shape[0]
        mixed = torch.cat([F.conv2d(z[:, :n], partial.conv.weight, padding=kernels[i] // 2), z[:, n:]], dim=1)
        return F.conv2d(mixed, point.weight)

    z = norm(F.conv2d(x, block.reduce.weight), block.norm1).relu()
    z = torch.stack([pconv(z, i) for i in range(len(kernels))]).sum(0)
    return F.conv2d(norm(z, block.norm2).relu(), block.expand.weight, block.expand.bias)


@pytest.mark.parametrize('kernels', [(3,), (1, 3, 5)])
def test_prompt_block_is_the_formula(kernels: tuple[int, ...]) -> None:
    block = randomized(PromptBlock(8, PromptConfig(kernel_sizes=kernels)))
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(block(x), reference(block, x, kernels))


def test_fusion_is_a_convolution_with_the_identity_added() -> None:
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    fusion = randomized(FusionBlock(8))
    weight = fusion.conv.weight + torch.eye(8).view(8, 8, 1, 1)
    torch.testing.assert_close(fusion(x), F.conv2d(x, weight, fusion.conv.bias))
    depthwise = randomized(FusionBlock(8, depthwise=True))
    scale = 1 + depthwise.conv.weight.view(1, 8, 1, 1)
    torch.testing.assert_close(depthwise(x), scale * x + depthwise.conv.bias.view(1, 8, 1, 1))


def test_number_of_weights() -> None:
    """C = 64, r1 = 2, r2 = 0.5, kernels 1, 3, 5: counted by hand."""
    inner, part = 32, 16
    expected = 64 * inner + 2 * inner + sum(k * k * part * part + inner * inner for k in (1, 3, 5)) + 2 * inner
    expected += inner * 64 + 64
    assert sum(p.numel() for p in PromptBlock(64, PromptConfig()).parameters()) == expected
    counts = [sum(p.numel() for p in FusionBlock(64, depthwise).parameters()) for depthwise in (False, True)]
    assert counts == [64 * 64 + 64, 128]


# Smooth activations only: finite differences know nothing of kinks.
CONFIGS = st.builds(
    PromptConfig,
    rd_ratio=st.sampled_from([1, 1.5, 2]),
    partial_ratio=st.sampled_from([0.25, 0.5, 1.0]),
    kernel_sizes=st.sampled_from([(1,), (3,), (1, 3), (3, 1, 5)]),
    norm_layer=st.sampled_from(['batchnorm2d', 'layernorm2d', None]),
    act_layer=st.sampled_from(['gelu', 'silu', 'tanh']),
    fusion=st.sampled_from(['conv', 'depthwise']),
)


def prompt_and_fusion(channels: int, config: PromptConfig, seed: int) -> list[nn.Module]:
    """Both blocks with random weights, and statistics of BatchNorm that are no longer 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    fusion = FusionBlock(channels, depthwise=config.fusion == 'depthwise')
    blocks = [PromptBlock(channels, config).double().eval(), fusion.double().eval()]
    for block in blocks:
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if tensor.is_floating_point():
                value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.data.copy_(value.abs() + 0.5 if name.endswith('running_var') else 0.5 * value)
    return blocks


@settings(max_examples=20, deadline=None)
@given(config=CONFIGS, channels=st.integers(3, 5), seed=st.integers(0, 99))
def test_gradients_are_finite_differences(config: PromptConfig, channels: int, seed: int) -> None:
    """Of the input and of every weight."""
    picture = torch.randn(2, channels, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for block in prompt_and_fusion(channels, config, seed):
        names, weights = zip(*block.named_parameters(), strict=True)

        def function(x: torch.Tensor, *values: torch.Tensor, block: nn.Module = block, names: Any = names) -> Any:
            return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

        inputs = [picture.clone().requires_grad_(), *(w.detach().clone().requires_grad_() for w in weights)]
        assert torch.autograd.gradcheck(function, inputs)


@settings(max_examples=30, deadline=None)
@given(config=CONFIGS, channels=st.integers(1, 9), data=st.data())
def test_blocks_look_at_each_image_alone(config: PromptConfig, channels: int, data: st.DataObject) -> None:
    """Images in another order, or without the others, give the same."""
    count, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 99))
    order = data.draw(st.permutations(range(count)))
    images = torch.randn(count, channels, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for block in prompt_and_fusion(channels, config, seed):
        together = block(images)
        torch.testing.assert_close(block(images[order]), together[order])
        torch.testing.assert_close(block(images[:1]), together[:1])


def inject(h: Any, *features: Feature, order: nn.Module | None = None, size: tuple[int, int] = (64, 96)) -> Any:
    blocks = [randomized(PromptBlock(f.channels, PromptConfig()), seed=3) for f in features]
    fusions = [randomized(FusionBlock(f.channels), seed=4) for f in features]
    orders = [order or nn.Identity() for _ in features]
    calls = Calls()
    calls.here.call = Call(image_size=size)
    return Injection(0, Stage('stage', 16, features), blocks, fusions, orders, calls)(nn.Identity(), (), h)


@settings(max_examples=25, deadline=None)
@given(prefix=st.integers(0, 5), height=st.integers(1, 5), width=st.integers(1, 5), channels=st.integers(1, 9))
def test_all_layouts_give_the_same_numbers(prefix: int, height: int, width: int, channels: int) -> None:
    torch.manual_seed(0)
    picture = torch.randn(2, channels, height, width, dtype=torch.float64)
    size = (16 * height, 16 * width)
    expected = inject(picture, Feature(0, channels, 'NCHW'), size=size)
    assert not torch.equal(expected, picture)

    nhwc = inject(picture.permute(0, 2, 3, 1), Feature(0, channels, 'NHWC'), size=size)
    torch.testing.assert_close(nhwc.permute(0, 3, 1, 2), expected)

    extra = torch.randn(2, prefix, channels, dtype=torch.float64)
    tokens = torch.cat([extra, picture.flatten(2).transpose(1, 2)], dim=1)
    out = inject(tokens, Feature(0, channels, 'NLC', prefix), size=size)
    assert torch.equal(out[:, :prefix], extra)
    torch.testing.assert_close(out[:, prefix:].transpose(1, 2).unflatten(2, (height, width)), expected)

    shuffle = torch.randperm(height * width)
    order = TokenOrder(torch.argsort(shuffle))
    out = inject(picture.flatten(2).transpose(1, 2)[:, shuffle], Feature(0, channels, 'NLC'), order=order, size=size)
    torch.testing.assert_close(out, expected.flatten(2).transpose(1, 2)[:, shuffle])


def test_only_the_named_tensors_of_an_output_change() -> None:
    first, second = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 6, 2, 2, dtype=torch.float64)
    output = [first, (second, (3, 3)), {'rest': None}]
    changed = inject(output, Feature(1, 6, 'NCHW'))
    assert changed[0] is first
    assert changed[1][1] == (3, 3)
    assert changed[2] == {'rest': None}
    torch.testing.assert_close(changed[1][0], inject(second, Feature(0, 6, 'NCHW')))
    assert output[1][0] is second


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_patches_of_any_order_become_pictures_and_patches_again(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3))
    length = max(h * w for h, w in sizes) + data.draw(st.integers(0, 2))
    coord = torch.zeros(len(sizes), length, 2, dtype=torch.long)
    valid = torch.zeros(len(sizes), length, dtype=torch.bool)
    for i, (height, width) in enumerate(sizes):
        places = data.draw(st.permutations([(r, c) for r in range(height) for c in range(width)]))
        coord[i, : len(places)] = torch.tensor(places)
        valid[i, : len(places)] = True
    tokens = torch.randn(len(sizes), length, 3)
    pictures, mask, index = to_patches(tokens, coord, valid)
    for i, (height, width) in enumerate(sizes):
        assert mask[i].sum() == mask[i, :, :height, :width].sum() == height * width
        assert not pictures[i][:, mask[i, 0] == 0].any()
        for j in range(height * width):
            row, column = coord[i, j]
            assert torch.equal(pictures[i, :, row, column], tokens[i, j])
    assert torch.equal(from_patches(pictures, index, tokens), tokens)


def test_mask_makes_the_outside_of_a_feature_map_padding() -> None:
    block = randomized(PromptBlock(4, PromptConfig()))
    picture = torch.randn(1, 4, 3, 2, dtype=torch.float64)
    canvas = F.pad(picture, (0, 3, 0, 2))
    mask = F.pad(torch.ones(1, 1, 3, 2, dtype=torch.float64), (0, 3, 0, 2))
    torch.testing.assert_close(block(canvas, mask)[..., :3, :2], block(picture))


@pytest.mark.parametrize(
    ('name', 'values'),
    [
        ('rd_ratio', [0, -1, 1025, 10**400, float('nan'), float('inf'), '2', True, None]),
        ('partial_ratio', [0, -0.5, 1.01, float('nan'), '0.5', False]),
        ('kernel_sizes', [(), (2,), (0,), (-3,), (3.0,), (True,), 3, '3', (65,), (1,) * 9]),
        ('norm_layer', ['group', 'none', '', 3, ['batchnorm2d']]),
        ('fusion', ['linear', 'None', None, []]),
        ('act_layer', ['nonsense', 3, None]),
        ('block', [1, None]),
        ('new_head', ['yes', 0]),
    ],
)
def test_config_names_what_is_wrong(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf'^PromptConfig\.{name} must be .*, got .*\.$'):
            PromptConfig(**{name: value})


def test_config_round_trip_through_json() -> None:
    config = PromptConfig(rd_ratio=4, kernel_sizes=(3, 7), norm_layer=None, fusion='depthwise', new_head=False)
    assert PromptConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert PromptConfig(kernel_sizes=[1, 3]).kernel_sizes == (1, 3)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rd_ratio = 1  # type: ignore[misc]
