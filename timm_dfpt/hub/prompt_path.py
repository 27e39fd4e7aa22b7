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

from ..backbone.stages import find_stages
from ..backbone.types import Stage
from ..teacher.prompt_path import PromptPath
from ..teacher.teacher import DualForwardPathTeacher
from ..teacher.wrapping import open_stages
from ..version import __version__
from .base import build_base, build_meta_base, check_base, fingerprint, origin_of
from .config import PromptPathRecord, check_label_names
from .download import Source
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
from .student import BUILD_ERRORS, specs_of

__all__ = ['PROMPT_CONFIG', 'PROMPT_WEIGHTS', 'describe', 'load_prompt_path', 'save_prompt_path']

PROMPT_CONFIG = 'prompt_config.json'
PROMPT_WEIGHTS = 'prompt_path.safetensors'


def save_prompt_path(
    teacher: DualForwardPathTeacher,
    save_directory: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Save the prompt path alone; the base model is recorded by id, revision and fingerprint.

    Args:
        teacher: The teacher.
        save_directory: Folder, made where it does not exist.
        base_model: Where the base model can be had: `'hf-hub:user/name'` or a timm name. Default: where timm loaded it
            from; for a model from a local folder, or with `''`, nowhere: the prompt path then needs `model=` to load.
        base_revision: Commit of the base's repository. Default: the one in the local cache.
        label_names: A name for each class. Default: the base's, where it has them.
        data_config: Preprocessing of the base's input. Default: the base's.
        training: Facts about the training, JSON values.

    Returns:
        The folder.

    Raises:
        TypeError: `teacher` is no `DualForwardPathTeacher`.
        ValueError: A weight is not finite, or an argument does not fit the teacher.
    """
    config = describe(
        teacher,
        base_model=base_model,
        base_revision=base_revision,
        label_names=label_names,
        data_config=data_config,
        training=training,
    )
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / PROMPT_WEIGHTS, teacher.prompt_path.state_dict())
    write_json(folder / PROMPT_CONFIG, config.to_dict())
    return folder


def describe(
    teacher: DualForwardPathTeacher,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> PromptPathRecord:
    """Return what `prompt_config.json` says of a teacher. Arguments as in `save_prompt_path`.

    Raises:
        TypeError: `teacher` is no `DualForwardPathTeacher`.
        ValueError: An argument does not fit it.
    """
    if not isinstance(teacher, DualForwardPathTeacher):
        raise TypeError(f'teacher must be made by timm_dfpt.wrap, got {type(teacher).__name__}.')
    base: Any = teacher.model
    cfg = getattr(base, 'pretrained_cfg', None) or {}
    known_model, known_revision = origin_of(base) if base_model is None else (base_model or None, None)
    num_classes = _num_classes(teacher)
    if label_names is None and len(cfg.get('label_names') or ()) == num_classes:
        label_names = cfg['label_names']
    if label_names is not None:
        check_label_names(label_names, num_classes)
    if data_config is None:
        data_config = resolve_model_data_config(base) if cfg else {}
    architecture = cfg.get('architecture')
    path = teacher.prompt_path
    config = PromptPathRecord(
        variant=teacher.variant,
        base_model=known_model,
        base_revision=base_revision or known_revision,
        base_architecture=architecture,
        base_model_args=get_model_args(base) if architecture else {},
        base_fingerprint=fingerprint(base),
        num_classes=num_classes,
        stages=teacher.stages,
        classifier=path.classifier,
        prompt=path.config,
        label_names=list(label_names) if label_names is not None else None,
        data_config=dict(data_config),
        train_bn=path.train_bn,
        training=dict(training or {}),
        timm_dfpt_version=__version__,
        timm_version=timm.__version__,
    )
    return config.validated()


def _num_classes(teacher: DualForwardPathTeacher) -> int:
    head = teacher.prompt_path.model.get_submodule(teacher.prompt_path.classifier[0])
    base: Any = teacher.prompt_path.model
    classes = getattr(base, 'num_classes', None) or getattr(head, 'out_features', None)
    return int(classes or 0)


def load_prompt_path(source: Source, model: nn.Module | None = None) -> DualForwardPathTeacher:
    """Load a prompt path and the base model that it belongs to, or put it on a base that is at hand.

    The config is validated and compared with the header of the weights file before anything large is downloaded or
    any memory is taken.

    Args:
        source: Folder or repository.
        model: The base model. Default: rebuilt through timm from its recorded id and revision.

    Returns:
        The teacher, in evaluation mode.

    Raises:
        HubError: A file cannot be had or is damaged.
        ValueError: The files are not of one valid prompt path, or the base is another one.
    """
    config = PromptPathRecord.from_dict(read_json(source.get(PROMPT_CONFIG, MAX_JSON_BYTES)))
    weights = source.get(PROMPT_WEIGHTS)
    found = read_specs(weights)
    if any(name.startswith('head.') for name in found):
        # Format 1 said no where num_classes alone had asked for a new head.
        config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, new_head=True))
    twin = _meta_twin(model) if model is not None else build_meta_base(config, source)
    check_base(config, fingerprint(twin), shapes_only=True)
    check_tensors(f'{PROMPT_WEIGHTS} of {source.name}', found, _expected(twin, config))
    base = model if model is not None else build_base(config, source)
    check_base(config, fingerprint(base))
    teacher = _wrap(base, config)
    teacher.prompt_path.load_state_dict(read_tensors(weights), strict=True)
    return teacher.eval()


def _expected(twin: Any, config: PromptPathRecord) -> dict[str, TensorSpec]:
    """Return the tensors that a prompt path has on a base without memory.

    Raises:
        ValueError: The base cannot be opened as the config says.
    """
    try:
        with torch.device('meta'):
            _check_stages(find_stages(twin, _modules(config), _input_size(twin, config)), config)
            path = PromptPath(
                twin,
                config.stages,
                config.prompt,
                variant=config.variant,
                classifier=config.classifier,
                num_classes=_new_classes(twin, config),
            )
    except BUILD_ERRORS as error:
        raise ValueError(f'The base model cannot be opened as the prompt path asks: {error}') from error
    return specs_of(path)


def _check_stages(found: Sequence[Stage], config: PromptPathRecord) -> None:
    """Compare the stages of a base with the recorded ones in what decides about shapes."""
    for stage, recorded in zip(found, config.stages, strict=True):
        features, known = ([(f.index, f.channels, f.layout) for f in s.features] for s in (stage, recorded))
        if features != known:
            raise ValueError(
                f'{PROMPT_CONFIG} says that {recorded.module!r} has the features {known}, but it has {features}.'
            )


def _wrap(base: Any, config: PromptPathRecord) -> DualForwardPathTeacher:
    return open_stages(
        base,
        _modules(config),
        close_last=False,
        prompt=config.prompt,
        variant=config.variant,
        classifier=config.classifier,
        num_classes=_new_classes(base, config),
        train_bn=config.train_bn,
        input_size=_input_size(base, config),
    )


def _modules(config: PromptPathRecord) -> list[str]:
    return [stage.module for stage in config.stages]


def _new_classes(base: Any, config: PromptPathRecord) -> int | None:
    """Return the number of classes where it is not the base's."""
    return config.num_classes if config.num_classes != getattr(base, 'num_classes', config.num_classes) else None


def _input_size(base: Any, config: PromptPathRecord) -> tuple[int, int, int] | None:
    """timm's models say which size they take; of others only the recorded one is known to be good."""
    size = config.data_config.get('input_size')
    return tuple(size) if size and not getattr(base, 'pretrained_cfg', None) else None


def _meta_twin(model: nn.Module) -> nn.Module:
    """Copy a model without its values."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to('meta'), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): b.detach().to('meta') for b in model.buffers()}
    return copy.deepcopy(model, memo)
