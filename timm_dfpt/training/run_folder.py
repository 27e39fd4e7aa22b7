"""Folders of runs and comparisons: every name in them, what may be resumed there, and how their files are written."""
from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..hub.build import WEIGHTS
from ..hub.files import write_text, writing
from ..hub.privacy import public
from ..hub.prompt_path import PROMPT_WEIGHTS, save_prompt_path
from ..hub.student import save_student
from ..hub.timm_models import local_folder
from .cli import load_recipe, save_config
from .learner import Learner
from .options import PATH_OPTIONS, TrainConfig
from .report import measure_cost

__all__ = ['ComparisonFolder', 'RunFolder', 'export', 'export_student', 'public_options']

_logger = logging.getLogger(__name__)

_Results = Mapping[str, Mapping[str, Mapping[str, float]]]

_FORMAT_VERSION = 1
# What may differ when a run is resumed, since it says nothing about what is computed.
_MAY_DIFFER = (
    'output', 'resume', 'log_with', 'log_interval', 'checkpoint_hist', 'checkpoint_steps', 'workers', 'cache_images',
    'cache_teacher', 'teacher_cache_dir',
    'push_to_hub', 'push_prompt_path', 'private', 'license',
)  # fmt: skip


class RunFolder:
    """The folder of a run.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / 'config.yaml'
        """The options, as a recipe."""
        self.metrics = self.path / 'metrics.jsonl'
        """One JSON object per epoch."""
        self.checkpoints = self.path / 'checkpoints'
        self.student = self.path / 'student'
        self.prompt_path = self.path / 'prompt_path'
        self.curves = self.path / 'curves.png'
        self.summary = self.path / 'summary.json'
        """What the run was and reached; written at its end."""

    def __str__(self) -> str:
        return str(self.path)

    def student_of_epoch(self, epoch: int) -> Path:
        """Return the folder of the student after an epoch."""
        return self.path / f'student-epoch{epoch}'

    def baseline(self, method: str) -> RunFolder:
        """Return the folder of a baseline: its student, and its prompt path if it has one."""
        return RunFolder(self.path / 'baselines' / method)

    def arm(self, name: str) -> RunFolder:
        """Return the folder of an arm of a comparison: its student, and its prompt path if it has one."""
        return RunFolder(self.path / 'arms' / name)

    @classmethod
    def claim(cls, config: TrainConfig) -> RunFolder:
        """Choose the folder of a run, and create nothing yet.

        Args:
            config: The options. `output` names the folder; with `resume` it may hold the run already, or nothing, as a
                job may be killed before it has created its folder.

        Raises:
            PermissionError: If the folder cannot be created or written to.
            ValueError: If the folder is in use, or holds something else or a run with other options.
        """
        run = cls(config.output or _free_path(config))
        started = run.path.is_dir() and any(not file.name.endswith('.incomplete') for file in run.path.iterdir())
        if config.resume and run.config.is_file():
            run._check_same(config)
        elif config.resume and not started:
            _logger.warning(f'No run to resume in {str(run)!r}; starting a new one.')
        elif config.resume:
            raise ValueError(f'resume: {str(run)!r} is not empty and has no run. Name the folder of the run.')
        elif started or run.path.is_file():
            _refuse_used(run.path)
        place = next(folder for folder in (run.path.absolute(), *run.path.absolute().parents) if folder.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(f'output: cannot create {str(run)!r}: {str(place)!r} is not a writable directory.')
        if not run.config.is_file():
            _refuse_inside_data(config, run.path)
        return run

    def _check_same(self, config: TrainConfig) -> None:
        before, now = load_recipe(self.config), dataclasses.asdict(config)
        if now['batch_size'] is None:
            # It was chosen for the number of images, see `resumed`.
            now['batch_size'] = before.get('batch_size')
        changed = [key for key in now if key not in _MAY_DIFFER and before.get(key) != now[key]]
        if changed:
            shown = ', '.join(f'{key}={now[key]!r} (was {before.get(key)!r})' for key in changed)
            raise ValueError(
                f'resume: the run in {str(self)!r} was started with other options: {shown}. Give the options it was '
                f'started with (--config {self.config}), or another --output.'
            )

    def resumed(self, config: TrainConfig) -> TrainConfig:
        """Return options in this folder, with what a run that is resumed has chosen for those that were not given."""
        config = dataclasses.replace(config, output=str(self))
        if config.batch_size is None and self.config.is_file():
            return dataclasses.replace(config, batch_size=load_recipe(self.config).get('batch_size'))
        return config

    def open(self, config: TrainConfig, accelerator: Accelerator) -> None:
        """Create the folder, or open it again, once everything that can be wrong has been checked."""
        if accelerator.is_main_process:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            if not self.config.is_file():
                save_config(config, self.config)
            with writing(self.metrics):
                self.metrics.touch()
        accelerator.wait_for_everyone()

    def write_metrics(self, lines: Sequence[str]) -> None:
        """Write `metrics.jsonl`, one JSON object per line."""
        write_text(self.metrics, ''.join(f'{line}\n' for line in lines))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read `metrics.jsonl`."""
        return [json.loads(line) for line in self.metrics.read_text(encoding='utf-8').splitlines()]

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`."""
        _write_json(self.summary, {'format_version': _FORMAT_VERSION, **summary})

    def read_summary(self) -> dict[str, Any]:
        """Read `summary.json`."""
        summary: dict[str, Any] = json.loads(self.summary.read_text(encoding='utf-8'))
        return summary


def _free_path(config: TrainConfig) -> Path:
    """Return a folder for a run that was given none."""
    dataset, student = (Path(str(name).split(':')[-1]).name for name in (config.dataset, config.student))
    first = path = Path('output') / f'{dataset}-{student}-{config.method}-s{config.seed}'
    number = 1
    # A name of our choosing must not stand in the way of a second run.
    while path.exists() and not config.resume:
        number += 1
        path = first.with_name(f'{first.name}-run{number}')
    return path


def _refuse_inside_data(config: TrainConfig, output: Path) -> None:
    """Refuse to write where the next run would look for images."""
    data = Path(str(config.dataset)).expanduser()
    written = {'output': output}
    if config.cache_teacher:
        written['teacher_cache_dir'] = Path(config.teacher_cache_dir)
    for name, path in written.items():
        if data.is_dir() and path.resolve().is_relative_to(data.resolve()):
            raise ValueError(
                f'{name}: {str(path)!r} is inside the dataset {str(config.dataset)!r}, whose folders are classes and '
                f'splits. Name a folder outside with --{name.replace("_", "-")}.'
            )


def _refuse_used(path: Path) -> None:
    raise ValueError(
        f'output: {str(path)!r} exists and is not empty. Continue it with --resume, or name another folder.'
    )


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=2) + '\n')


class ComparisonFolder:
    """The folder of a comparison.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.arms = self.path / 'arms.json'
        """Method and options by arm."""
        self.result = self.path / 'compare.json'
        self.table = self.path / 'compare.md'
        self.plot = self.path / 'compare.png'

    def __str__(self) -> str:
        return str(self.path)

    def seed(self, seed: int) -> RunFolder:
        """Return the folder of the run with a seed."""
        return RunFolder(self.path / f'seed-{seed}')

    def open(self, arms: Mapping[str, Any], resume: bool, accelerator: Accelerator) -> None:
        """Create the folder, or make sure that it holds a comparison of the same arms.

        Args:
            arms: Method and options by arm.
            resume: Whether to go on with the comparison that is there.
            accelerator: Its main process writes.

        Raises:
            ValueError: If it holds something else.
        """
        if resume:
            if not self.arms.is_file():
                raise ValueError(f'resume: {str(self)!r} has no comparison. Leave --resume out to start one there.')
            before = self.read_arms()
            if before != arms:
                raise ValueError(
                    f'resume: the comparison in {str(self)!r} has the arms {before}, not {arms}. Give the same arms, '
                    'or another --output.'
                )
        elif self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir())):
            _refuse_used(self.path)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not resume:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            _write_json(self.arms, arms)
        accelerator.wait_for_everyone()

    def read_arms(self) -> dict[str, Any]:
        """Read `arms.json`."""
        arms: dict[str, Any] = json.loads(self.arms.read_text(encoding='utf-8'))
        return arms

    def write_result(self, result: Mapping[str, Any], table: str) -> None:
        """Write `compare.json` and `compare.md`."""
        _write_json(self.result, result)
        write_text(self.table, table + '\n')


@dataclasses.dataclass(frozen=True)
class _Exported:
    """A model at the end of a run: how it is run, what it is made of and kept in."""

    name: str
    forward: Callable[[torch.Tensor], torch.Tensor]
    parameters: Sequence[nn.Parameter]
    files: Sequence[Path]


def export(
    learners: Sequence[Learner], results: Sequence[_Results], facts: Mapping[str, Any], example: torch.Tensor
) -> dict[str, dict[str, Any]]:
    """Save what learners have become in the `output` of each: `student/` and, where there is one, `prompt_path/`.

    Args:
        learners: The learners.
        results: Of each, metrics by split (`val`, and `test` where there is one) and model.
        facts: What the run was, recorded alongside the weights.
        example: A batch `[B, C, H, W]` to measure the cost with.

    Returns:
        By name of the learner, for `teacher`, `prompt_path` and `student`: `name`, `metrics`, `val_metrics` and `cost`.
    """
    costs_of_teachers: dict[int, dict[str, float]] = {}
    exported: dict[str, dict[str, Any]] = {}
    for learner, result in zip(learners, results, strict=True):
        final = list(result)[-1]
        exported[learner.name] = {}
        for role, model in _save(learner, result, facts).items():
            known = costs_of_teachers.get(id(learner.teacher)) if role == 'teacher' else None
            cost = known or measure_cost(model.forward, model.parameters, example, model.files)
            if role == 'teacher':
                # Those who learn from the same teacher share its numbers.
                costs_of_teachers[id(learner.teacher)] = cost
            metrics = {'metrics': result[final][role], 'val_metrics': result['val'][role]}
            exported[learner.name][role] = {'name': model.name, **metrics, 'cost': cost}
    return exported


def _save(learner: Learner, results: _Results, facts: Mapping[str, Any]) -> dict[str, _Exported]:
    """Save the student, and its prompt path if it has one; return all models by role."""
    config, task, folder = learner.config, learner.task, RunFolder(str(learner.config.output))
    metrics = {split: result['student'] for split, result in results.items()}
    record = export_student(learner, metrics, folder.student, facts)
    models: dict[str, _Exported] = {}
    if learner.teacher is not None:
        frozen = list(learner.teacher.parameters())
        teacher_folder = local_folder(str(config.teacher))
        files = [teacher_folder / WEIGHTS] if teacher_folder else []
        models['teacher'] = _Exported(str(config.teacher), task.teacher_logits, frozen, files)
        dual_teacher = task.get_dual_teacher()
        if dual_teacher is not None:
            save_prompt_path(dual_teacher, folder.prompt_path, label_names=facts['class_names'], training=record)
            path = dual_teacher.prompt_path
            parameters = [*(frozen if path.shares_backbone else ()), *path.parameters()]
            files = [folder.prompt_path / PROMPT_WEIGHTS]
            models['prompt_path'] = _Exported(config.method, task.prompt_logits, parameters, files)
    # In the precision of its weights, as the others: accelerate wraps what is trained in autocast.
    student = learner.accelerator.unwrap_model(learner.published_student, keep_fp32_wrapper=False)
    parameters = list(student.parameters())
    models['student'] = _Exported(str(config.student), student, parameters, [folder.student / WEIGHTS])
    return models


def export_student(
    learner: Learner, metrics: Mapping[str, Mapping[str, float]], folder: Path, facts: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Save the student as it is now, with a record of what it was made from.

    Args:
        learner: The learner.
        metrics: The student's metrics by split.
        folder: Where to save.
        facts: What the run was.
        **more: Further entries of the record.

    Returns:
        The record.
    """
    config = learner.config
    options = public_options(config)
    record = {
        'method': config.method,
        'teacher': options['teacher'],
        'prompt_path': config.push_prompt_path,
        'dataset': options['dataset'],
        'dataset_sizes': facts['dataset_sizes'],
        'seed': config.seed,
        'recipe': options,
        'metrics': {split: dict(values) for split, values in metrics.items()},
        **more,
    }
    save_student(
        learner.published_student,
        folder,
        label_names=facts['class_names'],
        data_config=facts['input_config'],
        license=config.license,
        distillation=record,
    )
    return record


def public_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options as they may be published: only the last part of local paths is kept."""
    options = dataclasses.asdict(config)
    for key in PATH_OPTIONS:
        options[key] = public(options[key], local=True)
    options['output'] = None
    return options
