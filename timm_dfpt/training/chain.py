"""Teachers between the teacher and the student: teacher assistants (TAKD) and early-stopped teachers (ESKD)."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .options import TrainConfig
from .run_folder import CONFIG_FILE

__all__ = ['assistant_configs', 'with_actual_teacher']


def assistant_configs(config: TrainConfig) -> list[TrainConfig]:
    """Return the runs that come before the student's: each assistant learns by plain KD from the one before.

    Source: Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", AAAI 2020, arXiv 1902.03393.

    Args:
        config: Options of the student's run, with the run folder in `output`.

    Returns:
        Options of a run in `output/assistants/<i>` for each of `assistants`; none for other methods than `takd`.
    """
    if config.method != 'takd':
        return []
    configs: list[TrainConfig] = []
    for index, name in enumerate(config.assistants):
        folder = _assistant(config, index)
        first = {} if not configs else _trained_here(_assistant(config, index - 1) / 'student')
        configs.append(
            dataclasses.replace(
                config,
                **{
                    'method': 'kd',
                    'baselines': [],
                    'assistants': [],
                    'student': name,
                    'student_kwargs': {},
                    'student_pretrained': False,
                    'export_epochs': [],
                    'push_to_hub': None,
                    'output': str(folder),
                    'resume': (folder / CONFIG_FILE).is_file(),
                    **first,
                },
            )
        )
    return configs


def with_actual_teacher(config: TrainConfig) -> TrainConfig:
    """Return the options with the teacher that the student itself learns from, which is not always `teacher`."""
    if config.method == 'eskd':
        return dataclasses.replace(config, teacher=config.early_teacher, teacher_checkpoint=None, teacher_kwargs={})
    if config.method == 'takd':
        last = _assistant(config, len(config.assistants) - 1)
        return dataclasses.replace(config, **_trained_here(last / 'student'))
    return config


def _assistant(config: TrainConfig, index: int) -> Path:
    assert config.output is not None
    return Path(config.output) / 'assistants' / str(index)


def _trained_here(folder: Path) -> dict[str, Any]:
    return {'teacher': f'local-dir:{folder}', 'teacher_checkpoint': None, 'teacher_kwargs': {}}
