"""Prompt and fusion blocks: what the prompt path adds between the stages of a frozen teacher.

Source: DFPT-KD, arXiv 2506.18244, section on the prompt-based forward path. `PromptConfig` says of each choice
whether it is the paper's or ours.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d, create_act_layer
from torch import nn

__all__ = ['FusionBlock', 'PartialConv', 'PromptBlock', 'PromptConfig']

_ARRANGEMENTS = ('parallel', 'sequential')
_NORMS = ('batch', 'layer', 'none')
_FUSIONS = ('conv', 'depthwise', 'none')
_MAX_KERNEL_SIZE = 63


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """How prompt blocks `P_i`, fusion blocks `F_i` and the new head `H'` are built.

    The paper gives the shape of the blocks (1x1 convolution, multi-scale partial convolutions each followed by a
    point-wise convolution, 1x1 convolution; fusion by a 1x1 convolution) but, as far as public summaries tell, not the
    numbers. Every default value below is therefore ours.

    Args:
        reduction: Paper's `r1`: the block works on `C / reduction` channels (at least 1). Value ours.
        partial_ratio: Paper's `r2`, in (0, 1]: the share of these channels that a partial convolution convolves. Value
            ours.
        kernel_sizes: Paper's `[k1, k2, k3]`: odd kernel sizes, one partial convolution each. Values ours.
        arrangement: `'parallel'` sums the scales, `'sequential'` chains them. The paper does not say; ours.
        norm_layer: `'batch'`, `'layer'` (over channels) or `'none'`, after the first 1x1 convolution and after the
            scales. Place and kind are ours.
        act_layer: Name of a timm activation, after each norm. Ours.
        fusion: `'conv'` is the paper's 1x1 convolution (C x C weights), `'depthwise'` a scale and shift a channel
            (2 C weights; ours, for teachers where C x C is most of the size), `'none'` no fusion (ablation).
        block: Whether there are prompt blocks at all (`False` is an ablation; then only fusion and head are tuned).
        head: Whether the prompt path has a trainable head of its own (`False` is an ablation: the teacher's head).
        after_last: Also put a block after the last stage. The paper speaks of blocks between stages; ours.

    Raises:
        ValueError: A value is out of its range; the message names it and what is allowed.
    """

    reduction: float = 2.0
    partial_ratio: float = 0.5
    kernel_sizes: tuple[int, ...] = (1, 3, 5)
    arrangement: str = 'parallel'
    norm_layer: str = 'batch'
    act_layer: str = 'relu'
    fusion: str = 'conv'
    block: bool = True
    head: bool = True
    after_last: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.reduction) or not 0 < self.reduction <= 1024:
            raise ValueError(f'PromptConfig.reduction must be a number in (0, 1024], got {self.reduction!r}.')
        if not _is_number(self.partial_ratio) or not 0 < self.partial_ratio <= 1:
            raise ValueError(f'PromptConfig.partial_ratio must be a number in (0, 1], got {self.partial_ratio!r}.')
        kernels = self.kernel_sizes
        if (
            not isinstance(kernels, Sequence)
            or isinstance(kernels, str)
            or not 0 < len(kernels) <= 8
            or not all(type(k) is int and 0 < k <= _MAX_KERNEL_SIZE and k % 2 for k in kernels)
        ):
            raise ValueError(
                f'PromptConfig.kernel_sizes must be 1 to 8 odd integers up to {_MAX_KERNEL_SIZE}, e.g. (1, 3, 5), '
                f'got {kernels!r}.'
            )
        object.__setattr__(self, 'kernel_sizes', tuple(kernels))
        for name, allowed in (('arrangement', _ARRANGEMENTS), ('norm_layer', _NORMS), ('fusion', _FUSIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f'PromptConfig.{name} must be one of {allowed}, got {getattr(self, name)!r}.')
        try:
            act = create_act_layer(self.act_layer) if isinstance(self.act_layer, str) else None
        except (AssertionError, KeyError):
            act = None
        if act is None:
            raise ValueError(
                f"PromptConfig.act_layer must name a timm activation such as 'relu' or 'gelu', got {self.act_layer!r}."
            )
        for name in ('block', 'head', 'after_last'):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f'PromptConfig.{name} must be True or False, got {getattr(self, name)!r}.')

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class PartialConv(nn.Module):
    """Partial convolution: a k x k convolution on the first channels, the rest passes through.

    Source: FasterNet (arXiv 2303.03667), as used in DFPT-KD's prompt block.

    Args:
        channels: Channels of the input.
        kernel_size: Odd kernel size; the spatial size is kept.
        partial_ratio: Share of the channels that is convolved (at least one channel).
    """

    def __init__(self, channels: int, kernel_size: int, partial_ratio: float) -> None:
        super().__init__()
        convolved = max(1, round(channels * partial_ratio))
        self.split = (convolved, channels - convolved)
        self.conv = nn.Conv2d(convolved, convolved, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve the first channels of `x` `[B, C, H, W]` and return `[B, C, H, W]`."""
        if not self.split[1]:
            return self.conv(x)
        convolved, passed = torch.split(x, list(self.split), dim=1)
        return torch.cat([self.conv(convolved), passed], dim=1)


class PromptBlock(nn.Module):
    """Prompt block `P_i`: what the prompt path adds to the features of a stage.

    1x1 convolution C -> C / r1, multi-scale partial convolutions each followed by a 1x1 convolution, 1x1 convolution
    C / r1 -> C (arXiv 2506.18244). The last convolution starts at zero (ours), so that an untrained block adds
    exactly nothing.

    Args:
        channels: Channels `C` of the features.
        config: Shape of the block.
    """

    def __init__(self, channels: int, config: PromptConfig) -> None:
        super().__init__()
        inner = max(1, round(channels / config.reduction))
        bias = config.norm_layer == 'none'
        self.sequential = config.arrangement == 'sequential'
        self.reduce = nn.Conv2d(channels, inner, 1, bias=bias)
        self.norm1 = _create_norm(config.norm_layer, inner)
        self.act1 = create_act_layer(config.act_layer)
        self.scales = nn.ModuleList(
            nn.Sequential(PartialConv(inner, k, config.partial_ratio), nn.Conv2d(inner, inner, 1, bias=bias))
            for k in config.kernel_sizes
        )
        self.norm2 = _create_norm(config.norm_layer, inner)
        self.act2 = create_act_layer(config.act_layer)
        self.expand = nn.Conv2d(inner, channels, 1)
        _zero(self.expand)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Map features `[B, C, H, W]` to what is added to them, `[B, C, H, W]`.

        Args:
            x: Features `[B, C, H, W]`.
            mask: Where the picture has pixels `[B, 1, H, W]`, for pictures of different sizes in a batch: what is
                outside counts as padding.
        """
        x = _masked(self.act1(self.norm1(self.reduce(x))), mask)
        if self.sequential:
            for scale in self.scales:
                x = _masked(scale(x), mask)
        else:
            # Not sum(): its start value 0 would cost one more pass over the tensor.
            y = self.scales[0](x)
            for scale in self.scales[1:]:
                y = y + scale(x)
            x = y
        return self.expand(self.act2(self.norm2(x)))


class FusionBlock(nn.Module):
    """Fusion block `F_i`: a 1x1 convolution over the prompted features (arXiv 2506.18244).

    Written as `x + W x` with `W` zero at the start (ours): a convolution whose weight is initialised to the identity
    is no identity under bfloat16 autocast, this is.

    Args:
        channels: Channels `C` of the features.
        depthwise: A weight a channel instead of C x C (ours).
    """

    def __init__(self, channels: int, depthwise: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, groups=channels if depthwise else 1)
        _zero(self.conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features `[B, C, H, W]` to `[B, C, H, W]`."""
        return x + self.conv(x)


def create_fusion(channels: int, config: PromptConfig) -> nn.Module:
    """Build the fusion that `config` asks for, for features of `channels` channels."""
    if config.fusion == 'none':
        return nn.Identity()
    return FusionBlock(channels, depthwise=config.fusion == 'depthwise')


def _masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x * mask


def _zero(conv: nn.Conv2d) -> None:
    for param in conv.parameters():
        nn.init.zeros_(param)


def _create_norm(name: str, channels: int) -> nn.Module:
    if name == 'batch':
        return nn.BatchNorm2d(channels)
    return LayerNorm2d(channels) if name == 'layer' else nn.Identity()
