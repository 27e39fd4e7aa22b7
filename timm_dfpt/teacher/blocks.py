"""Prompt and fusion blocks: what the prompt path adds between the stages of a frozen teacher.

Source: DFPT-KD, arXiv 2506.18244, section on the prompt-based forward path. `PromptConfig` says of each choice
whether it is the paper's or ours.
"""
import dataclasses
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from timm.layers import create_act_layer, create_norm_layer
from torch import nn

from ..backbone.checks import check_fields, limited
from .low_rank import LowRank

__all__ = ['FusionBlock', 'PartialConv', 'PromptBlock', 'PromptConfig']

_MAX_KERNEL_SIZE = 63
_MAX_RANK = 4096


def _are_kernel_sizes(sizes: tuple[int, ...]) -> bool:
    return 0 < len(sizes) <= 8 and all(0 < size <= _MAX_KERNEL_SIZE and size % 2 for size in sizes)


def _is_rank(rank: int | None) -> bool:
    return rank is None or 0 < rank <= _MAX_RANK


def _is_act_layer(name: str) -> bool:
    try:
        return create_act_layer(name) is not None
    except (AssertionError, KeyError):
        return False


@strict
@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """How prompt blocks `P_i`, fusion blocks `F_i` and the new head `H'` are built.

    The paper gives the shape of the blocks (1x1 convolution, multi-scale partial convolutions each followed by a
    point-wise convolution, 1x1 convolution; fusion by a 1x1 convolution) but, as far as public summaries say, not the
    numbers, and not whether the scales are summed or chained; here they are summed. Every default value below is ours.

    Args:
        rd_ratio: Paper's `r1`: the block works on `C / rd_ratio` channels (at least 1). Value ours.
        partial_ratio: Paper's `r2`, in (0, 1]: the share of these channels that a partial convolution convolves. Value
            ours.
        kernel_sizes: Paper's `[k1, k2, k3]`: odd kernel sizes, one partial convolution each. Values ours.
        norm_layer: `'batchnorm2d'`, `'layernorm2d'` (over channels) or `None`, after the first 1x1 convolution and
            after the scales. Place and kind are ours.
        act_layer: Name of a timm activation, after each norm. Ours.
        fusion: `'conv'` is the paper's 1x1 convolution (C x C weights), `'depthwise'` a scale and shift per channel
            (2 C weights; ours, for teachers where C x C is most of the size). `'none'` leaves it out (ours).
        fusion_rank: Rank `r` of that convolution beyond the identity, 2 r C weights instead of C x C (ours); `None` for
            the whole.
        block: Whether there are prompt blocks. With `block=False` and `fusion='none'` nothing is done at the stages:
            what is tuned is the head, with `'dfpt+'` the copy of the backbone, and what `norms` says (ours).
        norms: `'own'`: the path has copies of the backbone's norm layers (ours). Their weights are trained; those with
            running statistics, such as BatchNorm, use those of the batch in training, and update their own. With
            `'teacher'` statistics are the teacher's, and so are, with `'dfpt'`, the weights.
        new_head: Whether the prompt path has a trainable head of its own (`False` is an ablation: the teacher's head).
        head_rank: The teacher's head stays frozen and gets a correction of this rank `r` (PEFT's `r`), which for D
            features and K classes has r (D + K) weights instead of the D x K of a copy (ours); `None` for the copy. Not
            for a new head of other classes, which has nothing to correct.

    Raises:
        ValueError: If a value is out of its range or contradicts another; the message names it and what is allowed.
    """

    rd_ratio: float | int = limited('a number in (0, 1024]', lambda r: 0 < r <= 1024, default=2.0)
    partial_ratio: float | int = limited('a number in (0, 1]', lambda r: 0 < r <= 1, default=0.5)
    kernel_sizes: tuple[int, ...] = limited(
        f'1 to 8 odd integers up to {_MAX_KERNEL_SIZE}, e.g. (1, 3, 5)', _are_kernel_sizes, default=(1, 3, 5)
    )
    norm_layer: Literal['batchnorm2d', 'layernorm2d'] | None = limited(
        "'batchnorm2d', 'layernorm2d' or None", default='batchnorm2d'
    )
    act_layer: str = limited("the name of a timm activation such as 'relu' or 'gelu'", _is_act_layer, default='relu')
    fusion: Literal['conv', 'depthwise', 'none'] = 'conv'
    block: bool = True
    norms: Literal['teacher', 'own'] = 'teacher'
    new_head: bool = True
    fusion_rank: int | None = limited(f'None or an integer from 1 to {_MAX_RANK}', _is_rank, default=None)
    head_rank: int | None = limited(f'None or an integer from 1 to {_MAX_RANK}', _is_rank, default=None)

    def __post_init__(self) -> None:
        check_fields(self, 'PromptConfig.')
        if self.fusion_rank is not None and self.fusion != 'conv':
            raise ValueError(
                f"PromptConfig.fusion_rank={self.fusion_rank} is of fusion='conv', not of fusion={self.fusion!r}: "
                'leave one of them out.'
            )
        if self.head_rank is not None and not self.new_head:
            raise ValueError(
                f'PromptConfig.head_rank={self.head_rank} corrects the head, and new_head=False leaves it as it is: '
                'leave one of them out.'
            )

    @property
    def open(self) -> bool:
        """Whether something is done to the features of a stage."""
        return self.block or self.fusion != 'none'

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


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
        inner = max(1, round(channels / config.rd_ratio))
        bias = config.norm_layer is None
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
            mask: Where the feature map has pixels `[B, 1, H, W]`, for images of different sizes in a batch: what is
                outside is padding.
        """
        x = _masked(self.act1(self.norm1(self.reduce(x))), mask)
        # Not sum(): its start value 0 would cost one more pass over the tensor.
        y = self.scales[0](x)
        for scale in self.scales[1:]:
            y = y + scale(x)
        return self.expand(self.act2(self.norm2(y)))


class FusionBlock(nn.Module):
    """Fusion block `F_i`: a 1x1 convolution over the prompted features (arXiv 2506.18244).

    Written as `x + W x` with `W` zero at the start (ours): a convolution whose weight is initialised to the identity
    is not the identity under bfloat16 autocast, this is.

    Args:
        channels: Channels `C` of the features.
        depthwise: One weight per channel instead of C x C (ours).
        rank: Rank of `W`, 2 r C weights instead of C x C (ours); `None` for the whole.

    Raises:
        ValueError: If the rank is so large that it saves nothing.
    """

    def __init__(self, channels: int, depthwise: bool = False, rank: int | None = None) -> None:
        super().__init__()
        self.conv: nn.Module
        if rank is not None:
            self.conv = LowRank(channels, channels, rank, 'fusion_rank')
        else:
            self.conv = nn.Conv2d(channels, channels, 1, groups=channels if depthwise else 1)
            _zero(self.conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features `[B, C, H, W]` to `[B, C, H, W]`."""
        return x + self.conv(x)


def _masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x * mask


def _zero(conv: nn.Module) -> None:
    for param in conv.parameters():
        nn.init.zeros_(param)


def _create_norm(name: str | None, channels: int) -> nn.Module:
    return nn.Identity() if name is None else create_norm_layer(name, channels)
