"""MobileNetV2 of half width for 32x32 images.

Source: Sandler et al., "MobileNetV2" (arXiv 1801.04381), table 2; definition as in RepDistiller and MDistiller.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import nn

from ._staged import build_cifar_model, cifar_cfg, init_conv_fan_out

__all__: list[str] = []

# Differs from timm's MobileNetV2 in that the first block expands (by 1) and the second stage keeps its resolution.
_ARCH_DEF = [
    ['ir_r1_k3_s1_e1_c16'],
    ['ir_r2_k3_s1_e6_c24'],
    ['ir_r3_k3_s2_e6_c32'],
    ['ir_r4_k3_s2_e6_c64'],
    ['ir_r3_k3_s1_e6_c96'],
    ['ir_r3_k3_s2_e6_c160'],
    ['ir_r1_k3_s1_e6_c320'],
]


def _half(channels: int) -> int:
    """Halve without timm's rounding to multiples of 8, which the literature's definition does not do."""
    return channels // 2


def _build(**kwargs: Any) -> EfficientNet:
    model = EfficientNet(block_args=decode_arch_def(_ARCH_DEF), round_chs_fn=_half, **kwargs)
    init_conv_fan_out(model, linear_std=0.01)
    return model


default_cfgs = generate_default_cfgs(
    {
        'cifar_mobilenetv2_050': cifar_cfg(pool_size=2, first_conv='conv_stem', classifier='classifier'),
    }
)


@register_model
def cifar_mobilenetv2_050(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build MobileNetV2 of half width: timm's `EfficientNet` with ReLU and the strides of the CIFAR definition."""
    return build_cifar_model(_build, 'cifar_mobilenetv2_050', pretrained, num_levels=4, **kwargs)
