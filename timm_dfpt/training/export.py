"""What a run leaves at its end: students and prompt paths with a record of how they were made, and what they cost."""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import nn

from ..deploy.form import deployed_form, has_deployed_form
from ..hub.build import WEIGHTS
from ..hub.licenses import license_of
from ..hub.options import StudentOptions
from ..hub.prompt_path import PROMPT_WEIGHTS, check_prompt_path, save_prompt_path
from ..hub.sources import parse_source
from ..hub.student import check_student, save_student
from ..job.options import public_options
from ..tasks.features import FeatureTask
from ..teacher.head_record import fitted_head_of
from .learner import Learner
from .report import attempt, measure_cost
from .run_folder import RunFolder

__all__ = ['Results', 'check_export', 'describe_models', 'export', 'export_student']

Results = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Metrics of a learner by split and model."""

_WEIGHTS = {'student': 'last step', 'student_ema': 'moving average'}


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model at the end of a run: how it is run, what it is made of and kept in."""

    name: str
    forward: Callable[[torch.Tensor], torch.Tensor]
    parameters: Sequence[nn.Parameter]
    files: Sequence[Path]
    module: nn.Module | None = None


def check_export(learners: Sequence[Learner], facts: Mapping[str, Any]) -> None:
    """Refuse before training what could not be saved after it.

    Args:
        learners: The learners.
        facts: As for `export`.

    Raises:
        TypeError: If a student is not a timm model.
        ValueError: If a student or prompt path could not be built again from its record.
    """
    for learner in learners:
        check_student(learner.student, **_student_options(learner, {}, facts))
        record = _record(learner, {}, facts)
        try:
            json.dumps(record, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f'The options of {learner.name} cannot be recorded as JSON: {error}.') from error
        dual_teacher = learner.task.get_dual_teacher()
        if dual_teacher is not None:
            check_prompt_path(dual_teacher, label_names=facts['class_names'], training=record)


def export(learners: Sequence[Learner], results: Sequence[Results], facts: Mapping[str, Any]) -> None:
    """Save trained learners in the `output` of each: `student/` and, where there is one, `prompt_path/`.

    Of student and moving average the better on the validation data is saved.

    Args:
        learners: The learners.
        results: Of each, metrics by split (`val`, and others that are known) and model.
        facts: What the run was, recorded alongside the weights.
    """
    for learner, result in zip(learners, results, strict=True):
        learner.choose_published(result['val'])
        folder = RunFolder(str(learner.config.output))
        metrics = {split: measured[learner.published] for split, measured in result.items()}
        record = export_student(learner, metrics, folder.student, facts)
        dual_teacher = learner.task.get_dual_teacher()
        if dual_teacher is not None:
            save_prompt_path(dual_teacher, folder.prompt_path, label_names=facts['class_names'], training=record)


def describe_models(
    learners: Sequence[Learner], results: Sequence[Results], split: str, example: torch.Tensor | None
) -> dict[str, dict[str, Any]]:
    """Describe what was exported for `summary.json`, and measure what it costs.

    Args:
        learners: The learners.
        results: As for `export`.
        split: The split that is evaluated at the end.
        example: A batch `[B, C, H, W]` to measure with, if there is one.

    Returns:
        By name of the learner, for `teacher`, `prompt_path` and `student`: `name`, `metrics`, `val_metrics` and `cost`,
        and `input_size` (height and width) where it is not the student's; of a student that is deployed in another form
        (`timm.utils.reparameterize_model`) `cost` is of that form, and `cost_as_trained` of the one that is saved; of a
        student with a moving average also which of them is published (`weights`), and the metrics of the `other`; of
        one whose weights are those of the best epoch also that `epoch`. `None` stands for what could not be measured.
    """
    costs_of_teachers: dict[int, dict[str, Any] | None] = {}
    described: dict[str, dict[str, Any]] = {}
    for learner, result in zip(learners, results, strict=True):
        entries: dict[str, Any] = {}
        for role, model in _models(learner).items():
            known = costs_of_teachers.get(id(learner.teacher)) if role == 'teacher' else None
            cost = known
            if cost is None and example is not None:
                cost = measure_cost(model.forward, model.parameters, example, model.files)
            if role == 'teacher':
                # Those who learn from the same teacher share its numbers.
                costs_of_teachers[id(learner.teacher)] = cost
            key = learner.published if role == 'student' else role
            entries[role] = {'name': model.name, **_metrics(result, split, key), 'cost': cost}
            # The loader's, unless the images are resized for the teacher.
            size = getattr(getattr(learner.task, 'adapter', None), 'size', None)
            if role != 'student' and size:
                entries[role]['input_size'] = list(size)
            deployed = _deployed_cost(model, example)
            entries[role] |= {'cost': deployed, 'cost_as_trained': cost} if deployed else {}
            if role == 'teacher':
                entries[role] |= _head_facts(learner, 'head')
        if learner.epoch is not None:
            entries['student']['epoch'] = learner.epoch
        if learner.average is not None:
            (other,) = _WEIGHTS.keys() - {learner.published}
            entries['student']['weights'] = _WEIGHTS[learner.published]
            entries['student']['other'] = {'weights': _WEIGHTS[other], **_metrics(result, split, other)}
        described[learner.name] = entries
    return described


def _deployed_cost(model: _Model, example: torch.Tensor | None) -> dict[str, float | None] | None:
    """Measure what a student costs in the form that is deployed, if that is another than the one it is saved in."""
    module = model.module
    if module is None or example is None or not has_deployed_form(module):
        return None

    def measured() -> dict[str, float | None]:
        deployed = deployed_form(module).to(example.device)
        cost = measure_cost(deployed, list(deployed.parameters()), example, [])
        weights = {name: tensor.contiguous() for name, tensor in deployed.state_dict().items()}
        return {**cost, 'size_bytes': len(serialize(weights))}

    return attempt('folding the student', measured)


def _metrics(result: Results, split: str, key: str) -> dict[str, Any]:
    return {'metrics': result.get(split, {}).get(key), 'val_metrics': result['val'].get(key)}


def _models(learner: Learner) -> dict[str, _Model]:
    """Return the models of a learner by role."""
    config, task, folder = learner.config, learner.task, RunFolder(str(learner.config.output))
    models: dict[str, _Model] = {}
    if learner.teacher is not None:
        frozen = list(learner.teacher.parameters())
        teacher_folder = parse_source(str(config.teacher)).folder
        files = [teacher_folder / WEIGHTS] if teacher_folder else []
        run = task.teacher_features if isinstance(task, FeatureTask) else task.teacher_logits
        models['teacher'] = _Model(str(config.teacher), run, frozen, files)
        dual_teacher = task.get_dual_teacher()
        if dual_teacher is not None:
            path = dual_teacher.prompt_path
            parameters = [*(frozen if path.shares_backbone else path.borrowed_parameters()), *path.parameters()]
            files = [folder.prompt_path / PROMPT_WEIGHTS]
            models['prompt_path'] = _Model(config.method, task.prompt_logits, parameters, files)
    # In the precision of its weights, as the others: accelerate wraps what is trained in autocast.
    student = learner.accelerator.unwrap_model(learner.published_student, keep_fp32_wrapper=False)
    files = [folder.student / WEIGHTS]
    models['student'] = _Model(str(config.student), student, list(student.parameters()), files, student)
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
    record = {**_record(learner, metrics, facts), **more}
    save_student(learner.published_student, folder, **_student_options(learner, record, facts))
    return record


def _record(
    learner: Learner, metrics: Mapping[str, Mapping[str, float]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    config = learner.config
    options = public_options(config)
    if learner.freezes:
        # Of what is given as a share of the run, or not at all, what became of it.
        options['prompt_epochs'] = str(learner.task.prompt_epochs)
    return {
        'method': config.method,
        'teacher': options['teacher'],
        'prompt_path': config.push_prompt_path,
        'dataset': options['dataset'],
        'dataset_sizes': facts['dataset_sizes'],
        'seed': config.seed,
        'recipe': options,
        'licenses': _source_licenses(learner),
        **_head_facts(learner, 'teacher_head'),
        **({'teacher_precision': learner.precision} if learner.precision is not None else {}),
        **({'epoch': learner.epoch} if learner.epoch is not None else {}),
        **({'weights': _WEIGHTS[learner.published]} if config.model_ema else {}),
        'metrics': {split: dict(values) for split, values in metrics.items()},
    }


def _head_facts(learner: Learner, key: str) -> dict[str, Any]:
    """Return how the teacher's head was made, under a key; nothing for a published one."""
    head = fitted_head_of(learner.teacher)
    return {key: head.facts()} if head is not None else {}


def _source_licenses(learner: Learner) -> dict[str, str | None]:
    """Return the licenses of the models that a student's weights come from, see `timm_dfpt.hub.licenses`."""
    teacher = {'teacher': license_of(learner.teacher)} if learner.teacher is not None else {}
    return {**teacher, **({'start': license_of(learner.student)} if learner.config.student_pretrained else {})}


def _student_options(learner: Learner, record: Mapping[str, Any], facts: Mapping[str, Any]) -> StudentOptions:
    student: Any = learner.student
    return {
        'label_names': student.pretrained_cfg['label_names'],
        'data_config': facts['input_config'],
        'license': learner.config.license,
        'license_name': learner.config.license_name,
        'license_link': learner.config.license_link,
        'distillation': record,
    }
