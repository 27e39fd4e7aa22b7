"""Classifiers: another number of classes for a model that has one, a first one for an encoder."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .types import name_of

__all__ = ['replace_head']


def replace_head(model: nn.Module, names: Sequence[str], num_classes: int, init_scale: float = 1.0) -> None:
    """Give each classifier module of a model new weights for another number of classes.

    Not by timm's `reset_classifier`, which in some families also renews norms before the classifier.

    Args:
        model: The model; is changed.
        names: Names of its classifier modules.
        num_classes: Number of classes `K`.
        init_scale: Factor on PyTorch's initial weights and biases, as timm's `--head-init-scale`; 0: logits of zero.

    Raises:
        ValueError: If a classifier is neither linear nor a 1x1 convolution.
    """
    for name in names:
        old = model.get_submodule(name)
        new: nn.Module
        if isinstance(old, nn.Linear):
            new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
        elif isinstance(old, nn.Conv2d) and old.kernel_size == (1, 1):
            new = nn.Conv2d(old.in_channels, num_classes, 1, bias=old.bias is not None)
        else:
            raise ValueError(
                f'num_classes={num_classes} needs a new head, but {name!r} of {name_of(model)} is a '
                f'{type(old).__name__}, which cannot be rebuilt for another number of classes. Leave num_classes=None.'
            )
        _scale(new, init_scale)
        weight = next(old.parameters())
        model.set_submodule(name, new.to(device=weight.device, dtype=weight.dtype))
    if hasattr(model, 'num_classes'):
        model.num_classes = num_classes  # type: ignore[assignment]


def _scale(head: nn.Module, init_scale: float) -> None:
    if init_scale != 1:
        with torch.no_grad():
            for param in head.parameters():
                param.mul_(init_scale)
