"""Wide residual networks for 32x32 images.

Source: Zagoruyko and Komodakis, "Wide Residual Networks" (arXiv 1605.07146), table 1; definitions as in RepDistiller
and MDistiller.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d, calculate_drop_path_rates, create_conv2d
from timm.models import generate_default_cfgs, register_model
from timm.models.resnetv2 import DownsampleConv, PreActBasic
from torch import nn

from ._staged import StagedNet, build_cifar_model, cifar_cfg, init_conv_fan_out

__all__ = ['CifarWideResNet']


class CifarWideResNet(StagedNet):
    """Three-stage pre-activation ResNet of depth 6n+4, out of timm's pre-activation blocks.

    timm's `ResNetV2` class itself does not fit: its stem halves the image twice and it expects four stages.
    `drop_rate` is timm's dropout before the classifier, not the dropout inside the blocks that the paper also tries
    (the KD literature sets that to 0).

    Args:
        depth: Number of weighted layers, 6n + 4 for n blocks per stage.
        width: Channels of the three stages relative to 16, 32, 64.
        num_classes: Number of logits; 0 for pooled features.
        in_chans: Image channels.
        global_pool: timm's pooling name.
        drop_rate: Dropout probability before the classifier.
        drop_path_rate: Probability of dropping the last block's branch; it grows linearly from 0 at the first block.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        stem_width = 16
        channels = (16 * width, 32 * width, 64 * width)
        drop_paths = calculate_drop_path_rates(drop_path_rate, [(depth - 4) // 6] * 3, stagewise=True)
        stages = []
        in_chs = stem_width
        for i, (out_chs, stage_drop_paths) in enumerate(zip(channels, drop_paths, strict=True)):
            blocks = []
            for j, drop_path in enumerate(stage_drop_paths):
                blocks.append(
                    PreActBasic(
                        in_chs,
                        out_chs,
                        stride=2 if i > 0 and j == 0 else 1,
                        conv_layer=create_conv2d,
                        norm_layer=BatchNormAct2d,
                        proj_layer=DownsampleConv,
                        drop_path_rate=drop_path,
                        **dd,
                    )
                )
                in_chs = out_chs
            stages.append(nn.Sequential(*blocks))
        super().__init__(
            stem=nn.Conv2d(in_chans, stem_width, kernel_size=3, padding=1, bias=False, **dd),
            stages=stages,
            channels=channels,
            reductions=(1, 2, 4),
            final=BatchNormAct2d(channels[-1], **dd),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        init_conv_fan_out(self)


_cfg = cifar_cfg(pool_size=8, first_conv='stem', classifier='head.fc')

default_cfgs = generate_default_cfgs(
    {
        'cifar_wrn_16_1': _cfg,
        'cifar_wrn_16_2': _cfg,
        'cifar_wrn_40_1': _cfg,
        'cifar_wrn_40_2': _cfg,
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_cifar_model(CifarWideResNet, variant, pretrained, num_levels=3, **kwargs)


@register_model
def cifar_wrn_16_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build WRN-16-1 (16-32-64 channels)."""
    return _create('cifar_wrn_16_1', pretrained, depth=16, width=1, **kwargs)


@register_model
def cifar_wrn_16_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build WRN-16-2 (32-64-128 channels)."""
    return _create('cifar_wrn_16_2', pretrained, depth=16, width=2, **kwargs)


@register_model
def cifar_wrn_40_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build WRN-40-1 (16-32-64 channels)."""
    return _create('cifar_wrn_40_1', pretrained, depth=40, width=1, **kwargs)


@register_model
def cifar_wrn_40_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build WRN-40-2 (32-64-128 channels)."""
    return _create('cifar_wrn_40_2', pretrained, depth=40, width=2, **kwargs)
