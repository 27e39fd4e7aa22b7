"""What is known of a backbone: its stages, their features, and what to call it in a message."""
import dataclasses
import re
from typing import Literal

from huggingface_hub.dataclasses import strict
from torch import nn

from .checks import limited

__all__ = ['Feature', 'Layout', 'Stage', 'Tap', 'is_module_name', 'name_of']

Layout = Literal['NCHW', 'NHWC', 'NLC']
"""How a feature tensor lies in memory: `[B, C, H, W]`, `[B, H, W, C]` or `[B, L, C]`."""

_MODULE = re.compile(r'\w+(\.\w+)*')
_MAX_CHANNELS = 2**17


def is_module_name(value: str) -> bool:
    """Say whether `value` could be the name of a submodule, such as `'layer1.2'`."""
    return len(value) <= 200 and _MODULE.fullmatch(value) is not None


@strict
@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature tensor in the output of a stage. Ranges are those of what is read from a file.

    Args:
        index: Position among the tensors of the module's output (most modules return just one: 0).
        channels: Number of channels `C`.
        layout: `'NCHW'` `[B, C, H, W]`, `'NHWC'` `[B, H, W, C]` or `'NLC'` `[B, L, C]`.
        prefix_tokens: NLC only: leading class or register tokens, which have no spatial position.
    """

    index: int = limited('0 to 63', lambda n: 0 <= n <= 63)
    channels: int = limited(f'1 to {_MAX_CHANNELS}', lambda n: 1 <= n <= _MAX_CHANNELS)
    layout: Layout = limited("one of ('NCHW', 'NHWC', 'NLC')")
    prefix_tokens: int = limited('0 to 4096', lambda n: 0 <= n <= 4096, default=0)


@strict
@dataclasses.dataclass(frozen=True)
class Stage:
    """A place where a backbone can be opened. Ranges are those of what is read from a file.

    Args:
        module: Name of the module whose output is the stage's output.
        reduction: Input pixels per feature pixel along a side.
        features: The feature tensors in that output.
    """

    module: str = limited('a module name such as "layer1.2"', is_module_name)
    reduction: int = limited('1 to 4096', lambda n: 1 <= n <= 4096)
    features: tuple[Feature, ...] = limited('1 to 16 features', lambda found: 0 < len(found) <= 16)


@dataclasses.dataclass(frozen=True)
class Tap:
    """What is known of a stage before the calibration pass.

    Args:
        module: Name of the module.
        channels: Number of channels, where `feature_info` says it.
        reduction: Input pixels per feature pixel along a side, where `feature_info` says it.
        leaves: Which tensors of the output are features; `None` for all that could be.
    """

    module: str
    channels: int | None = None
    reduction: int | None = None
    leaves: tuple[int, ...] | None = None


def name_of(model: nn.Module) -> str:
    """Return what to call `model` in a message: its timm name where it has one, and its class."""
    name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    return f'{name} ({type(model).__name__})' if name else type(model).__name__
