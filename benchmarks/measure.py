"""What a step costs: counted FLOPs, bytes of tensors alive, and process CPU time."""
from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from timm_dfpt.utils.flops import flop_counter

from .spread import spread

__all__ = ['PeakMemory', 'count_flops', 'interleaved', 'saved_bytes', 'spread']


def count_flops(run: Callable[[], Any]) -> int:
    """Return the FLOPs of matrix products and convolutions, backward included."""
    with flop_counter() as counter:
        run()
    return counter.get_total_flops()


class PeakMemory(TorchDispatchMode):
    """Counter of the bytes of all tensors made inside the context, and the most that were alive at once.

    Counted by storage, so views cost nothing. Scratch memory within an operator is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != 'meta':
                self._follow(leaf.untyped_storage(), old)
        return out

    def _follow(self, storage: torch.UntypedStorage, old: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in old:
            return
        self._known.add(key)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.alive -= nbytes


def saved_bytes(run: Callable[[], Any], ignored: Iterator[torch.Tensor]) -> int:
    """Return the bytes that autograd keeps for the backward of `run`, each storage once.

    Args:
        run: The forward.
        ignored: Tensors that exist anyway: weights, buffers, inputs.
    """
    known = {t.untyped_storage()._cdata for t in ignored}
    # Kept alive, so that no address is given out twice.
    found: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()
    total = sum(storage.nbytes() for storage in found.values())
    del kept
    return total


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Time functions in turn, each round in another order.

    Args:
        runs: What to time.
        rounds: How often each is timed.
        warmup: Rounds before that.

    Returns:
        Seconds of CPU time of this process by name, one a round. With one thread this is the time the work took,
        whatever else the machine was doing, up to what others do to caches and clock.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for turn in range(-warmup, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.process_time()
            runs[name]()
            if turn >= 0:
                seconds[name].append(time.process_time() - start)
    return seconds
