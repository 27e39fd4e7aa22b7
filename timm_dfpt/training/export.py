"""What a run leaves at its end: students and prompt paths with a record of how they were made, and what they cost."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..hub.build import WEIGHTS
from ..hub.prompt_path import PROMPT_WEIGHTS, save_prompt_path
from ..hub.sources import parse_source
from ..hub.student import save_student
from .learner import Learner
from .options import public_options
from .report import measure_cost
from .run_folder import RunFolder

__all__ = ['export', 'export_student']

_Results = Mapping[str, Mapping[str, Mapping[str, float]]]


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
        teacher_folder = parse_source(str(config.teacher)).folder
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
