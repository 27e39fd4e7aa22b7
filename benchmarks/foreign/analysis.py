"""What the records of the study of foreign teachers say: arms, Welch's intervals, costs, what tuning chose."""
from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.foreign.plan import Cell, Plan
from timm_dfpt.reports.intervals import t_quantile

__all__ = ['Study', 'seconds_of', 'welch']

Record = Mapping[str, Any]


def seconds_of(records: Sequence[Record]) -> float:
    """Return the median CPU time of runs, all stages of each together."""
    return float(statistics.median(record['total_cpu_s'] for record in records))


def welch(ones: Sequence[float], others: Sequence[float]) -> dict[str, Any] | None:
    """Compare two independent samples by Welch's method.

    Args:
        ones: At least two values.
        others: At least two values.

    Returns:
        `mean` of the difference, its 95% `interval`, and `n` values of each; `None` with fewer values. Degrees of
        freedom by Welch and Satterthwaite, rounded down, which makes the interval a little too wide.
    """
    if min(len(ones), len(others)) < 2:
        return None
    parts = [statistics.variance(values) / len(values) for values in (ones, others)]
    mean = statistics.fmean(ones) - statistics.fmean(others)
    if not any(parts):
        return {'mean': mean, 'interval': [mean, mean], 'n': (len(ones), len(others))}
    bottom = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (ones, others), strict=True))
    degrees = max(1, math.floor(sum(parts) ** 2 / bottom))
    half = t_quantile(degrees) * math.sqrt(sum(parts))
    return {'mean': mean, 'interval': [mean - half, mean + half], 'n': (len(ones), len(others))}


class Study:
    """The records, in the order of the plan.

    Args:
        plan: What was asked.
        records: What was measured, one mapping per run.

    Raises:
        ValueError: If a run is recorded twice.
    """

    def __init__(self, plan: Plan, records: Sequence[Record]) -> None:
        self.plan, self.records = plan, records
        self._found: dict[tuple[str, str], dict[str, dict[int, Record]]] = {}
        for record in records:
            seeds = self._found.setdefault((record['regime'], record['phase']), {}).setdefault(record['arm'], {})
            if record['seed'] in seeds:
                raise ValueError(f'{Cell(*_key(record))} is recorded twice: keep one of the two lines.')
            seeds[record['seed']] = record

    @property
    def regimes(self) -> list[str]:
        """Names of the regimes with records, in the order of the plan."""
        return [name for name in self.plan.values['regimes'] if any(regime == name for regime, _ in self._found)]

    def arms(self, regime: str, phase: str = 'final') -> dict[str, list[Record]]:
        """Records of a regime by arm in the order of the plan, each by seed."""
        found = self._found.get((regime, phase), {})
        order = [name for name in self.plan.arms(regime, phase) if name in found]
        return {name: [found[name][seed] for seed in sorted(found[name])] for name in order}

    def difference(self, regime: str, arm: str, base: str, key: str = 'student_top1') -> dict[str, Any] | None:
        """Compare two final arms by Welch's method over their seeds."""
        arms = self.arms(regime)
        # No arm trains longer than the most expensive one.
        arm, base = (name if name in arms else name.removesuffix(' =time') for name in (arm, base))
        if arm not in arms or base not in arms:
            return None
        return welch(*([record[key] for record in arms[name] if record[key] is not None] for name in (arm, base)))

    def cost(self, regime: str, arm: str) -> float | None:
        """Cost of an arm relative to the student alone (with a fitted head where it has one): ratio of medians."""
        arms = self.arms(regime)
        alone = self._alone(regime)
        if alone not in arms or arm not in arms:
            return None
        return seconds_of(arms[arm]) / seconds_of(arms[alone])

    def flops(self, regime: str, arm: str) -> float | None:
        """FLOPs of a whole way relative to the student alone; they are counted in one run of fewer epochs each."""
        one, base = self._flops(regime, arm), self._flops(regime, self._alone(regime))
        return one / base if one and base else None

    def _flops(self, regime: str, arm: str) -> float | None:
        counted, trained = self.arms(regime, 'flops').get(arm.removesuffix(' =time')), self.arms(regime).get(arm)
        if not counted or not trained:
            return None
        stages = zip(counted[0]['flops'], counted[0]['epochs'], trained[0]['epochs'], strict=True)
        # A fitted head has no epochs.
        return float(sum(flops if part is None else flops * whole / part for flops, part, whole in stages))

    def _alone(self, regime: str) -> str:
        return 'alone-head' if 'alone-head' in self.arms(regime) else 'alone'

    def primary(self, regime: str) -> list[tuple[str, str]]:
        """The contrasts that were chosen before any final record."""
        return [(arm, base) for arm, base in self.plan.values['regimes'][regime].get('final', {}).get('primary', [])]

    def chosen(self, regime: str) -> dict[str, str]:
        """What tuning chose: by way, the trial with the highest mean on validation images; of equal ones the first."""
        trials = self.arms(regime, 'tune')
        most = max((len(records) for records in trials.values()), default=0)
        best: dict[str, tuple[float, str]] = {}
        for trial, records in trials.items():
            way, value = trial.partition(':')[0], statistics.fmean(record['student_top1'] for record in records)
            if len(records) == most and value > best.get(way, (-math.inf, ''))[0]:
                best[way] = value, trial
        return {way: trial for way, (_, trial) in best.items()}

    def missing(self, regime: str) -> int:
        """Number of final students of the plan that are not recorded."""
        asked = {cell.key for cell in self.plan.cells() if cell.regime == regime and cell.phase == 'final'}
        return len(asked - {_key(record) for record in self.records})


def _key(record: Record) -> tuple[str, str, int, str]:
    return record['regime'], record['arm'], record['seed'], record['phase']
