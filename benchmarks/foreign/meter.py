"""What a way costs."""
from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from timm_dfpt.utils.flops import flop_counter

__all__ = ['Meter']


@dataclasses.dataclass
class Meter:
    """What all of the blocks cost that it measured.

    Args:
        counting: Count FLOPs, which makes everything slower, so that the time then says nothing.
        seconds: CPU time of this process and its children.
        flops: Two a multiply-accumulate of convolutions and matrix products, forward and backward.
    """

    counting: bool = False
    seconds: float = 0.0
    flops: int = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Measure a block."""
        before = sum(os.times()[:4])
        counter = flop_counter() if self.counting else None
        try:
            with counter or contextlib.nullcontext():
                yield
        finally:
            self.seconds += sum(os.times()[:4]) - before
            self.flops += counter.get_total_flops() if counter else 0
