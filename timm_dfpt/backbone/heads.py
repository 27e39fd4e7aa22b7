"""Classifiers: another number of classes for a model that has one, a first one for an encoder."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .calibration import calibration_input
from .layouts import find_layout
from .modes import evaluating
from .types import name_of

__all__ = ['ENCODER_HEAD', 'add_head', 'pool_features', 'replace_head', 'scale_head', 'watch_inputs']

ENCODER_HEAD = 'encoder_head'
"""Name of the classifier that an encoder gets which has no place for one."""


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
        scale_head(new, init_scale)
        weight = next(old.parameters())
        model.set_submodule(name, new.to(device=weight.device, dtype=weight.dtype).train(old.training))
    if hasattr(model, 'num_classes'):
        model.num_classes = num_classes  # type: ignore[assignment]


def add_head(
    model: nn.Module, num_classes: int, init_scale: float = 1.0, x: torch.Tensor | None = None
) -> tuple[str, ...]:
    """Add a classifier to a model without one.

    It goes where timm's `reset_classifier(num_classes)` puts it, which in all families of timm keeps every layer that
    has weights; in a few (LeViT, RepViT, SHViT, EfficientViT of MSRA, iFormer; CAFormer and ConvFormer) it brings new
    layers before the classifier as well. Where the model has no such method, or returns no features `[B, D]`, the
    classifier is linear on what it returns: features `[B, D]`, or the mean of its tokens or its map.

    Args:
        model: The encoder; is changed.
        num_classes: Number of classes `K`.
        init_scale: Factor on the initial weights and biases of the classifier; 0: logits of zero.
        x: Images `[B, C, H, W]` that the model takes; by default of the smallest size that it takes.

    Returns:
        Names of the classifier modules.

    Raises:
        ValueError: If the model does not return one tensor of features, or its classifier is not linear.
    """
    x = calibration_input(model) if x is None else x
    with evaluating(model), torch.no_grad():
        output = model(x)
    features = pool_features(model, output)
    place: Any = model
    before = set(model.modules())
    like = next(model.parameters())
    if output is features and hasattr(model, 'reset_classifier') and hasattr(model, 'get_classifier'):
        place.reset_classifier(num_classes)
        names = _classifiers(model)
        if not names:
            raise ValueError(
                f'reset_classifier({num_classes}) of {name_of(model)} does not make a linear classifier: give '
                'num_classes=None and a model that has its own.'
            )
    else:
        names = (ENCODER_HEAD,)
        model.add_module(ENCODER_HEAD, nn.Linear(features.shape[1], num_classes))
        model.register_forward_hook(_HeadBehind())
        place.num_classes = num_classes
    for module in set(model.modules()) - before:
        module.to(device=like.device, dtype=like.dtype).train(model.training)
    for name in names:
        scale_head(model.get_submodule(name), init_scale)
    return names


class _HeadBehind:
    """Forward hook on an encoder: the classifier behind it. A class, so that deepcopy and pickle take it along."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> torch.Tensor:
        """Return logits `[B, K]` for what the encoder returned."""
        return module.get_submodule(ENCODER_HEAD)(pool_features(module, output))


def pool_features(model: nn.Module, output: Any) -> torch.Tensor:
    """Return features `[B, D]` of what an encoder returned: the mean of tokens `[B, L, D]` or of a map.

    Class and register tokens, as far as the model says that it has them, are left out, as in timm's pooling.

    Raises:
        ValueError: If it is not one tensor of features.
    """
    if isinstance(output, torch.Tensor) and output.ndim in (2, 3, 4) and output.is_floating_point():
        if output.ndim == 2:
            return output
        if output.ndim == 3:
            prefix = int(getattr(model, 'num_prefix_tokens', 0) or 0)
            return output[:, prefix if prefix < output.shape[1] else 0 :].mean(dim=1)
        channels: Any = getattr(model, 'num_features', None)
        layout = find_layout(output.shape, channels, getattr(model, 'output_fmt', None))
        return output.mean(dim=(1, 2) if layout == 'NHWC' else (2, 3))
    got = f'a tensor {tuple(output.shape)}' if isinstance(output, torch.Tensor) else f'a {type(output).__name__}'
    raise ValueError(
        f'{name_of(model)} returns {got}. For a head behind it, it must return one tensor of features: [B, D], tokens '
        '[B, L, D] or a map [B, D, H, W]. Wrap a module of your own that does.'
    )


@contextlib.contextmanager
def watch_inputs(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Context that keeps what enters a module, such as the features before a classifier, call by call."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classifier modules of a timm model, as far as it has them."""
    place: Any = model
    declared = (getattr(model, 'pretrained_cfg', None) or {}).get('classifier') or ()
    names = (declared,) if isinstance(declared, str) else tuple(declared)
    found = dict(model.named_modules())
    names = tuple(name for name in names if isinstance(found.get(name), (nn.Linear, nn.Conv2d)))
    if names:
        return names
    head = place.get_classifier()
    return tuple(name for name, module in found.items() if module is head and isinstance(head, (nn.Linear, nn.Conv2d)))


def scale_head(head: nn.Module, factor: float) -> None:
    """Multiply the weights and biases of a classifier; 0: logits of zero."""
    if factor != 1:
        with torch.no_grad():
            for param in head.parameters():
                param.mul_(factor)
