"""Where a run is, and what its steps computed."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ['Note', 'Progress']


@dataclasses.dataclass
class Progress:
    """Where the run is, and what the epoch has summed up so far: what a checkpoint needs besides weights."""

    epoch: int = 0
    step_in_epoch: int = 0
    updates: int = 0
    seconds: float = 0.0
    # The lines of the metrics file: kept here, it can never be ahead of the weights or behind them.
    lines: list[str] = dataclasses.field(default_factory=list)
    # By `learner/term` the sum and the count of this process.
    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    # By learner its best epoch so far, see `BestEpochs`.
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    # By learner the updates in a row that the gradient scaler left out.
    overflows_in_a_row: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Note:
    """What a step of a learner computed, to be read later, so that the device need not be waited for in every step."""

    step: int
    learner: str
    terms: dict[str, torch.Tensor]
    rows: torch.Tensor

    def values(self) -> list[float]:
        """Return the terms as numbers, in one transfer."""
        values: list[float] = torch.stack([value.float() for value in self.terms.values()]).tolist()
        return values

    def find_non_finite(self, values: Sequence[float], steps: int) -> str | None:
        """Say which of the values is not finite, and where, given the steps of an epoch; `None` if all are."""
        bad = [f'{key} is {value}' for key, value in zip(self.terms, values, strict=True) if not math.isfinite(value)]
        if not bad:
            return None
        rows = ', '.join(map(str, self.rows.tolist()[:16])) + (', ...' if len(self.rows) > 16 else '')
        where = f'at step {self.step + 1} (epoch {self.step // steps + 1}, training rows {rows})'
        return f'{self.learner}: {bad[0]} {where}'
