"""What may be published of a finished run, read from its folder."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..data.checks import default_of
from ..data.paths import similar_path
from ..hub.base import hub_repo_of
from ..hub.cards import ModelRow, RunFacts
from ..hub.files import parse_yaml, read_json
from ..hub.privacy import public
from ..hub.sources import parse_source
from ..hub.student import DISTILLATION
from ..job.options import PATH_OPTIONS, TrainConfig
from .run_folder import RunFolder

__all__ = ['NOT_RECIPE', 'chosen_epoch', 'read_run']

# Options that say nothing about what was trained.
NOT_RECIPE = (
    'output', 'resume', 'push_to_hub', 'push_prompt_path', 'private', 'license', 'license_name', 'license_link',
    'log_with', 'log_interval', 'teacher_cache_dir', 'report', 'export', 'include_preprocessing',
)  # fmt: skip


def read_run(folder: RunFolder, prompt_path_repo: str | None = None) -> tuple[RunFacts, dict[str, Any]]:
    """Read what may be published of a run, and its options.

    Args:
        folder: The run folder.
        prompt_path_repo: Repository of the prompt path.

    Raises:
        FileNotFoundError: If there is no such run, or it is not finished.
    """
    if not folder.path.is_dir():
        hint = similar_path(str(folder))
        raise FileNotFoundError(f'{str(folder)!r} is not a folder{hint}: name the folder of a finished run.')
    for file in (folder.summary, folder.config):
        if not file.is_file():
            raise FileNotFoundError(
                f'{str(folder)!r} has no {file.name}: the run is not finished. Finish it with --resume.'
            )
    summary = read_json(folder.summary)
    record_file = folder.student / DISTILLATION
    # The record names local data and models without their folders; only the run could distinguish them from Hub ids.
    record = read_json(record_file) if record_file.is_file() else {}
    options = parse_yaml(folder.config.read_text(encoding='utf-8'))
    recipe = record.get('recipe') or public(options)
    paths = {key: options[key] for key in PATH_OPTIONS if options.get(key)}
    # What has no public name is not an id on the Hub.
    renamed = {path: recipe.get(key) or public(f'./{path}') for key, path in paths.items()}
    models = dict(summary.get('models', {}))
    models |= {f'{name} baseline': model for name, model in summary.get('baselines', {}).items()}
    split = str(summary.get('eval_split', 'val'))
    defaults = {field.name: default_of(field) for field in dataclasses.fields(TrainConfig)}
    chosen = {key: value for key, value in recipe.items() if value != defaults.get(key) and key not in NOT_RECIPE}
    facts = RunFacts(
        method=summary.get('method'),
        teacher=recipe.get('teacher'),
        dataset=record.get('dataset', summary.get('dataset')),
        eval_split=split,
        eval_size=summary.get('dataset_sizes', {}).get(split),
        rows=[_row(role, model, split) for role, model in models.items()],
        recipe={'method': summary.get('method'), **chosen},
        seed=summary.get('seed'),
        command=summary.get('command') or None,
        versions=summary.get('versions', {}),
        prompt_path=prompt_path_repo,
        teacher_head=record.get('teacher_head'),
        teacher_precision=record.get('teacher_precision'),
        student_base=_student_base(recipe),
        licenses=record.get('licenses', {}),
        exports=summary.get('exports', []),
        weights=chosen_epoch(summary),
        deployed=_deployed(summary.get('models', {}).get('student', {})),
    )
    return facts.public(renamed), recipe


def chosen_epoch(summary: Mapping[str, Any]) -> str | None:
    """Return in words which epoch the student of a run is of; `None` for the last of all that were asked for."""
    epochs, trained = summary.get('epochs'), summary.get('epochs_trained')
    best = summary.get('models', {}).get('student', {}).get('epoch')
    if best is not None:
        of = f'{epochs}' if trained in (None, epochs) else f'{trained} (of {epochs} at most)'
        return f'weights of epoch {best} of {of}, the best on the validation data'
    if trained not in (None, epochs):
        return f'weights of epoch {trained} of {epochs}, after which the validation data showed no more progress'
    return None


def _row(role: str, model: Mapping[str, Any], split: str) -> ModelRow:
    # What could not be measured is null.
    splits = {'val': model.get('val_metrics') or {}, split: model.get('metrics') or {}}
    return ModelRow(role, str(model.get('name', role)), splits, (model.get('cost') or {}).get('params'))


def _deployed(student: Mapping[str, Any]) -> Mapping[str, Any] | None:
    cost: Mapping[str, Any] | None = student.get('cost')
    return cost if 'cost_as_trained' in student else None


def _student_base(recipe: Mapping[str, Any]) -> str | None:
    if not recipe.get('student_pretrained'):
        return None
    source = parse_source(str(recipe.get('student')))
    return None if source.folder else hub_repo_of(str(source._replace(revision=None)))
