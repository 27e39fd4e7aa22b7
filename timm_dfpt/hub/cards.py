"""Model cards of students and prompt paths: front matter that the Hub understands, and text from templates."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..tasks.evaluation import SCORES
from ..tasks.methods import METHODS
from ..version import __version__
from .card_text import (
    args_text,
    cell_text,
    classes_text,
    fact_cells,
    hub_link,
    input_text,
    is_hub_id,
    recipe_text,
    slug,
)
from .config import PromptPathRecord
from .export_table import exports_table
from .heads import describe_head, describe_precision
from .licenses import License, source_facts, source_terms
from .markdown import html_color, markdown_table
from .privacy import public, public_command

__all__ = ['ModelRow', 'RunFacts', 'prompt_path_card', 'student_card']

_ROLES = {'teacher': 'Teacher', 'prompt_path': 'Prompt path', 'student': 'Student'}
_VERSIONS = {'timm_dfpt': __version__, 'timm': timm.__version__, 'torch': str(torch.__version__)}
_TEMPLATES = Path(__file__).parent / 'templates'


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """One model of a run.

    Args:
        role: `'teacher'`, `'prompt_path'`, `'student'`, or what else it is.
        name: Architecture or id.
        splits: By split, `top1` (and `top5`) in percent and whatever else was measured on it.
        params: Number of parameters, if known.
    """

    role: str
    name: str
    splits: Mapping[str, Mapping[str, float]]
    params: int | None = None


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What a card says of the run that a model is from. What is unknown is left out.

    Args:
        method: As given to `train/distill.py --method`.
        teacher: Id or name of the teacher.
        dataset: Id or name of the dataset.
        eval_split: Split that the table is of.
        eval_size: Number of images in it.
        rows: The models that were measured.
        recipe: The resolved options.
        seed: Random seed.
        command: The command that started the run.
        versions: Versions by package name.
        prompt_path: Repository of the prompt path.
        teacher_head: How the teacher's head was made, see `FittedHead.facts`, where it is not the published one.
        teacher_precision: How far a teacher in half precision is from that in float32, see `describe_precision`.
        exports: The files that the student was exported to, rows of `summary.json`'s `exports`.
        deployed: What the student costs in the form that is deployed, where that is another than the saved one.
        weights: Of which epoch the student's weights are, in words, where they are not those of the last.
        student_base: Repository that the student's weights started from; `None` if there is none.
        licenses: Licenses of the models that the weights come from, see `source_facts`.
    """

    method: str | None = None
    teacher: str | None = None
    dataset: str | None = None
    eval_split: str | None = None
    eval_size: int | None = None
    rows: Sequence[ModelRow] = ()
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    command: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prompt_path: str | None = None
    teacher_head: Mapping[str, Any] | None = None
    teacher_precision: Mapping[str, Any] | None = None
    student_base: str | None = None
    licenses: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    exports: Sequence[Mapping[str, Any]] = ()
    deployed: Mapping[str, Any] | None = None
    weights: str | None = None

    def public(self, renamed: Mapping[str, str] | None = None) -> RunFacts:
        """Return the facts without the folders of this machine.

        Args:
            renamed: What values in the command are called in public, where that is known.
        """
        shown = {name: public(getattr(self, name)) for name in ('teacher', 'dataset', 'recipe', 'student_base')}
        rows = [dataclasses.replace(row, name=public(row.name)) for row in self.rows]
        command = self.command and public_command(self.command, renamed or {})
        return dataclasses.replace(self, rows=rows, command=command, **shown)


def student_card(
    repo_id: str,
    config: Mapping[str, Any],
    *,
    params: int,
    license: License | None = None,
    run: RunFacts | None = None,
    curves: str | None = None,
    figures: Mapping[str, str] | None = None,
    registered_by: str | None = None,
    background: str | None = None,
) -> ModelCard:
    """Write the card of a student.

    Args:
        repo_id: Repository it is for.
        config: Its `config.json`.
        params: Number of its parameters.
        license: License of the weights.
        run: The run it is from.
        curves: File name of the figure of the curves.
        figures: Further figures: what they show, by file name.
        registered_by: Module that registers its architecture with timm; `None` if timm itself does.
        background: Color `#rrggbb` behind transparent images, if not what the run's recipe says.

    Returns:
        The card.
    """
    run = (run or RunFacts()).public()
    classes, cfg = config['num_classes'], config['pretrained_cfg']
    purpose = f'for images of {classes} classes' if classes else 'a backbone without classes'
    taught = f', distilled from `{run.teacher}` with {_method_name(run.method)}' if run.teacher else ''
    facts = {
        'Architecture': f'`{config["architecture"]}`' + args_text(config.get('model_args')),
        'Parameters': f'{params:,}' + (' as saved' if run.deployed else ''),
        'Deployed': _deployed_text(run.deployed),
        'Input': input_text(cfg),
        'Started from': _start_text(run),
        'Teacher': hub_link(run.teacher),
        "Teacher's head": describe_head(run.teacher_head),
        "Teacher's precision": describe_precision(run.teacher_precision),
        'Prompt path': hub_link(run.prompt_path),
        **_common_facts(run, license),
    }
    task = 'image-classification' if classes else 'image-feature-extraction'
    data = _card_data(
        repo_id,
        license or License(),
        run,
        role='student',
        library_name='timm',
        tags=[task, 'timm', *([] if registered_by or not classes else ['transformers']), *_tags(run.method)],
        base_model=run.student_base,
        base_model_relation='finetune' if run.student_base else None,
    )
    return _render(
        'student.md',
        data,
        run,
        terms=source_terms(run.licenses),
        repo_id=repo_id,
        summary=f'`{config["architecture"]}` with {params:,} parameters, {purpose}{taught}.',
        facts=fact_cells(facts),
        architecture=config['architecture'],
        registered_by=registered_by,
        background=html_color(background or run.recipe.get('background')),
        image_mode='L' if cfg['input_size'][0] == 1 else 'RGB',
        method=_method_text(run.method),
        num_classes=classes,
        classes=classes_text(config.get('label_names')),
        teacher=run.teacher,
        limits=f'It sees {input_text(cfg, short=True)}.',
        curves=curves,
        figures={name: cell_text(caption) for name, caption in (figures or {}).items()},
        exports=exports_table(run.exports) if run.exports else '',
    )


def prompt_path_card(
    repo_id: str,
    config: PromptPathRecord,
    *,
    params: int,
    size_bytes: int,
    base_link: str | None = None,
    teacher_license: str | None = None,
    license: License | None = None,
    run: RunFacts | None = None,
    curves: str | None = None,
) -> ModelCard:
    """Write the card of a prompt path.

    Args:
        repo_id: Repository it is for.
        config: Its `prompt_config.json`.
        params: Number of its own parameters.
        size_bytes: Size of its weights file.
        base_link: Repository of the base model, for the Hub's model tree.
        teacher_license: License of its weights, where the run does not say it.
        license: License of the weights.
        run: The run it is from.
        curves: File name of the figure of the curves.

    Returns:
        The card.
    """
    run = (run or RunFacts(method=config.variant)).public()
    # Nothing of a student's pretrained weights is in the prompt path except through their outputs.
    licenses = {'teacher': run.licenses.get('teacher', teacher_license)}
    run = dataclasses.replace(run, licenses=licenses)
    base = config.base_model or config.base_architecture or 'a model that is not of timm'
    facts = {
        'Variant': f'`{config.variant}`',
        'Teacher': hub_link(base_link) if base_link else f'`{base}`',
        'Teacher revision': f'`{config.base_revision}`' if config.base_revision else None,
        "Teacher's head": describe_head(config.fitted_head),
        'Teacher fingerprint': str(config.base_fingerprint),
        'Parameters': f'{params:,} of its own, {100 * params / config.base_fingerprint.parameters:.1f}% of the teacher',
        'File': f'{size_bytes:,} bytes',
        'Blocks after': ', '.join(f'`{stage.module}`' for stage in config.stages),
        'Blocks': ', '.join(f'{key} {value}' for key, value in config.prompt.to_dict().items() if value is not None),
        'Input': input_text(config.data_config) if config.data_config else None,
        **_common_facts(run, license),
    }
    data = _card_data(
        repo_id,
        license or License(),
        run,
        role='prompt_path',
        library_name='timm_dfpt',
        tags=['image-classification', 'timm', *_tags(config.variant)],
        base_model=base_link,
        base_model_relation='adapter' if base_link else None,
    )
    return _render(
        'prompt_path.md',
        data,
        run,
        terms=source_terms(licenses),
        repo_id=repo_id,
        summary=f"A prompt path of {params:,} parameters for the frozen teacher `{base}`; it adapts the teacher's "
                f'predictions to what a smaller student can learn, for {config.num_classes} classes.',
        facts=fact_cells(facts),
        base_model=config.base_model,
        base_link=hub_link(base_link) if base_link else f'`{base}`',
        reuse=' '.join(
            [
                *(['--teacher local-dir:teacher'] if config.base_model is None else []),
                f'--dataset {run.dataset if is_hub_id(run.dataset) else "images"}',
                f'--student {run.recipe.get("student", "resnet18")}',
            ]
        ),
        variant=config.variant,
        background=html_color(run.recipe.get('background')),
        image_mode='L' if (config.data_config.get('input_size') or [3])[0] == 1 else 'RGB',
        method=_method_text(config.variant),
        num_classes=config.num_classes,
        classes=classes_text(config.label_names),
        curves=curves,
    )


def _render(template: str, data: ModelCardData, run: RunFacts, **values: Any) -> ModelCard:
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATES / template),
        title=values['repo_id'].split('/')[-1],
        results=_table(run),
        results_note=_results_note(run),
        recipe=recipe_text(run.recipe),
        command=run.command,
        versions=', '.join(f'{name} {version}' for name, version in (run.versions or _VERSIONS).items()),
        **values,
    )


def _card_data(repo_id: str, license: License, run: RunFacts, role: str, **values: Any) -> ModelCardData:
    dataset = run.dataset if is_hub_id(run.dataset) else None
    splits = next((row.splits for row in run.rows if row.role == role), {})
    results = [
        EvalResult(
            task_type=values['tags'][0],
            task_name=values['tags'][0].replace('-', ' ').title(),
            dataset_type=dataset or slug(run.dataset),
            dataset_name=run.dataset or 'unknown',
            dataset_split=split,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for split, metrics in splits.items()
        for kind, name, value in map(_metric, metrics.items())
        if math.isfinite(value)
    ]
    return ModelCardData(
        **license.metadata(),
        pipeline_tag=values['tags'][0],
        datasets=[dataset] if dataset else None,
        metrics=['accuracy'] if any('top1' in metrics for metrics in splits.values()) else None,
        model_name=repo_id.split('/')[-1] if results else None,
        eval_results=results or None,
        **{key: value for key, value in values.items() if value is not None},
    )


def _metric(item: tuple[str, float]) -> tuple[str, str, float]:
    """Return type, name and value as the Hub has them, where accuracies are fractions."""
    key, value = item
    known = {'top1': ('accuracy', 'Accuracy (top-1)'), 'top5': ('top_5_accuracy', 'Accuracy (top-5)')}
    if key in known:
        return (*known[key], round(value / 100, 6))
    return key, key.replace('_', ' '), round(value, 6)


def _table(run: RunFacts) -> str:
    if not run.rows:
        return ''
    split = run.eval_split or next(iter(run.rows[0].splits), '')
    metrics = [row.splits.get(split, {}) for row in run.rows]
    labelled = any('top1' in m for m in metrics)
    titles = {'top1': SCORES['top1'], 'top5': 'top-5 %'} if labelled else SCORES
    shown = [key for key in titles if any(key in m for m in metrics)]
    head = ['', 'model', *(f'{split} {titles[key]}' for key in shown), 'parameters']
    rows = []
    for row, measured in zip(run.rows, metrics, strict=True):
        cells = [_ROLES.get(row.role, row.role.replace('_', ' ')), cell_text(row.name)]
        cells += [f'{measured[key]:.2f}' if key in measured else '' for key in shown]
        cells.append(f'{row.params:,}' if row.params is not None else '')
        rows.append(cells)
    return markdown_table(head, rows, text_columns=2)


def _results_note(run: RunFacts) -> str:
    size = f' ({run.eval_size:,} images)' if run.eval_size else ''
    seed = f', seed {run.seed}' if run.seed is not None else ''
    where = f'the {run.eval_split} split{size} of {hub_link(run.dataset)}' if run.dataset else f'{run.eval_split}{size}'
    return f'Measured on {where}. All numbers are of one run{seed}, so that small differences are not significant.'


def _deployed_text(cost: Mapping[str, Any] | None) -> str | None:
    if not cost:
        return None
    parts = [f'{cost["params"]:,} parameters']
    parts += [f'{cost["macs"]:,} MACs'] if cost.get('macs') else []
    parts += [f'{cost["size_bytes"]:,} bytes'] if cost.get('size_bytes') else []
    parts += [f'{cost["images_per_s"]:,.0f} images/s'] if cost.get('images_per_s') else []
    return f'{", ".join(parts)}, after `timm.utils.reparameterize_model(model)`; logits stay the same'


def _start_text(run: RunFacts) -> str | None:
    if run.student_base:
        return hub_link(run.student_base)
    if 'start' in run.licenses:
        return 'pretrained weights that are not on the Hub'
    return 'random weights' if run.method else None


def _common_facts(run: RunFacts, license: License | None) -> dict[str, str | None]:
    return {
        **source_facts(run.licenses),
        'Training data': hub_link(run.dataset),
        'Method': _method_name(run.method) if run.method else None,
        'Epoch': run.weights,
        'License': str(license or License()),
    }


def _method_name(method: str | None) -> str:
    return METHODS[method].label if method in METHODS else str(method)


def _method_text(method: str | None) -> str:
    if method is None:
        return ''
    if method in METHODS and METHODS[method].description:
        return METHODS[method].description
    return f'Distilled from one teacher with `{method}`; the recipe below has its weights and temperature.'


def _tags(method: str | None) -> list[str]:
    # A method that this version does not know is one of distillation.
    known = METHODS.get(str(method))
    tags = ['timm_dfpt']
    if method is not None and (known is None or known.needs_teacher):
        tags.append('knowledge-distillation')
    return [*tags, 'arxiv:2506.18244'] if known is not None and known.variant else tags
