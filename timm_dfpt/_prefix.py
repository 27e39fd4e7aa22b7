"""Computing what lies before the first prompt block once for both paths.

Up to the first tap the original and the prompt path are the same computation. The original pass records what the
outermost modules that finish before the tap return; in the prompt pass these modules return the record instead of
computing it again, and the glue code between them runs as always.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

__all__ = ['PathState', 'PrefixRecorder', 'PrefixReplay', 'plan_prefix']


@dataclasses.dataclass
class PathState:
    """What the hooks of one teacher share during a forward pass.

    Args:
        image_size: Height and width of the input, for the grid in which tokens stand.
        fired: Injection points that fired in the current prompt pass, in order.
        recording: The original pass that is running records its prefix.
        replaying: The prompt pass that is running takes its prefix from the record.
        outputs: For each module of the prefix what its calls returned.
    """

    image_size: tuple[int, int] = (0, 0)
    fired: list[int] = dataclasses.field(default_factory=list)
    recording: bool = False
    replaying: bool = False
    outputs: list[list[Any]] = dataclasses.field(default_factory=list)

    def clear(self) -> None:
        """Forget the record."""
        self.recording = self.replaying = False
        for calls in self.outputs:
            calls.clear()


class PrefixRecorder:
    """Forward hook on a module of the original path: keeps what its first calls return.

    A class and no closure, so that deepcopy and pickle take the state along.

    Args:
        state: Shared with the prompt path.
        slot: Which module of the prefix this is.
        calls: How often the module runs before the tap.
    """

    def __init__(self, state: PathState, slot: int, calls: int) -> None:
        self.state, self.slot, self.calls = state, slot, calls

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Append `output` to the record while the pass is recorded."""
        outputs = self.state.outputs[self.slot]
        if self.state.recording and len(outputs) < self.calls:
            outputs.append(output)


class PrefixReplay:
    """The `forward` of a module in the prompt path's prefix: returns the record while there is one.

    A module may be used again behind the tap; these later calls find the record empty and compute.

    Args:
        module: The module whose `forward` this is.
        state: Shared with the original path.
        slot: Which module of the prefix this is.
    """

    def __init__(self, module: nn.Module, state: PathState, slot: int) -> None:
        self.module, self.state, self.slot = module, state, slot

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the recorded output of this call, or compute it."""
        outputs = self.state.outputs[self.slot]
        if self.state.replaying and outputs:
            return outputs.pop(0)
        return type(self.module).forward(self.module, *args, **kwargs)


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
        Names and numbers of calls, in the order of the first call. Empty when a module runs both by itself and inside
        another module of the prefix, which a replay cannot tell apart.
    """
    calls: list[_Call] = []
    stack: list[_Call] = []
    reached = False

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
            reached = reached or name == tap

        return hook

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave(name)))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    finished = [call for call in calls if call.finished]
    outermost = [call for call in finished if call.parent is None or not call.parent.finished]
    counts: dict[str, int] = {}
    for call in outermost:
        counts[call.name] = counts.get(call.name, 0) + 1
    if any(call.name in counts and call not in outermost for call in finished):
        return []
    return list(counts.items())
