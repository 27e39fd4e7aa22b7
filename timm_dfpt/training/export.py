"""From a trained learner to files: the student, the prompt path, and what they score and cost."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..hub.build import WEIGHTS
from ..hub.prompt_path import PROMPT_WEIGHTS, save_prompt_path
from ..hub.student import save_student
from ..hub.timm_models import local_folder
from .learner import Learner
from .options import public_options
from .report import measure_cost
from .run_folder import RunFolder

__all__ = ['export', 'export_student']

_Results = Mapping[str, Mapping[str, Mapping[str, float]]]


def export(
    learners: Sequence[Learner], results: Sequence[_Results], facts: Mapping[str, Any], example: torch.Tensor
) -> dict[str, dict[str, Any]]:
    """Save what learners have become in the `output` of each: `student/` and, where there is one, `prompt_path/`.

    Args:
        learners: The learners.
        results: Of each, metrics by split (`val`, and `test` where there is one) and model.
        facts: What the run was, recorded beside the weights.
        example: A batch `[B, C, H, W]` to measure the cost with.

    Returns:
        By name of the learner, for `teacher`, `prompt_path` and `student`: `name`, `metrics`, `val_metrics` and `cost`.
    """
    teacher_costs: dict[int, dict[str, float]] = {}
    return {
        learner.name: _export(learner, result, facts, example, teacher_costs)
        for learner, result in zip(learners, results, strict=True)
    }


def _export(
    learner: Learner,
    results: _Results,
    facts: Mapping[str, Any],
    example: torch.Tensor,
    teacher_costs: dict[int, dict[str, float]],
) -> dict[str, Any]:
    folder = RunFolder(str(learner.config.output))
    config, task = learner.config, learner.task
    student_metrics = {split: result['student'] for split, result in results.items()}
    record = export_student(learner, student_metrics, folder.student, facts)
    models: dict[str, tuple[Any, list[nn.Parameter], str, list[Path]]] = {}
    if learner.teacher is not None:
        frozen = list(learner.teacher.parameters())
        source = str(config.teacher)
        models['teacher'] = (task.teacher_logits, frozen, source, _teacher_files(source))
        dual_teacher = task.get_dual_teacher()
        if dual_teacher is not None:
            save_prompt_path(dual_teacher, folder.prompt_path, label_names=facts['class_names'], training=record)
            path = dual_teacher.prompt_path
            parameters = [*(frozen if path.shares_backbone else ()), *path.parameters()]
            files = [folder.prompt_path / PROMPT_WEIGHTS]
            models['prompt_path'] = (task.prompt_logits, parameters, config.method, files)
    files = [folder.student / WEIGHTS]
    # In the precision of its weights, as the others: accelerate wraps what is trained in autocast.
    student = learner.accelerator.unwrap_model(learner.published_student, keep_fp32_wrapper=False)
    models['student'] = (student, list(student.parameters()), str(config.student), files)
    final, key = list(results)[-1], id(learner.teacher)
    costs = {
        role: teacher_costs[key]
        if role == 'teacher' and key in teacher_costs
        else measure_cost(forward, parameters, example, files)
        for role, (forward, parameters, _, files) in models.items()
    }
    if 'teacher' in costs:
        teacher_costs[key] = costs['teacher']
    return {
        role: {
            'name': name,
            'metrics': results[final][role],
            'val_metrics': results['val'][role],
            'cost': costs[role],
        }
        for role, (_, _, name, _) in models.items()
    }


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


def _teacher_files(name: str) -> list[Path]:
    folder = local_folder(name)
    return [folder / WEIGHTS] if folder else []
