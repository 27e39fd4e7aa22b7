"""Fitted heads on disk: which tensors they are, and what the published model below them is."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..backbone.input_size import published_state
from ..teacher.head_record import FittedHead, fitted_head_of
from .base import fingerprint, hash_tensors
from .config import Fingerprint

__all__ = [
    'describe_head', 'describe_precision', 'head_of_record', 'head_tensors', 'published_fingerprint', 'without_head',
]  # fmt: skip

_PREFIX = 'fitted_head.'


def head_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's fitted head by the names under which a prompt path keeps them."""
    head = fitted_head_of(model)
    return {f'{_PREFIX}{name}': tensor for name, tensor in head.tensors.items()} if head is not None else {}


def without_head(found: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split what a file holds into the prompt path's and the fitted head's, which gets its own names again."""
    path = {name: value for name, value in found.items() if not name.startswith(_PREFIX)}
    head = {name.removeprefix(_PREFIX): value for name, value in found.items() if name.startswith(_PREFIX)}
    return path, head


def head_of_record(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> FittedHead:
    """Return the head that a record describes.

    Raises:
        ValueError: If the record is not of a head, or there are no tensors of it.
    """
    if not tensors:
        raise ValueError('fitted_head is recorded, but its weights are missing.')
    return FittedHead.from_facts(facts, tensors)


def published_fingerprint(model: nn.Module) -> Fingerprint:
    """Return the fingerprint of the published model, where a model has another head."""
    head = fitted_head_of(model)
    if head is None:
        return fingerprint(model)
    state = published_state(model)
    like = next(iter(model.parameters()))
    kept = {name: tensor for name, tensor in state.items() if name not in head.tensors}
    published = {
        name: tensor.to(like.dtype) if tensor.is_floating_point() else tensor for name, tensor in head.published.items()
    }
    if like.device.type == 'meta':
        published = {name: tensor.to('meta') for name, tensor in published.items()}
    ours = dict(model.named_parameters())
    count = sum(state.get(name, param).numel() for name, param in ours.items() if name not in head.tensors)
    count += sum(tensor.numel() for tensor in published.values())
    shapes, weights = hash_tensors({**kept, **published})
    dtype: Any = str(like.dtype).removeprefix('torch.')
    return Fingerprint(dtype, count, shapes, weights)


def describe_head(head: Mapping[str, Any] | None) -> str | None:
    """Return in words how a teacher got a head for these classes; `None` for its published one."""
    if head is None:
        return None
    if head.get('how') == 'reordered':
        return 'its own, with the classes in the order of the data'
    images, accuracy = head.get('images'), head.get('accuracy')
    known = [f'on {images:,} training images'] if isinstance(images, int) else []
    known += [f'{accuracy:.2f}% top-1 on images left out'] if isinstance(accuracy, (int, float)) else []
    return ', '.join(['fitted to its features by ridge regression', *known])


def describe_precision(facts: Mapping[str, Any] | None) -> str | None:
    """Say in words how far a teacher in half precision is from that in float32.

    Args:
        facts: `dtype`, `agreement` (the same top-1, in percent), `kl` (nats) and `images`; `None` for float32.
    """
    if not facts:
        return None
    return (
        f'{facts["dtype"]}, its head in float32: the same top-1 as in float32 on {facts["agreement"]:.2f}% of '
        f'{facts["images"]} validation images, KL {facts["kl"]:.2g} nats'
    )
