"""What is known of a backbone: its stages, their features, and what to call it in a message."""
from __future__ import annotations

import dataclasses

from torch import nn

__all__ = ['Feature', 'Stage', 'Tap', 'name_of']


@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature tensor in the output of a stage.

    Args:
        index: Position among the tensors of the module's output (most modules return just one: 0).
        channels: Number of channels `C`.
        layout: `'NCHW'` `[B, C, H, W]`, `'NHWC'` `[B, H, W, C]` or `'NLC'` `[B, L, C]`.
        prefix_tokens: NLC only: leading class or register tokens, which are no part of the picture.
    """

    index: int
    channels: int
    layout: str
    prefix_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Stage:
    """A place where a backbone can be opened.

    Args:
        module: Name of the module whose output is the stage's output.
        reduction: Input pixels per feature pixel along a side.
        features: The feature tensors in that output.
    """

    module: str
    reduction: int
    features: tuple[Feature, ...]


@dataclasses.dataclass(frozen=True)
class Tap:
    """What is known of a stage before the calibration pass.

    Args:
        module: Name of the module.
        channels: Number of channels, where `feature_info` says it.
        reduction: Input pixels per feature pixel along a side, where `feature_info` says it.
        leaves: Which tensors of the output are features; `None` for all that look like it.
    """

    module: str
    channels: int | None = None
    reduction: int | None = None
    leaves: tuple[int, ...] | None = None


def name_of(model: nn.Module) -> str:
    """Return what to call `model` in a message: its timm name where it has one, and its class."""
    name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    return f'{name} ({type(model).__name__})' if name else type(model).__name__
