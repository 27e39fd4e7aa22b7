"""What belongs to one call of a teacher and to no other, whichever thread makes it and whenever it is recomputed."""
from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

__all__ = ['Call', 'Calls', 'Record', 'needs_gradient', 'remembered']

Record = list[list[Any]]
"""For each module of the prefix what its calls returned."""


@dataclasses.dataclass
class Call:
    """One run of the prompt path.

    Args:
        image_size: Height and width of the input, for the grid in which tokens stand.
        patch_coord: Row and column of each patch `[B, L, 2]` where the input is patches (NaFlex), not an image.
        patch_valid: Which patches are not padding `[B, L]`.
        record: What the prefix returned in the original path, if it need not be computed again.
        fired: Injection points that fired, in order.
    """

    image_size: tuple[int, int] = (0, 0)
    patch_coord: torch.Tensor | None = None
    patch_valid: torch.Tensor | None = None
    record: Record | None = None
    fired: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, x: Any, record: Record | None) -> Call:
        """Note how the image tokens of the input `x` lie: `[B, C, H, W]`, or a NaFlex batch (dict of patches)."""
        if isinstance(x, torch.Tensor):
            return cls(image_size=(x.shape[-2], x.shape[-1]), record=record)
        if isinstance(x, Mapping):
            return cls(patch_coord=x.get('patch_coord'), patch_valid=x.get('patch_valid'), record=record)
        return cls(record=record)


class _Thread:
    """What runs in one thread: the original path that is recorded, the call, and the call that is recomputed.

    While a layer is computed again, its running statistics are kept here.
    """

    def __init__(self) -> None:
        self.record: Record | None = None
        self.call: Call | None = None
        self.recomputed: Call | None = None
        self.statistics: dict[str, torch.Tensor | None] = {}


class Calls(threading.local):
    """Where the hooks of one teacher find the call that they run in: for each thread its own place.

    Attributes are read from `here`, a plain object, because a compiler can follow writes to it but not to
    `threading.local`.
    """

    def __init__(self) -> None:
        self.here = _Thread()

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        # deepcopy and pickle: a copy of a teacher runs nothing yet.
        return Calls, ()


class remembered(saved_tensors_hooks):
    """Context in which tensors saved for the backward pass remember the call that saved them.

    Gradient checkpointing reads the inputs of a layer that it saved, and then computes the layer again: at any time and
    in any thread. The call to which this belongs is by then the one whose input was read last.
    """

    def __init__(self, calls: Calls, call: Call) -> None:
        def unpack(saved: torch.Tensor) -> torch.Tensor:
            calls.here.recomputed = call
            return saved

        super().__init__(lambda tensor: tensor, unpack)


def needs_gradient(x: Any) -> bool:
    """Say whether a gradient is asked for an input, or a part of it."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(x))
