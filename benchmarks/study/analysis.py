"""What the records of the study say: arms by regime, paired differences, what tuning chose."""
from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.plan import Cell, Plan
from timm_dfpt.reports.intervals import summarise

__all__ = ['CONTRASTS', 'DUAL', 'TITLES', 'Study', 'options_text', 'unlike']

Record = Mapping[str, Any]

DUAL = ('dfpt', 'dfpt+')
# Roles: arms of these names are what the question is about. All others are only listed.
TITLES = {'scratch': 'scratch', 'kd': 'KD', 'dfpt': 'DFPT-KD', 'dfpt+': 'DFPT-KD+'}
CONTRASTS = (('dfpt', 'kd'), ('dfpt+', 'dfpt'), ('dfpt+', 'kd'))
# What makes two regimes train the same student under the same teacher, from a seed on the same batches.
_SETUP = ('data', 'teacher', 'student', 'epochs', 'options')


class Study:
    """The records, in the order of the plan.

    Args:
        plan: What was asked; it gives the order and what regimes have in common, no numbers.
        records: What was measured, one mapping per run.

    Raises:
        ValueError: If a run is recorded twice.
    """

    def __init__(self, plan: Plan, records: Sequence[Record]) -> None:
        self.plan, self.records = plan, records
        self._arms: dict[tuple[str, str], dict[str, dict[int, Record]]] = {}
        order = {cell.key: i for i, cell in enumerate(plan.cells())}
        for record in sorted(records, key=lambda r: (order.get(_cell(r).key, len(order)), r['seed'])):
            arms = self._arms.setdefault((record['regime'], record['phase']), {})
            seeds = arms.setdefault(record['arm'], {})
            if record['seed'] in seeds:
                raise ValueError(f'{_cell(record)} is recorded twice: keep one of the two lines.')
            seeds[record['seed']] = record

    def regimes(self, *phases: str) -> list[str]:
        """Names of the regimes with records of one of the phases (of any, if none is named), in order."""
        found = {regime for regime, phase in self._arms if not phases or phase in phases}
        names = [*self.plan.regimes, *(record['regime'] for record in self.records)]
        return [name for name in dict.fromkeys(names) if name in found]

    def arms(self, regime: str, phase: str = 'final') -> dict[str, list[Record]]:
        """Records of a regime by arm, each by seed."""
        found = self._arms.get((regime, phase), {})
        return {arm: [seeds[seed] for seed in sorted(seeds)] for arm, seeds in found.items()}

    def find(self, regime: str, arm: str) -> list[Record]:
        """Final records of an arm, here or, where this regime has none, in one of the same set-up."""
        for other in (regime, *self.alike(regime)):
            if (records := self.arms(other).get(arm)) is not None:
                return records
        return []

    def alike(self, regime: str) -> list[str]:
        """Other regimes with the same data, teacher, student, epochs and recipe."""
        return [name for name in self.plan.regimes if name != regime and self._setup(name) == self._setup(regime)]

    def _setup(self, regime: str) -> Any:
        values = self.plan.values['regimes'].get(regime)
        return None if values is None else [values.get(key) or None for key in _SETUP]

    def difference(self, regime: str, arm: str, base: str, key: str = 'test_top1') -> dict[str, Any] | None:
        """Compare two arms over the seeds that both have.

        Returns:
            Summary of the paired differences `arm - base` (see `timm_dfpt.training.report.summarise`) with `n` and
            `wins`, the number above 0; `None` without a common seed.
        """
        others = {record['seed']: record[key] for record in self.find(regime, base)}
        own = {record['seed']: record[key] for record in self.find(regime, arm)}
        values = [own[seed] - others[seed] for seed in sorted(own) if seed in others]
        if arm == base or not values:
            return None
        return {**summarise(values), 'n': len(values), 'wins': sum(value > 0 for value in values)}

    def base(self, regime: str, arm: str) -> str | None:
        """The arm of which another is a variant: `dfpt` of `dfpt b=0`, and of every other dual path too."""
        name = arm.split()[0]
        if name == arm:
            name = 'dfpt' if self.find(regime, arm)[0]['config']['method'] in DUAL else arm
        return name if name != arm and self.find(regime, name) else None

    def ratio(self, regime: str, arm: str, key: str) -> float | None:
        """Cost of an arm over that of `kd`: the median of the ratios within a seed, whose arms are timed in turns."""
        reference = {record['seed']: record[key] for record in self.find(regime, 'kd')}
        own = {record['seed']: record[key] for record in self.find(regime, arm)}
        ratios = [own[seed] / reference[seed] for seed in own if seed in reference]
        return statistics.median(ratios) if ratios else None

    def dearer_kd(self, regime: str) -> list[str]:
        """Arms of plain KD that train longer than `kd` or have a better teacher: what the dual path's time buys."""
        epochs = max((record['epochs'] for record in self.find(regime, 'kd')), default=math.inf)
        return [
            arm
            for arm, (first, *_) in self.arms(regime).items()
            if first['config']['method'] == 'kd' and (first['epochs'] > epochs or 'teacher' in first['config'])
        ]

    def gap(self, regime: str) -> float | None:
        """Validation accuracy of the teacher less that of the student alone, in points."""
        scratch = self.find(regime, 'scratch')
        with_teacher = [record for arm in ('kd', *DUAL) for record in self.find(regime, arm)]
        teachers = [record['metrics']['val']['teacher']['top1'] for record in with_teacher[:1]]
        return teachers[0] - mean(scratch, lambda r: r['val_top1']) if teachers and scratch else None

    def chosen(self, regime: str) -> dict[str, str]:
        """What tuning chose: by arm, the trial with the highest mean validation accuracy; of equal ones the first.

        A trial that lacks a seed that another has is not eligible.
        """
        trials = self.arms(regime, 'tune')
        seeds = max((len(records) for records in trials.values()), default=0)
        best: dict[str, tuple[float, str]] = {}
        for trial, records in trials.items():
            name = trial.partition(':')[0]
            value = round(mean(records, lambda r: r['val_top1']), 6)
            if len(records) == seeds and value > best.get(name, (-math.inf, ''))[0]:
                best[name] = value, trial
        return {name: trial for name, (_, trial) in best.items()}

    def not_as_tuned(self, regime: str) -> list[str]:
        """Say which arms of the plan's finals have other options than tuning chose for their method."""
        section = self.plan.values['regimes'].get(regime, {}).get('final', {})
        final = {arm: self.plan.options(Cell(regime, arm, 0, 'final')) for arm in section.get('arms', {})}
        return self._compare(regime, final)

    def recorded_not_as_tuned(self, regime: str) -> list[str]:
        """Say the same of the arms that are recorded."""
        return self._compare(regime, {arm: records[0]['config'] for arm, records in self.arms(regime).items()})

    def _compare(self, regime: str, final: Mapping[str, Mapping[str, Any]]) -> list[str]:
        trials = self.arms(regime, 'tune')
        lines = []
        for name, trial in self.chosen(regime).items():
            tuned = trials[trial][0]['config']
            for arm, options in final.items():
                # An arm of its own name, or one more of that method and teacher: a variant, or one that trains longer.
                alike = all(options.get(key) == tuned.get(key) for key in ('method', 'teacher'))
                same = arm == name or (arm not in self.chosen(regime) and alike)
                if same and (differing := unlike(options, tuned)):
                    lines.append(f'{arm}: {differing}')
        return lines

    def unplanned(self) -> list[str]:
        """Say which records the plan does not ask for, or asks for with other options."""
        cells = {cell.key: cell for cell in self.plan.cells()}
        lines: dict[str, None] = {}
        for record in self.records:
            where = f'{record["regime"]}, {record["phase"]}, {record["arm"]}'
            cell = cells.get(_cell(record).key)
            if cell is None:
                lines[f'{where}, seed {record["seed"]}: not in the plan'] = None
            elif differing := unlike(record['config'], self.plan.options(cell)):
                lines[f'{where}: {differing} in the plan'] = None
        return list(lines)


def mean(records: Sequence[Record], value: Callable[[Record], Any]) -> float:
    """Mean over records of what they have; NaN where they have nothing."""
    found = [number for record in records if (number := value(record)) is not None]
    return statistics.fmean(found) if found else math.nan


def _cell(record: Record) -> Cell:
    return Cell(record['regime'], record['arm'], record['seed'], record['phase'])


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what is the same or said elsewhere, and call trained teachers by their names."""
    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(each) for each in value]
        return Path(value).parent.name if str(value).startswith('local-dir:') else value

    return {key: plain(value) for key, value in options.items() if key not in ('method', 'longer')}


def options_text(options: Mapping[str, Any]) -> str:
    """Options of an arm, to be read."""
    return ', '.join(f'{key}={value}' for key, value in _named(options).items())


def unlike(options: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """Say in which options two arms differ; nothing if in none."""
    one, two = _named(options), _named(others)
    return ', '.join(
        f'{key}={one.get(key, "default")}, not {two.get(key, "default")}'
        for key in dict.fromkeys((*one, *two))
        if one.get(key) != two.get(key)
    )
