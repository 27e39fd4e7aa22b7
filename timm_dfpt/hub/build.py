"""Models from timm's layout: names of its files, and models without memory to check files against."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .files import TensorSpec
from .repo import Source

__all__ = ['BUILD_ERRORS', 'CONFIG', 'WEIGHTS', 'build_meta', 'float_dtype', 'remember_origin', 'specs_of']

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
# What building a model from a wrong config can end in, all over timm's models.
BUILD_ERRORS = (
    AssertionError,
    AttributeError,
    ArithmeticError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def build_meta(create: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """Build a model without memory for its weights.

    Raises:
        ValueError: If it cannot be built; whatever was raised is the cause.
    """
    try:
        with torch.device('meta'):
            return create().to(dtype)
    except BUILD_ERRORS as error:
        raise ValueError(f'No model can be built from this config: {type(error).__name__}: {error}') from error


def specs_of(model: nn.Module) -> dict[str, TensorSpec]:
    """Return shape and dtype of every tensor in a model's state dict."""
    return {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}


def float_dtype(specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """Return the dtype of the first floating-point tensor, float32 where there is none."""
    return next((dtype for _, dtype in specs.values() if dtype.is_floating_point), torch.float32)


def remember_origin(model: Any, source: Source) -> None:
    """Note in the model's `pretrained_cfg`, as timm does, where its weights are from."""
    for key in ('file', 'url', 'hf_hub_id', 'source'):
        model.pretrained_cfg.pop(key, None)
    if source.folder is not None:
        model.pretrained_cfg.update(source='local-dir', file=str(source.folder))
        return
    model.pretrained_cfg.update(source='hf-hub', hf_hub_id=source.pinned)
