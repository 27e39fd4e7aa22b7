"""What the study consists of: regimes, arms and seeds of `study.yaml`, as options of the package's own comparison."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from timm_dfpt.job.options import TrainConfig
from timm_dfpt.training.compare import Arm
from timm_dfpt.training.run_folder import RunFolder

__all__ = ['PLAN_FILE', 'Cell', 'Plan']

PLAN_FILE = Path(__file__).with_name('study.yaml')


@dataclasses.dataclass(frozen=True)
class Cell:
    """One student: what it learns, how, and from which seed.

    Args:
        regime: Name of the regime.
        arm: Name of the arm; in the phase `tune` that of the method (or way), a colon and the number of the trial.
        seed: Seed of initial weights, order and augmentation, and of the split where images are split anew.
        phase: `tune`: chosen from on validation data, and never evaluated on test data. `final`: reported. In
            `benchmarks.foreign` also `time` and `flops`: trained for its CPU time or FLOPs only, and not evaluated;
            the seed is then the number of the turn.
    """

    regime: str
    arm: str
    seed: int
    phase: str

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What identifies its record."""
        return dataclasses.astuple(self)


class Plan:
    """The study as written down in `study.yaml`.

    Args:
        path: The file.
        work: Folder with `data/` and `teachers/`.
    """

    def __init__(self, path: Path, work: Path) -> None:
        self.values: dict[str, Any] = yaml.safe_load(path.read_text(encoding='utf-8'))
        self.work = work

    @property
    def regimes(self) -> list[str]:
        """Names of the regimes, in the order in which they are run."""
        return list(self.values['regimes'])

    def cells(self) -> Iterator[Cell]:
        """Give every student that the study asks for, in order."""
        for regime, values in self.values['regimes'].items():
            for phase in ('tune', 'final'):
                section = values.get(phase, {})
                for seed in section.get('seeds', ()):
                    for arm in self._arm_names(section, phase):
                        yield Cell(regime, arm, seed, phase)

    def _arm_names(self, section: dict[str, Any], phase: str) -> list[str]:
        if phase == 'tune':
            return [f'{name}:{i}' for name, trials in section['trials'].items() for i in range(len(trials))]
        return list(section['arms'])

    def options(self, cell: Cell) -> dict[str, Any]:
        """Return the options of an arm as they are written down, `method` and `longer` among them, but not `retired`.

        Those of `arms` count where the arm has none of its own. An arm `dfpt b=0` is a variant of the arm `dfpt` of its
        regime: what it does not say is as there.
        """
        regime = self.values['regimes'][cell.regime]
        if cell.phase == 'tune':
            name, _, number = cell.arm.partition(':')
            return {**self.values['arms'].get(name, {}), **regime['tune']['trials'][name][int(number)]}
        arms = regime['final']['arms']
        origin = cell.arm.split()[0]
        options = {**self.values['arms'].get(origin, {}), **(arms.get(origin) or {}), **(arms[cell.arm] or {})}
        options.pop('retired', None)
        return options

    def is_retired(self, cell: Cell) -> bool:
        """Say whether an arm has options that were removed, so that only the commit of its records can train it."""
        arms = self.values['regimes'][cell.regime].get('final', {}).get('arms', {})
        return bool((arms.get(cell.arm) or {}).get('retired')) and cell.phase == 'final'

    def arm(self, cell: Cell) -> tuple[Arm, float]:
        """Return an arm as the comparison takes it, and how many times as long as its regime it trains."""
        options = self.options(cell)
        method, longer = options.pop('method'), options.pop('longer', 1.0)
        if 'teacher' in options:
            options['teacher'] = self._trained(options['teacher'])
        # Colons, blanks and the like are for file names what they should not be.
        name = re.sub(r'[^\w.+-]', '.', cell.arm)
        if method == 'takd':
            # Plain KD, whose teacher is the last of the assistants.
            assistants = options.pop('assistants')
            options['teacher'] = f'local-dir:{self._assistant(cell, name, len(assistants) - 1) / "student"}'
            method = 'kd'
        return Arm(name, method, options), longer

    def _assistant(self, cell: Cell, name: str, number: int) -> Path:
        return self.work / 'assistants' / f'{cell.phase}-{cell.regime}-{cell.seed}' / name / str(number)

    def assistants(self, cell: Cell) -> list[TrainConfig]:
        """Return the runs that come before an arm of teacher assistants: each learns by plain KD from the one before.

        Source: Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", AAAI 2020, arXiv 1902.03393.
        """
        arm, _ = self.arm(cell)
        common = self.config(cell, self.work)
        teacher, runs = str(common.teacher), []
        for number, name in enumerate(self.options(cell).get('assistants', ())):
            folder = self._assistant(cell, arm.name, number)
            own: dict[str, Any] = {'student': self._trained(name), 'student_kwargs': {}, 'teacher': teacher}
            own |= {'output': str(folder), 'resume': RunFolder(folder).config.is_file()}
            runs.append(common.for_method('kd', **{**arm.changes, **own}))
            teacher = f'local-dir:{folder / "student"}'
        return runs

    def config(self, cell: Cell, output: Path) -> TrainConfig:
        """Return what all arms of a regime that train as long as this one have in common."""
        regime = self.values['regimes'][cell.regime]
        _, longer = self.arm(cell)
        epochs = round(regime['epochs'] * longer)
        return self._config(
            regime['data'],
            regime['student'],
            method='kd',
            teacher=self._trained(regime['teacher']),
            epochs=epochs,
            seed=cell.seed,
            output=str(output),
            **{**regime.get('options', {}), 'val_interval': regime.get('val_interval', epochs)},
        )

    def teachers(self) -> dict[str, TrainConfig]:
        """Return the runs that make the teachers, by name."""
        return {name: self._teacher(name) for name in self.values['teachers']}

    def _teacher(self, name: str) -> TrainConfig:
        values = dict(self.values['teachers'][name])
        data, model, epochs = values.pop('data'), values.pop('model'), values.pop('epochs')
        output = str(self.work / 'teachers' / name)
        if 'start' in values:
            values |= {'student': self._trained(values.pop('start')), 'student_pretrained': True, 'student_kwargs': {}}
        return self._config(
            data, model, **{'method': 'supervised', 'epochs': epochs, 'output': output, 'seed': 0, **values}
        )

    def _trained(self, teacher: str) -> str:
        return f'local-dir:{self.work / "teachers" / teacher / "student"}'

    def _config(self, data: str, model: str, **options: Any) -> TrainConfig:
        source = dict(self.values['data'][data])
        source['dataset'] = str(self.work / 'data' / source['dataset'])
        student = {'student_kwargs': self.values['models'][model]}
        return TrainConfig(**{**self.values['common'], **source, **student, **options})
