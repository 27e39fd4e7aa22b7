"""VGG with batch normalisation and a single linear layer, for 32x32 images.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks" (arXiv 1409.1556), table 1; definitions (no hidden
fully connected layers, three poolings, VGG-8) as in RepDistiller and MDistiller.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import ConvNormAct
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ._staged import StagedNet, build_cifar_model, cifar_cfg, init_conv_fan_out

__all__ = ['CifarVGG']

_CHANNELS = (64, 128, 256, 512, 512)


class CifarVGG(StagedNet):
    """Five-stage VGG whose global pooling feeds the classifier directly.

    timm's `VGG` class does not fit: two fully connected layers of 4096 always precede its classifier, and it refuses
    gradient checkpointing. At a height of 64 pixels the literature's code pools once more, before the last stage; this
    network is the same at every image size. Images below 8x8 pixels are too small.

    Args:
        depths: Number of convolutions in each of the five stages.
        num_classes: Number of logits; 0 for pooled features.
        in_chans: Image channels.
        global_pool: timm's pooling name.
        drop_rate: Dropout probability before the classifier.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int, int],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        reductions = (1, 2, 4, 8, 8)
        stages = []
        in_chs, in_reduction = in_chans, 1
        for depth, out_chs, reduction in zip(depths, _CHANNELS, reductions, strict=True):
            layers: list[nn.Module] = []
            if reduction > in_reduction:
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            for _ in range(depth):
                layers.append(ConvNormAct(in_chs, out_chs, 3, bias=True, device=device, dtype=dtype))
                in_chs = out_chs
            in_reduction = reduction
            stages.append(nn.Sequential(*layers))
        super().__init__(
            stem=nn.Identity(),
            stages=stages,
            channels=_CHANNELS,
            reductions=reductions,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            device=device,
            dtype=dtype,
        )
        init_conv_fan_out(self, linear_std=0.01)


_cfg = cifar_cfg(pool_size=4, first_conv='stages.0.0.conv', classifier='head.fc')

default_cfgs = generate_default_cfgs(
    {
        'cifar_vgg8': _cfg,
        'cifar_vgg11': _cfg,
        'cifar_vgg13': _cfg,
        'cifar_vgg16': _cfg,
        'cifar_vgg19': _cfg,
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_cifar_model(CifarVGG, variant, pretrained, num_levels=5, **kwargs)


@register_model
def cifar_vgg8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build VGG-8 with batch normalisation (one convolution per stage)."""
    return _create('cifar_vgg8', pretrained, depths=(1, 1, 1, 1, 1), **kwargs)


@register_model
def cifar_vgg11(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build VGG-11 with batch normalisation (configuration A)."""
    return _create('cifar_vgg11', pretrained, depths=(1, 1, 2, 2, 2), **kwargs)


@register_model
def cifar_vgg13(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build VGG-13 with batch normalisation (configuration B)."""
    return _create('cifar_vgg13', pretrained, depths=(2, 2, 2, 2, 2), **kwargs)


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build VGG-16 with batch normalisation (configuration D)."""
    return _create('cifar_vgg16', pretrained, depths=(2, 2, 3, 3, 3), **kwargs)


@register_model
def cifar_vgg19(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build VGG-19 with batch normalisation (configuration E)."""
    return _create('cifar_vgg19', pretrained, depths=(2, 2, 4, 4, 4), **kwargs)
