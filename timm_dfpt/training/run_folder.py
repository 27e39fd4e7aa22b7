"""The folder of a run: a new one that is free, or one to go on with, and the options it was started with."""
from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

from accelerate import Accelerator

from ..hub.files import writing
from .cli import load_recipe, save_config
from .options import TrainConfig
from .trainer import METRICS_FILE

__all__ = ['CONFIG_FILE', 'SUMMARY_FILE', 'claim_run_dir', 'open_run_dir']

CONFIG_FILE = 'config.yaml'
SUMMARY_FILE = 'summary.json'

_logger = logging.getLogger(__name__)

# What may differ when a run is resumed, since it says nothing about what is computed.
_MAY_DIFFER = (
    'output', 'resume', 'log_with', 'log_interval', 'checkpoint_hist', 'checkpoint_steps', 'workers', 'cache_images',
    'cache_teacher', 'teacher_cache_dir',
    'push_to_hub', 'push_prompt_path', 'private', 'license',
)  # fmt: skip


def claim_run_dir(config: TrainConfig) -> Path:
    """Choose the folder of a run, and make nothing yet.

    Args:
        config: The options; `output` names the folder, `resume` says that it may hold the run already: a job that was
            killed before it had made its folder, and is started again, begins.

    Raises:
        PermissionError: The folder cannot be made or written to.
        ValueError: The folder is in use, or holds something else, or a run with other options.
    """
    if config.output is not None:
        path = Path(config.output)
    else:
        dataset, student = (Path(str(name).split(':')[-1]).name for name in (config.dataset, config.student))
        path = Path('output') / f'{dataset}-{student}-{config.method}-s{config.seed}'
        if not config.resume:
            # A name of our choosing must not stand in the way of a second run.
            number = 1
            while path.exists():
                number += 1
                path = path.with_name(f'{path.name.removesuffix(f"-run{number - 1}")}-run{number}')
    started = path.is_dir() and any(not file.name.endswith('.incomplete') for file in path.iterdir())
    if config.resume and (path / CONFIG_FILE).is_file():
        _check_same_run(config, path)
    elif config.resume and not started:
        _logger.warning(f'There is no run in {str(path)!r} to resume: it begins.')
    elif config.resume:
        raise ValueError(f'resume: {str(path)!r} is not empty and holds no run. Name the folder of the run.')
    elif started or path.is_file():
        raise ValueError(
            f'output: {str(path)!r} exists and is not empty. Continue it with --resume, or name another folder.'
        )
    place = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f'output: {str(path)!r} cannot be made: {str(place)!r} is no folder to write in.')
    return path


def _check_same_run(config: TrainConfig, path: Path) -> None:
    before, now = load_recipe(path / CONFIG_FILE), dataclasses.asdict(config)
    changed = [key for key in now if key not in _MAY_DIFFER and before.get(key) != now[key]]
    if changed:
        shown = ', '.join(f'{key}={now[key]!r} (was {before.get(key)!r})' for key in changed)
        raise ValueError(
            f'resume: the run in {str(path)!r} was started with other options: {shown}. Give the options it was '
            f'started with (--config {path / CONFIG_FILE}), or another --output.'
        )


def open_run_dir(config: TrainConfig, path: Path, accelerator: Accelerator) -> None:
    """Make the run folder, or open it again; to be called when all that can be known to be wrong has been checked."""
    if accelerator.is_main_process:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        if not (path / CONFIG_FILE).is_file():
            save_config(config, path / CONFIG_FILE)
        (path / METRICS_FILE).touch()
    accelerator.wait_for_everyone()
