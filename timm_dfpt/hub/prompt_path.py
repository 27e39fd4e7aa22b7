"""Prompt paths on disk: `prompt_config.json` and `prompt_path.safetensors`; the base model by name and fingerprint."""
from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models._input import get_model_args
from torch import nn

from ..backbone.calibration import calibration_input
from ..backbone.input_size import input_size_of, set_input_size
from ..backbone.stages import find_stages
from ..backbone.types import Stage
from ..teacher.checks import find_classifier
from ..teacher.fitted_head import put_head
from ..teacher.head_record import fitted_head_of
from ..teacher.prompt_path import PromptPath
from ..teacher.teacher import DualForwardPathTeacher
from ..teacher.wrapping import open_stages
from ..version import __version__
from .base import RecordedBase, canonical_base, check_base, fingerprint, origin_of
from .build import BUILD_ERRORS, bounded, count_values, specs_of
from .config import Fingerprint, PromptPathRecord, check_label_names
from .files import (
    MAX_JSON_BYTES,
    TensorSpec,
    check_tensors,
    read_json,
    read_specs,
    read_tensors,
    write_json,
    write_tensors,
)
from .heads import head_of_record, head_tensors, published_fingerprint, without_head
from .options import PromptPathOptions, Unpack, check_options
from .repo import Source

__all__ = ['PROMPT_CONFIG', 'PROMPT_WEIGHTS', 'build_teacher', 'check_prompt_path', 'save_prompt_path']

PROMPT_CONFIG = 'prompt_config.json'
PROMPT_WEIGHTS = 'prompt_path.safetensors'


def save_prompt_path(
    teacher: DualForwardPathTeacher, save_directory: str | os.PathLike[str], **options: Unpack[PromptPathOptions]
) -> Path:
    """Save the prompt path alone; the base model is recorded by id, revision and fingerprint.

    Args:
        teacher: The teacher.
        save_directory: Folder, created if it does not exist.
        **options: `base_model`, `base_revision`, `label_names`, `data_config`, `training`; see
            `timm_dfpt.hub.PromptPathOptions`.

    Returns:
        The folder.

    Raises:
        TypeError: If `teacher` is not a `DualForwardPathTeacher`, or there is no such option.
        ValueError: If a weight is not finite, or an option does not fit the teacher.

    Example:
        >>> timm_dfpt.save_prompt_path(teacher, 'my-prompt-path', base_model='hf-hub:user/teacher')
    """
    record = _record_of(teacher, options)
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / PROMPT_WEIGHTS, {**teacher.prompt_path.state_dict(), **head_tensors(teacher.model)})
    write_json(folder / PROMPT_CONFIG, record.to_dict())
    return folder


def check_prompt_path(teacher: DualForwardPathTeacher, **options: Unpack[PromptPathOptions]) -> None:
    """Refuse what `save_prompt_path` would, except weights that are not finite, and write nothing.

    Args:
        teacher: As in `save_prompt_path`.
        **options: As in `save_prompt_path`.

    Raises:
        TypeError: If `save_prompt_path` would raise it.
        ValueError: If `save_prompt_path` would raise it.
    """
    _record_of(teacher, options)


def _record_of(teacher: DualForwardPathTeacher, options: PromptPathOptions) -> PromptPathRecord:
    """Return what `prompt_config.json` says of a teacher."""
    check_options(options, PromptPathOptions)
    if not isinstance(teacher, DualForwardPathTeacher):
        raise TypeError(f'teacher must be made by timm_dfpt.wrap, got {type(teacher).__name__}.')
    base: Any = teacher.model
    cfg = getattr(base, 'pretrained_cfg', None) or {}
    base_model = canonical_base(options.get('base_model'))
    known_model, known_revision = origin_of(base) if base_model is None else (base_model or None, None)
    num_classes = teacher.prompt_path.num_classes
    label_names = options.get('label_names')
    if label_names is None and len(cfg.get('label_names') or ()) == num_classes:
        label_names = cfg['label_names']
    if label_names is not None:
        check_label_names(label_names, num_classes)
    data_config = options.get('data_config')
    if data_config is None:
        data_config = resolve_model_data_config(base) if cfg else {}
    architecture = cfg.get('architecture')
    path, head = teacher.prompt_path, fitted_head_of(base)
    record = PromptPathRecord(
        variant=teacher.variant,
        base_model=known_model,
        base_revision=options.get('base_revision') or known_revision,
        base_architecture=architecture,
        base_model_args=get_model_args(base) if architecture else {},
        base_fingerprint=published_fingerprint(base),
        input_size=input_size_of(base),
        num_classes=num_classes,
        stages=teacher.stages,
        classifier=path.classifier,
        prompt=path.config,
        label_names=list(label_names) if label_names is not None else None,
        data_config=dict(data_config),
        fitted_head=head.facts() if head is not None else None,
        training=dict(options.get('training') or {}),
        timm_dfpt_version=__version__,
        timm_version=timm.__version__,
    )
    return record.validated()


def build_teacher(source: Source, model: nn.Module | None = None) -> DualForwardPathTeacher:
    """Build a saved prompt path, on the base model that it names or on the one that is given.

    The config is validated and compared with the header of the weights file before anything large is downloaded or
    any memory is taken.

    Args:
        source: Folder or repository.
        model: The base model. Default: rebuilt through timm from its recorded id and revision. Where the prompt path
            is of another input size than its own, a copy of it is set to that.

    Returns:
        The teacher, in evaluation mode.

    Raises:
        HubError: If a file is unavailable or damaged.
        ValueError: If the files are not of one valid prompt path, or the base is another one.
    """
    record = PromptPathRecord.from_dict(read_json(source.get(PROMPT_CONFIG, MAX_JSON_BYTES)))
    weights = source.get(PROMPT_WEIGHTS)
    found = read_specs(weights)
    if any(name.startswith('head.') for name in found):
        # Format 1 said no where num_classes alone had asked for a new head.
        record = dataclasses.replace(record, prompt=dataclasses.replace(record.prompt, new_head=True))
    name = f'{PROMPT_WEIGHTS} of {source.name}'
    if model is None:
        base = RecordedBase(record, source)
        _check_fits(base.build_meta(), record, name, found)
        model = base.build()
    else:
        _check_fits(_meta_twin(model), record, name, found)
    check_base(record, _fingerprint(model, record))
    size = input_size_of(model)
    if size not in (None, record.input_size):
        wanted = 'its own input size' if record.input_size is None else f'input_size={record.input_size}'
        raise ValueError(f'{source.name} was tuned on the base model at {wanted}, not at {size}.')
    if record.input_size is not None and size is None:
        # The model that was given stays as it is.
        model = copy.deepcopy(model)
        set_input_size(model, record.input_size)
    path, head = without_head(read_tensors(weights))
    teacher = _wrap(_with_head(model, record, head), record)
    teacher.prompt_path.load_state_dict(path, strict=True)
    return teacher.eval()


def _fingerprint(base: nn.Module, record: PromptPathRecord) -> Fingerprint:
    """Return the fingerprint of what a record names: with a fitted head, of the published model below it."""
    return fingerprint(base) if record.fitted_head is None else published_fingerprint(base)


def _with_head(base: nn.Module, record: PromptPathRecord, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return the base with its fitted head: itself if it has that already, else a copy."""
    if record.fitted_head is None:
        return base
    head, known = head_of_record(record.fitted_head, tensors), fitted_head_of(base)
    if known is not None and known.equals(head):
        return base
    return put_head(base, head, record.label_names)


def _check_fits(twin: Any, record: PromptPathRecord, name: str, found: Mapping[str, TensorSpec]) -> None:
    """Compare what is saved with a base without memory.

    Args:
        twin: The base.
        record: What is saved.
        name: The weights file, for messages.
        found: Shapes and dtypes in it.

    Raises:
        ValueError: If the base is another one, cannot be opened as the config says, or takes other tensors.
    """
    check_base(record, _fingerprint(twin, record), shapes_only=True)
    found, head = without_head(found)
    try:
        with bounded(len(found), count_values(found)), torch.device('meta'):
            if record.input_size is not None:
                set_input_size(twin, record.input_size)
            if record.fitted_head is not None:
                empty = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in head.items()}
                twin = put_head(twin, head_of_record(record.fitted_head, empty))
            size = _input_size(twin, record)
            _check_stages(find_stages(twin, _modules(record), size), record)
            path = PromptPath(
                twin,
                record.stages,
                record.prompt,
                variant=record.variant,
                classifier=find_classifier(twin, record.classifier, record.num_classes),
                num_classes=_new_classes(twin, record),
                x=calibration_input(twin, size),
            )
            if path.classifier != record.classifier:
                raise ValueError(f'its classifier is {path.classifier}, not {record.classifier}')
    except BUILD_ERRORS as error:
        raise ValueError(f'The base model does not fit the prompt path: {error}') from error
    check_tensors(name, found, specs_of(path))


def _check_stages(found: Sequence[Stage], record: PromptPathRecord) -> None:
    """Compare the stages of a base with the recorded ones in what decides about shapes."""
    for stage, recorded in zip(found, record.stages, strict=True):
        features, known = ([(f.index, f.channels, f.layout) for f in s.features] for s in (stage, recorded))
        if features != known:
            raise ValueError(
                f'{PROMPT_CONFIG} records the features {known} for {recorded.module!r}, but the base model has '
                f'{features}.'
            )


def _wrap(base: Any, record: PromptPathRecord) -> DualForwardPathTeacher:
    return open_stages(
        base,
        _modules(record),
        close_last=False,
        prompt=record.prompt,
        variant=record.variant,
        classifier=record.classifier,
        num_classes=_new_classes(base, record),
        input_size=_input_size(base, record),
    )


def _modules(record: PromptPathRecord) -> list[str]:
    return [stage.module for stage in record.stages]


def _new_classes(base: Any, record: PromptPathRecord) -> int | None:
    """Return the number of classes where it is not the base's."""
    if not find_classifier(base, record.classifier, record.num_classes):
        return record.num_classes
    return record.num_classes if record.num_classes != getattr(base, 'num_classes', record.num_classes) else None


def _input_size(base: Any, record: PromptPathRecord) -> tuple[int, int, int] | None:
    """timm's models say which size they take; of others only the recorded one is known to be good."""
    size = record.data_config.get('input_size')
    return tuple(size) if size and not getattr(base, 'pretrained_cfg', None) else None


def _meta_twin(model: nn.Module) -> nn.Module:
    """Copy a model without its values."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to('meta'), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): b.detach().to('meta') for b in model.buffers()}
    return copy.deepcopy(model, memo)
