"""ResNets for 32x32 images: the three-stage 6n+2 family, and the four-stage ImageNet layouts with a small stem.

Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section 4.2 for the 6n+2 family;
definitions (1x1 convolution on shortcuts that change shape, "x4" widths) as in RepDistiller and MDistiller.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import ConvNormAct
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, make_blocks
from torch import nn

from ._staged import StagedNet, build_cifar_model, cifar_cfg, init_conv_fan_out

__all__ = ['CifarResNet', 'CifarStemResNet']


class CifarResNet(StagedNet):
    """Three-stage ResNet of depth 6n+2, out of timm's ResNet stages.

    timm's `ResNet` class itself does not fit: its stem width is fixed at 64 and its forward passes name four stages.

    Args:
        depth: Number of weighted layers, 6n + 2 for n blocks per stage.
        width: Channels of the three stages relative to 16, 32, 64.
        stem_width: Output channels of the stem.
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
        width: int = 1,
        stem_width: int = 16,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        channels = (16 * width, 32 * width, 64 * width)
        stages, _ = make_blocks(
            (BasicBlock,) * 3,
            channels,
            ((depth - 2) // 6,) * 3,
            inplanes=stem_width,
            norm_layer=nn.BatchNorm2d,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )
        super().__init__(
            stem=ConvNormAct(in_chans, stem_width, 3, device=device, dtype=dtype),
            stages=[stage for _, stage in stages],
            channels=channels,
            reductions=(1, 2, 4),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            device=device,
            dtype=dtype,
        )
        init_conv_fan_out(self)


class CifarStemResNet(ResNet):
    """timm's `ResNet` with the CIFAR stem: one 3x3 convolution of stride 1 and no max pooling.

    Everything else is timm's; residual branches start as RepDistiller's do, with no zeroed norm.

    Args:
        block: timm's residual block class.
        layers: Number of blocks in each of the four stages.
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
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            block,
            layers,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            zero_init_last=False,
            device=device,
            dtype=dtype,
        )
        self.conv1 = nn.Conv2d(in_chans, 64, kernel_size=3, padding=1, bias=False, device=device, dtype=dtype)
        init_conv_fan_out(self.conv1)
        self.maxpool = nn.Identity()
        for info in self.feature_info:
            # timm counts the two halvings of its own stem: 2 after the convolution, 4 after the pooling.
            info['reduction'] = max(1, info['reduction'] // 4)


_staged_cfg = cifar_cfg(pool_size=8, first_conv='stem.conv', classifier='head.fc')
_timm_cfg = cifar_cfg(pool_size=4, first_conv='conv1', classifier='fc')

default_cfgs = generate_default_cfgs(
    {
        'cifar_resnet8': _staged_cfg,
        'cifar_resnet14': _staged_cfg,
        'cifar_resnet20': _staged_cfg,
        'cifar_resnet32': _staged_cfg,
        'cifar_resnet44': _staged_cfg,
        'cifar_resnet56': _staged_cfg,
        'cifar_resnet110': _staged_cfg,
        'cifar_resnet8x4': _staged_cfg,
        'cifar_resnet32x4': _staged_cfg,
        'cifar_resnet18': _timm_cfg,
        'cifar_resnet50': _timm_cfg,
    }
)


def _create_staged(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_cifar_model(CifarResNet, variant, pretrained, num_levels=3, **kwargs)


def _create_timm(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    # timm's defaults for feature extraction are those of its own ResNet.
    return build_model_with_cfg(CifarStemResNet, variant, pretrained, **kwargs)


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ResNet-8 for CIFAR (16-16-32-64 channels)."""
    return _create_staged('cifar_resnet8', pretrained, depth=8, **kwargs)


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ResNet-14 for CIFAR (16-16-32-64 channels)."""
    return _create_staged('cifar_resnet14', pretrained, depth=14, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ResNet-20 for CIFAR (16-16-32-64 channels)."""
    return _create_staged('cifar_resnet20', pretrained, depth=20, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ResNet-32 for CIFAR (16-16-32-64 channels)."""
    return _create_staged('cifar_resnet32', pretrained, depth=32, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ResNet-44 for CIFAR (16-16-32-64 channels)."""
    return _create_staged('cifar_resnet44', pretrained, depth=44, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ResNet-56 for CIFAR (16-16-32-64 channels)."""
    return _create_staged('cifar_resnet56', pretrained, depth=56, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ResNet-110 for CIFAR (16-16-32-64 channels)."""
    return _create_staged('cifar_resnet110', pretrained, depth=110, **kwargs)


@register_model
def cifar_resnet8x4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ResNet-8 x4 for CIFAR (32-64-128-256 channels)."""
    return _create_staged('cifar_resnet8x4', pretrained, depth=8, width=4, stem_width=32, **kwargs)


@register_model
def cifar_resnet32x4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ResNet-32 x4 for CIFAR (32-64-128-256 channels)."""
    return _create_staged('cifar_resnet32x4', pretrained, depth=32, width=4, stem_width=32, **kwargs)


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build timm's ResNet-18 with the CIFAR stem."""
    return _create_timm('cifar_resnet18', pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **kwargs)


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build timm's ResNet-50 with the CIFAR stem."""
    return _create_timm('cifar_resnet50', pretrained, block=Bottleneck, layers=(3, 4, 6, 3), **kwargs)
