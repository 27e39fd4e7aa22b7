"""Computing what lies before the first prompt block once for both paths.

Up to the first tap the original and the prompt path are the same computation. The original pass records what the
outermost modules that finish before the tap return; in the prompt pass these modules return the record instead of
computing it again, and the glue code between them runs as always.
"""
from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .calls import Calls

__all__ = ['PrefixRecorder', 'PrefixReplay', 'plan_prefix']


class PrefixRecorder:
    """Forward hook on a module of the original path: keeps what its first calls return.

    A class, not a closure, so that deepcopy and pickle take it along.

    Args:
        calls: Shared with the prompt path.
        slot: Which module of the prefix this is.
        count: How often the module runs before the tap.
    """

    def __init__(self, calls: Calls, slot: int, count: int) -> None:
        self.calls, self.slot, self.count = calls, slot, count

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Append `output` to the record while the pass is recorded."""
        record = self.calls.here.record
        if record is not None and len(record[self.slot]) < self.count:
            # A container of its own: some models write into the list that a stage returned.
            record[self.slot].append(pytree.tree_map(_same, output))


class PrefixReplay:
    """The `forward` of a module in the prompt path's prefix: returns the record while there is one.

    A module may be used again behind the tap; these later calls find the record empty and compute.

    Args:
        module: The module whose `forward` this is.
        calls: Shared with the original path.
        slot: Which module of the prefix this is.
    """

    def __init__(self, module: nn.Module, calls: Calls, slot: int) -> None:
        self.module, self.calls, self.slot = module, calls, slot

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the recorded output of this call, or compute it."""
        call = self.calls.here.call
        if call is not None and call.record is not None and call.record[self.slot]:
            return call.record[self.slot].pop(0)
        return type(self.module).forward(self.module, *args, **kwargs)


def _same(leaf: Any) -> Any:
    return leaf


@dataclasses.dataclass
class _Call:
    name: str
    parent: _Call | None
    finished: bool = False


def plan_prefix(model: nn.Module, tap: str, x: torch.Tensor) -> list[tuple[str, int]]:
    """Find the outermost modules that finish before the first tap, and how often each runs until then.

    Args:
        model: The backbone, in evaluation.
        tap: Name of the module of the first tap; the last one in the prefix.
        x: An input `[B, C, H, W]` to trace the model with.

    Returns:
        Names and numbers of calls, in the order of the first call. Empty when a replay could go wrong: a module runs
        both by itself and inside another module of the prefix; a module leaves something on itself that may be read
        later; what a module returned is changed in place afterwards.
    """
    calls: list[_Call] = []
    stack: list[_Call] = []
    results: list[torch.Tensor] = []
    versions: list[int] = []
    reached = False
    before = _attributes(model)

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            call = _Call(name, stack[-1] if stack else None)
            stack.append(call)
            if not reached:
                calls.append(call)

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal reached
            call = stack.pop()
            call.finished = not reached
            if call.finished:
                results.extend(t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor))
            if name == tap and not reached:
                reached = True
                versions.extend(t._version for t in results)

        return hook

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave(name)))
    try:
        # Tensors of the inference mode would not count how often they are changed in place.
        with torch.inference_mode(False), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    finished = [call for call in calls if call.finished]
    outermost = [call for call in finished if call.parent is None or not call.parent.finished]
    counts: dict[str, int] = {}
    for call in outermost:
        counts[call.name] = counts.get(call.name, 0) + 1
    nested = any(call.name in counts and call not in outermost for call in finished)
    names = {call.name for call in finished}
    changed = any(before.get(key) is not value for key, value in _attributes(model).items() if key[0] in names)
    overwritten = any(t._version != version for t, version in zip(results, versions, strict=True))
    return [] if nested or changed or overwritten else list(counts.items())


def _attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Return every plain attribute and buffer of every module."""
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in itertools.chain(vars(module).items(), module._buffers.items())
    }
