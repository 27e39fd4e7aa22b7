"""Folders of runs and comparisons: every name in them, what may be resumed there, and how their files are written."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..data.checks import default_of
from ..hub.files import write_text, writing
from ..job.cli import load_recipe, save_config
from ..job.devices import on_main
from ..job.lock import LOCK, InUseError, locked
from ..job.options import TrainConfig
from ..job.stopping import Preempted

__all__ = ['ComparisonFolder', 'RunFolder', 'claimed']

_logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
# As many changed options are named one by one.
_SHOWN = 3
# What may differ when a run is resumed, since it says nothing about what is computed.
_MAY_DIFFER = (
    'output', 'resume', 'log_with', 'log_interval', 'checkpoint_hist', 'checkpoint_steps', 'workers', 'cache_images',
    'cache_teacher', 'teacher_cache_dir', 'report',
    'push_to_hub', 'push_prompt_path', 'private', 'license', 'license_name', 'license_link',
    'export', 'include_preprocessing',
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
        self.statistics = self.path / 'teacher_statistics.safetensors'
        """BatchNorm statistics that were estimated for a teacher, see `adapt_statistics`."""
        self.student = self.path / 'student'
        self.prompt_path = self.path / 'prompt_path'
        self.exported = self.path / 'exported'
        """The student in the formats of other runtimes."""
        self.teacher_heads = self.path / 'teacher_heads'
        """Heads that were fitted to teachers, or put into the order of the data."""
        self.curves = self.path / 'curves.svg'
        self.report = self.path / 'report.html'
        self.predictions = self.path / 'predictions.safetensors'
        """What the models said of each image that they were evaluated on; what the report is made from."""
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
        run._check_place(config)
        run._check_contents(config)
        return run

    def _check_place(self, config: TrainConfig) -> None:
        place = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        if self.path.is_file() and not config.resume:
            _refuse_used(self.path)
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(f'output: cannot create {str(self)!r}: {str(place)!r} is not a writable directory.')
        if not self.config.is_file():
            _refuse_inside_data(config, self.path)

    def _check_contents(self, config: TrainConfig) -> None:
        started = _is_started(self.path)
        if config.resume and self.config.is_file():
            self._check_same(config)
        elif config.resume and not started:
            _logger.warning(f'No run to resume in {str(self)!r}; starting a new one.')
        elif config.resume:
            raise ValueError(
                f'resume: {str(self)!r} is not empty and does not hold a run: name the folder of a run with --output, '
                'or leave --resume out and name a new one.'
            )
        elif started:
            _refuse_used(self.path)

    def _check_same(self, config: TrainConfig) -> None:
        before, now = load_recipe(self.config), dataclasses.asdict(config)
        if now['batch_size'] is None:
            # It was chosen for the number of images, see `resumed`.
            now['batch_size'] = before.get('batch_size')
        # What was not an option then was as it is by default now.
        before = {**{field.name: default_of(field) for field in dataclasses.fields(config)}, **before}
        changed = [key for key in now if key not in _MAY_DIFFER and before[key] != now[key]]
        if changed:
            shown = ', '.join(f'{key}={now[key]!r} (was {before.get(key)!r})' for key in changed[:_SHOWN])
            more = f' and {len(changed) - _SHOWN} more' if len(changed) > _SHOWN else ''
            raise ValueError(
                f'resume: the run in {str(self)!r} was started with other options: {shown}{more}. Give the options it '
                f'was started with (--config {self.config} --resume has them all), or another --output.'
            )

    def resumed(self, config: TrainConfig) -> TrainConfig:
        """Return options in this folder, with what a run that is resumed has chosen for those that were not given."""
        config = dataclasses.replace(config, output=str(self))
        if config.batch_size is None and self.config.is_file():
            return dataclasses.replace(config, batch_size=load_recipe(self.config).get('batch_size'))
        return config

    def open(self, config: TrainConfig, accelerator: Accelerator) -> None:
        """Create the folder, or open it again, once everything that can be wrong has been checked."""
        def create() -> None:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            if not self.config.is_file():
                save_config(config, self.config)
            with writing(self.metrics):
                self.metrics.touch()

        on_main(accelerator, create)

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


@contextlib.contextmanager
def claimed(config: TrainConfig, accelerator: Accelerator) -> Iterator[RunFolder]:
    """Choose the folder of a run, and keep other jobs out of it within the context.

    Args:
        config: The options, see `RunFolder.claim`.
        accelerator: Its main process chooses and keeps it; the others learn of it.

    Raises:
        InUseError: If another job works in it.
        PermissionError: If `RunFolder.claim` raises it.
        ValueError: If `RunFolder.claim` raises it.
    """
    locks = contextlib.ExitStack()

    def claim() -> RunFolder:
        while True:
            run = RunFolder(config.output or _free_path(config))
            run._check_place(config)
            try:
                locks.enter_context(locked(run.path))
            except InUseError:
                if config.output or config.resume:
                    raise
                continue  # The same command was faster, and now there is a folder of that name.
            run._check_contents(config)
            return run

    with locks:
        folder = on_main(accelerator, claim)
        try:
            yield folder
        except Preempted as stop:
            raise Preempted(stop.signum, f'continue with --output {shlex.quote(str(folder))} --resume') from stop


def _is_started(path: Path) -> bool:
    """Say whether there is more in a folder than what keeps others out, and what a broken save has left."""
    return path.is_dir() and any(file.name != LOCK and file.suffix != '.incomplete' for file in path.iterdir())


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
        self.report = self.path / 'report.html'

    def __str__(self) -> str:
        return str(self.path)

    def seed(self, seed: int) -> RunFolder:
        """Return the folder of the run with a seed."""
        return RunFolder(self.path / f'seed-{seed}')

    @contextlib.contextmanager
    def opened(self, arms: Mapping[str, Any], resume: bool, accelerator: Accelerator) -> Iterator[None]:
        """Create the folder, or make sure that it holds a comparison of the same arms; keep other jobs out of it.

        Args:
            arms: Method and options by arm.
            resume: Whether to go on with the comparison that is there.
            accelerator: Its main process writes.

        Raises:
            InUseError: If another job works in it.
            ValueError: If it holds something else.
        """
        locks = contextlib.ExitStack()

        def create() -> None:
            if self.path.is_file():
                _refuse_used(self.path)
            locks.enter_context(locked(self.path))
            if resume and not self.arms.is_file():
                raise ValueError(
                    f'resume: {str(self)!r} does not hold a comparison: leave --resume out to start one there.'
                )
            if resume:
                self._check_same(arms)
                return
            if _is_started(self.path):
                _refuse_used(self.path)
            _write_json(self.arms, arms)

        with locks:
            on_main(accelerator, create)
            yield

    def _check_same(self, arms: Mapping[str, Any]) -> None:
        before = self.read_arms()
        if before != arms:
            raise ValueError(
                f'resume: the comparison in {str(self)!r} has the arms {before}, not {arms}. Give the same arms, '
                'or another --output.'
            )

    def read_arms(self) -> dict[str, Any]:
        """Read `arms.json`."""
        arms: dict[str, Any] = json.loads(self.arms.read_text(encoding='utf-8'))
        return arms

    def write_result(self, result: Mapping[str, Any], table: str) -> None:
        """Write `compare.json` and `compare.md`."""
        _write_json(self.result, result)
        write_text(self.table, table + '\n')
