"""What the study of foreign teachers consists of: regimes, ways, trials, arms and contrasts of `plan.yaml`."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study.plan import Cell
from timm_dfpt.job.options import TrainConfig

__all__ = ['PLAN_FILE', 'Cell', 'Plan', 'Stage']

PLAN_FILE = Path(__file__).with_name('plan.yaml')


@dataclasses.dataclass(frozen=True)
class Stage:
    """One job of a way.

    Args:
        do: `train`: a run of the trainer. `fit`: a head fitted to frozen features. `lora`: low-rank tuning.
        model: Which model it changes, `student` or `teacher`.
        start: Number of the stage (from 0) that has made the model with which it begins; `previous`: the one before.
        teacher: Number of the stage that has made its teacher, or `previous`.
        options: Options of `train/distill.py`; of `lora` those of `benchmarks.foreign.lora`.
    """

    do: str = 'train'
    model: str = 'student'
    start: int | str | None = None
    teacher: int | str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Plan:
    """The study as written down in `plan.yaml`.

    A final arm is `tuned: [way, ...]`: the best trial of these ways by the mean on validation images, with `options`
    of its own in the last stage if it has any, and with `time: dearest` for so many epochs that all of it takes as long
    as the dearest tuned arm of its regime, by CPU times that are measured in turns just before (the phase `time`, in
    which arms train for a share of their epochs). Or it names a `way` and `options` by stage.
    So the finals are fixed before any of them is trained, and follow without anybody's choice once tuning is done.

    Args:
        path: The file.
        work: Folder with `data/`, `weights/` and `teachers/`.
        records: What is recorded, from which tuning chooses.
    """

    def __init__(self, path: Path, work: Path, records: Sequence[Mapping[str, Any]] = ()) -> None:
        self.values: dict[str, Any] = yaml.safe_load(path.read_text(encoding='utf-8'))
        self.work = work
        self._found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
        for record in records:
            self._found.setdefault((record['phase'], record['regime'], record['arm']), []).append(record)

    def cells(self) -> Iterator[Cell]:
        """Give every student that the study asks for, in the order in which they are to be trained.

        Finals of a regime are there once its tuning is done. A seed is finished before the next begins, so that what is
        there is balanced over the arms whenever the study is stopped.
        """
        for step in self.values['order']:
            for name in step['regimes']:
                phase = step['phase']
                section = self.values['regimes'][name].get(phase, {'seeds': [0]})
                if phase != 'tune' and not (self.is_timed if phase == 'final' else self.is_tuned)(name):
                    continue
                arms = [arm for arm in self.arms(name, phase) if arm in step.get('arms', [arm])]
                if phase == 'final':
                    arms = [arm for arm in arms if not self._is_other_name(name, arm)]
                for seed in section.get('seeds', ())[: step.get('seeds')]:
                    yield from (Cell(name, arm, seed, phase) for arm in arms)

    def arms(self, regime: str, phase: str) -> list[str]:
        """Names of the arms of a regime, or of its trials."""
        section = self.values['regimes'][regime].get(phase, {})
        if phase == 'tune':
            return [f'{way}:{i}' for way, trials in section.get('trials', {}).items() for i in range(len(trials))]
        if phase in ('time', 'flops'):
            return self._usual(regime)
        return list(section.get('arms', {}))

    def _usual(self, regime: str) -> list[str]:
        """The tuned arms that train for the usual number of epochs with what was chosen."""
        arms = self.values['regimes'][regime].get('final', {}).get('arms', {})
        return [name for name, arm in arms.items() if 'tuned' in arm and 'time' not in arm and 'options' not in arm]

    def is_timed(self, regime: str) -> bool:
        """Say whether everything that the finals of a regime follow from is recorded."""
        turns = len(self.values['regimes'][regime].get('time', {}).get('seeds', ()))
        found = [self._found.get(('time', regime, arm), ()) for arm in self._usual(regime)]
        return self.is_tuned(regime) and all(len(records) == turns for records in found)

    def is_tuned(self, regime: str) -> bool:
        """Say whether all trials that the finals of a regime choose from are recorded with all of their seeds."""
        source, tuning = self._source(regime), self._tuning(regime)
        arms = self.values['regimes'][regime].get('final', {}).get('arms', {})
        ways = {way for arm in arms.values() for way in arm.get('tuned', ())}
        trials = [(source, f'{way}:{i}') for way in ways for i in range(len(tuning['trials'][way]))]
        return all(len(self._found.get(('tune', *trial), ())) == len(tuning['seeds']) for trial in trials)

    def _source(self, regime: str) -> str:
        return str(self.values['regimes'][regime].get('tuned_in', regime))

    def _tuning(self, regime: str) -> dict[str, Any]:
        tuning: dict[str, Any] = self.values['regimes'][self._source(regime)].get('tune', {})
        return tuning

    def chosen(self, regime: str, ways: Sequence[str]) -> tuple[str, int]:
        """Return the best trial of some ways by the mean on validation images, of equal ones the first.

        A regime with `tuned_in` takes over what was chosen in another.

        Returns:
            Way and number of the trial.
        """
        trials = [(way, i) for way in ways for i in range(len(self._tuning(regime)['trials'][way]))]
        source = self._source(regime)

        def mean(trial: tuple[str, int]) -> float:
            found = self._found['tune', source, f'{trial[0]}:{trial[1]}']
            return statistics.fmean(record['student_top1'] for record in found)

        return max(trials, key=mean)

    def _seconds(self, regime: str, arm: str) -> list[float]:
        """CPU time of an arm by stage, for all of its epochs."""
        share = self.values['regimes'][regime]['time']['share']
        turns = [
            # A fitted head has no epochs.
            [
                seconds if epochs is None else seconds / share
                for seconds, epochs in zip(each['cpu_s'], each['epochs'], strict=True)
            ]
            for each in self._found['time', regime, arm]
        ]
        return [statistics.median(values) for values in zip(*turns, strict=True)]

    def longer(self, regime: str, arm: str) -> float:
        """Return how many times as long the last stage of a final arm trains, for all of it to take the time it may."""
        arms = self.values['regimes'][regime]['final']['arms']
        if arms[arm].get('time') != 'dearest':
            return 1.0
        budget = max(sum(self._seconds(regime, name)) for name in self._usual(regime))
        *before, last = self._seconds(regime, arm.removesuffix(' =time'))
        return (budget - sum(before)) / last

    def _is_other_name(self, regime: str, arm: str) -> bool:
        """Say whether an arm is the dearest itself, and would be trained twice."""
        timed = 'time' in self.values['regimes'][regime]['final']['arms'][arm]
        return timed and abs(self.longer(regime, arm) - 1) < 0.05

    def stages(self, cell: Cell) -> list[Stage]:
        """Return the jobs of a way with all options that are its own."""
        regime = self.values['regimes'][cell.regime]
        more: dict[str, Any] = {}
        if cell.phase == 'tune':
            way, _, number = cell.arm.partition(':')
            given = regime['tune']['trials'][way][int(number)]
        elif 'tuned' in regime['final']['arms'][cell.arm]:
            arm = regime['final']['arms'][cell.arm]
            way, best = self.chosen(cell.regime, arm['tuned'])
            given, more = self._tuning(cell.regime)['trials'][way][best], arm.get('options', {})
        else:
            arm = regime['final']['arms'][cell.arm]
            way, given = arm['way'], arm.get('options', {})
        ways = self.values['ways'][way]
        given = given if isinstance(given, list) else [{}] * (len(ways) - 1) + [given]
        if len(given) != len(ways):
            raise ValueError(f'{cell}: {len(given)} mappings of options for the {len(ways)} stages of its way.')
        own = [field.name for field in dataclasses.fields(Stage) if field.name != 'options']
        stages: list[Stage] = []
        for common, changes in zip(ways, given, strict=True):
            values = {**common, **changes, **(more if len(stages) == len(ways) - 1 else {})}
            stages.append(Stage(**{key: values.pop(key) for key in own if key in values}, options=values))
        if cell.phase in ('time', 'flops'):
            return [self._longer(cell.regime, stage, regime['time']['share']) for stage in stages]
        if cell.phase == 'final' and (longer := self.longer(cell.regime, cell.arm)) != 1:
            stages[-1] = self._longer(cell.regime, stages[-1], longer)
        return stages

    def _longer(self, regime: str, stage: Stage, factor: float) -> Stage:
        if stage.do == 'fit' or factor == 1:
            return stage
        epochs = stage.options.get('epochs', self.values['regimes'][regime]['epochs'])
        return dataclasses.replace(stage, options={**stage.options, 'epochs': max(1, round(epochs * factor))})

    def config(self, cell: Cell, stage: Stage, output: Path, made: Sequence[Path]) -> TrainConfig:
        """Return the options of a stage that is a run of the trainer.

        Args:
            cell: The student.
            stage: The stage.
            output: Folder of the run.
            made: Folders of the models that the stages before have made.
        """
        regime = self.values['regimes'][cell.regime]
        options: dict[str, Any] = {'epochs': regime['epochs'], **regime.get('options', {})}
        student = stage.model == 'student'
        options |= self._model(regime['student']) if student else self._as_student(regime['teacher'])
        if stage.start is not None:
            options |= _pretrained(_made(stage.start, made))
        options |= stage.options
        if options['method'] != 'supervised':
            foreign = stage.teacher is None
            teacher = self.teacher(regime['teacher']) if foreign else _made(stage.teacher, made)
            options['teacher'] = f'local-dir:{teacher}'
        else:
            options = {key: value for key, value in options.items() if not key.startswith('teacher')}
        if options.get('teacher_head') == 'fit':
            # As when the plan was written; later the default became another.
            options.setdefault('prompt_head_init_scale', 1)
        return TrainConfig(**{
            **self.values['common'],
            **self._data(regime['data'], cell),
            **options,
            'seed': cell.seed,
            'output': str(output),
            # What is validated is not used, see `data.py`.
            'val_interval': options['epochs'],
        })

    def dataset(self, cell: Cell) -> Path:
        """Return the folder with all splits."""
        name = self.values['data'][self.values['regimes'][cell.regime]['data']]['dataset']
        return self.work / 'data' / name.format(seed=cell.seed)

    def _data(self, data: str, cell: Cell) -> dict[str, Any]:
        return {**self.values['data'][data], 'dataset': f'{self.dataset(cell)}-train'}

    def _model(self, name: str) -> dict[str, Any]:
        options = dict(self.values['models'][name])
        if 'weights' in options:
            options['student'] = f'local-dir:{self.work / "weights" / options.pop("weights")}'
        return options

    def _as_student(self, teacher: str) -> dict[str, Any]:
        return _pretrained(self.teacher(teacher))

    def teacher(self, name: str) -> Path:
        """Return the folder of a teacher's model."""
        weights = self.values['teachers'][name].get('weights')
        return self.work / 'weights' / weights if weights else self.work / 'teachers' / name / 'student'

    def teachers(self) -> dict[str, TrainConfig]:
        """Return the runs that make those teachers that are trained here, by name."""
        runs = {}
        for name, values in self.values['teachers'].items():
            if 'weights' not in values:
                own = {key: value for key, value in values.items() if key not in ('data', 'model')}
                source = dict(self.values['data'][values['data']])
                source['dataset'] = str(self.work / 'data' / source['dataset'])
                options = {**source, **self._model(values['model']), **own, 'method': 'supervised'}
                options |= {'output': str(self.work / 'teachers' / name), 'val_interval': own['epochs']}
                runs[name] = TrainConfig(**{**self.values['common'], **options})
        return runs

    def digest(self, regime: str) -> str:
        """Return a fingerprint of what a regime's finals are: set-up, trials, arms, ways, contrasts; not the seeds.

        More seeds may be added later; what is compared may not change after a record is there.
        """
        values = self.values['regimes'][regime]
        final = values.get('final', {})
        ways = {way for arm in final.get('arms', {}).values() for way in arm.get('tuned', [arm.get('way')])}
        parts = [
            {key: value for key, value in values.items() if key not in ('about', 'tune', 'time', 'final')},
            {key: value for key, value in final.items() if key != 'seeds'},
            self._tuning(regime),
            values.get('time', {}),
            {way: self.values['ways'][way] for way in sorted(ways)},
            self.values['common'],
            self.values['data'][values['data']],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _pretrained(folder: Path) -> dict[str, Any]:
    return {'student': f'local-dir:{folder}', 'student_pretrained': True, 'student_kwargs': {}}


def _made(stage: int | str | None, made: Sequence[Path]) -> Path:
    return made[-1 if stage == 'previous' else int(str(stage))]
