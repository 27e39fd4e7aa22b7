"""ShuffleNet V1 and V2 for 32x32 images. timm has neither.

Sources: Zhang et al., "ShuffleNet" (arXiv 1707.01083), figure 2 and table 1 (g = 3); Ma et al., "ShuffleNet V2"
(arXiv 1807.11164), figure 3 and table 5 (1x); definitions (1x1 stem of stride 1, no max pooling, an activation after
the depth-wise convolution of V1) as in RepDistiller and MDistiller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ConvNormAct, DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ._staged import StagedNet, build_cifar_model, cifar_cfg

__all__ = ['CifarShuffleNetV1', 'CifarShuffleNetV2']

_STEM_CHANNELS = 24


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` groups (ShuffleNet, arXiv 1707.01083, section 3.1).

    Args:
        x: Features, `[B, C, H, W]`, C divisible by `groups`.
        groups: Number of groups the channels come from.

    Returns:
        The same features, `[B, C, H, W]`: channel j of group i moves to position j * groups + i.
    """
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnitV1(nn.Module):
    """Grouped 1x1, shuffle, depth-wise 3x3 and grouped 1x1 convolution around an identity or pooled shortcut.

    Args:
        in_chs: Input channels.
        out_chs: Output channels; with stride 2 they include the input's own, which are pooled and concatenated.
        stride: 1 to add the shortcut, 2 to halve the resolution.
        groups: Groups of the 1x1 convolutions.
        in_groups: Groups of the first 1x1 convolution.
        drop_path_rate: Probability of dropping the branch of a unit of stride 1 for a training image.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        groups: int,
        in_groups: int,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.stride = stride
        self.in_groups = in_groups
        branch_chs = out_chs - in_chs if stride == 2 else out_chs
        mid_chs = branch_chs // 4
        self.conv1 = ConvNormAct(in_chs, mid_chs, 1, groups=in_groups, **dd)
        self.conv2 = ConvNormAct(mid_chs, mid_chs, 3, stride=stride, groups=mid_chs, **dd)
        self.conv3 = ConvNormAct(mid_chs, branch_chs, 1, groups=groups, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_chs, H, W]` to `[B, out_chs, H / stride, W / stride]`."""
        branch = channel_shuffle(self.conv1(x), self.in_groups)
        branch = self.conv3(self.conv2(branch))
        if self.stride == 2:
            x = torch.cat([branch, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        else:
            x = self.drop_path(branch) + x
        return F.relu(x)


class ShuffleUnitV2(nn.Module):
    """Two branches that are concatenated and shuffled; with stride 1 the left one is half of the channels, untouched.

    Args:
        in_chs: Input channels.
        out_chs: Output channels; with stride 1 they must equal `in_chs`.
        stride: 1, or 2 to halve the resolution.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        half = out_chs // 2
        right_in_chs = half
        self.left: nn.Module | None = None
        if stride == 2:
            right_in_chs = in_chs
            self.left = nn.Sequential(
                ConvNormAct(in_chs, in_chs, 3, stride=stride, groups=in_chs, apply_act=False, **dd),
                ConvNormAct(in_chs, half, 1, **dd),
            )
        self.right = nn.Sequential(
            ConvNormAct(right_in_chs, half, 1, **dd),
            ConvNormAct(half, half, 3, stride=stride, groups=half, apply_act=False, **dd),
            ConvNormAct(half, half, 1, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_chs, H, W]` to `[B, out_chs, H / stride, W / stride]`."""
        if self.left is None:
            left, right = x.chunk(2, dim=1)
        else:
            left, right = self.left(x), x
        return channel_shuffle(torch.cat([left, self.right(right)], dim=1), 2)


class CifarShuffleNetV1(StagedNet):
    """Three-stage ShuffleNet V1.

    Args:
        channels: Output channels of the stages.
        depths: Number of units in each stage.
        groups: Groups of the 1x1 convolutions.
        num_classes: Number of logits; 0 for pooled features.
        in_chans: Image channels.
        global_pool: timm's pooling name.
        drop_rate: Dropout probability before the classifier.
        drop_path_rate: Probability of dropping the last unit's branch; it grows linearly from 0 at the first unit.
            Units that halve the resolution have no identity to fall back on and drop nothing.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        channels: Sequence[int] = (240, 480, 960),
        depths: Sequence[int] = (4, 8, 4),
        groups: int = 3,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        stages = []
        in_chs = _STEM_CHANNELS
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, (out_chs, stage_drop_paths) in enumerate(zip(channels, drop_paths, strict=True)):
            units = []
            for j, drop_path in enumerate(stage_drop_paths):
                units.append(
                    ShuffleUnitV1(
                        in_chs,
                        out_chs,
                        stride=2 if j == 0 else 1,
                        groups=groups,
                        # The stem's few channels are not grouped (section 3.2 of the paper).
                        in_groups=1 if i == j == 0 else groups,
                        drop_path_rate=drop_path,
                        **dd,
                    )
                )
                in_chs = out_chs
            stages.append(nn.Sequential(*units))
        super().__init__(
            stem=ConvNormAct(in_chans, _STEM_CHANNELS, 1, **dd),
            stages=stages,
            channels=channels,
            reductions=(2, 4, 8),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


class CifarShuffleNetV2(StagedNet):
    """Three-stage ShuffleNet V2 with a last 1x1 convolution. No unit adds a shortcut, so there is no `drop_path_rate`.

    Args:
        channels: Output channels of the stages.
        depths: Number of units in each stage.
        num_features: Output channels of the last convolution.
        num_classes: Number of logits; 0 for pooled features.
        in_chans: Image channels.
        global_pool: timm's pooling name.
        drop_rate: Dropout probability before the classifier.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        channels: Sequence[int] = (116, 232, 464),
        depths: Sequence[int] = (4, 8, 4),
        num_features: int = 1024,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        stages = []
        in_chs = _STEM_CHANNELS
        for depth, out_chs in zip(depths, channels, strict=True):
            units = [ShuffleUnitV2(in_chs, out_chs, stride=2, **dd)]
            units += [ShuffleUnitV2(out_chs, out_chs, stride=1, **dd) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*units))
            in_chs = out_chs
        super().__init__(
            stem=ConvNormAct(in_chans, _STEM_CHANNELS, 1, **dd),
            stages=stages,
            channels=channels,
            reductions=(2, 4, 8),
            final=ConvNormAct(in_chs, num_features, 1, **dd),
            num_features=num_features,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


_cfg = cifar_cfg(pool_size=4, first_conv='stem.conv', classifier='head.fc')

default_cfgs = generate_default_cfgs(
    {
        'cifar_shufflenetv1': _cfg,
        'cifar_shufflenetv2': _cfg,
    }
)


@register_model
def cifar_shufflenetv1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ShuffleNet V1 with 3 groups (240-480-960 channels)."""
    return build_cifar_model(CifarShuffleNetV1, 'cifar_shufflenetv1', pretrained, num_levels=3, **kwargs)


@register_model
def cifar_shufflenetv2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ShuffleNet V2 of width 1x (116-232-464 channels)."""
    return build_cifar_model(CifarShuffleNetV2, 'cifar_shufflenetv2', pretrained, num_levels=3, **kwargs)
