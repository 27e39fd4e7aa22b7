"""Loading what timm_dfpt has saved or published with one line."""
from __future__ import annotations

import os
from typing import overload

from torch import nn

from ..teacher.teacher import DualForwardPathTeacher
from .build import CONFIG
from .files import MAX_JSON_BYTES, read_json
from .options import LoadOptions, Unpack
from .prompt_path import PROMPT_CONFIG, build_teacher
from .repo import Source, open_source
from .student import build_student

__all__ = ['from_pretrained', 'load_student', 'load_teacher']

# Files by which repositories of other libraries are known.
_OTHERS = {
    'adapter_config.json': 'a PEFT adapter',
    'model_index.json': 'a diffusers pipeline',
    'open_clip_config.json': 'an OpenCLIP model',
    'config_sentence_transformers.json': 'a sentence-transformers model',
    'tokenizer.json': 'a language model or tokenizer',
}


def load_student(
    pretrained_model_name_or_path: str | os.PathLike[str], **options: Unpack[LoadOptions]
) -> nn.Module:
    """Load a student, or any other model in timm's layout with safetensors.

    Only safetensors are read. Downloaded files are compared with the hashes that the Hub gives; configs are validated
    before anything is built.

    Args:
        pretrained_model_name_or_path: Repository `'user/name'` on the Hub, or a local folder.
        **options: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `subfolder`; see
            `timm_dfpt.hub.LoadOptions`.

    Returns:
        The timm model, in evaluation mode.

    Raises:
        HubError: If it is unavailable, or what was downloaded is damaged; the message says what to do.
        FileNotFoundError: If there is no such folder.
        TypeError: If there is no such option.
        ValueError: If it is of another kind, or its files are not of one valid model.

    Example:
        >>> student = timm_dfpt.load_student('user/resnet18-student')
    """
    source = open_source(pretrained_model_name_or_path, **options)
    if source.has(PROMPT_CONFIG):
        raise ValueError(
            f'{source.name!r} is a prompt path, not a student. Load it with timm_dfpt.load_teacher({source.name!r}).'
        )
    _check_student(source)
    return build_student(source)


def load_teacher(
    pretrained_model_name_or_path: str | os.PathLike[str],
    model: nn.Module | None = None,
    **options: Unpack[LoadOptions],
) -> DualForwardPathTeacher:
    """Load a prompt path, on the base model that it names or on `model`.

    Args:
        pretrained_model_name_or_path: Repository `'user/name'` on the Hub, or a local folder.
        model: The base model that the prompt path was tuned on. Default: it is rebuilt through timm.
        **options: See `load_student`; token, cache and offline mode are also those for the base.

    Returns:
        The teacher, in evaluation mode.

    Raises:
        HubError: If it or its base is unavailable, or what was downloaded is damaged; the message says what to do.
        FileNotFoundError: If there is no such folder.
        TypeError: If there is no such option.
        ValueError: If it is of another kind, its files are not of one valid prompt path, or the base is another one.

    Example:
        >>> teacher = timm_dfpt.load_teacher('user/resnet50-prompt')
    """
    source = open_source(pretrained_model_name_or_path, **options)
    if not source.has(PROMPT_CONFIG):
        _check_student(source)
        raise ValueError(
            f'{source.name!r} is a student, not a prompt path. Load it with timm_dfpt.load_student({source.name!r}).'
        )
    return build_teacher(source, model)


@overload
def from_pretrained(
    pretrained_model_name_or_path: str | os.PathLike[str], model: nn.Module, **options: Unpack[LoadOptions]
) -> DualForwardPathTeacher: ...


@overload
def from_pretrained(
    pretrained_model_name_or_path: str | os.PathLike[str], model: None = None, **options: Unpack[LoadOptions]
) -> nn.Module: ...


def from_pretrained(
    pretrained_model_name_or_path: str | os.PathLike[str],
    model: nn.Module | None = None,
    **options: Unpack[LoadOptions],
) -> nn.Module:
    """Load a prompt path (as by `load_teacher`) or a student (as by `load_student`), whichever it is.

    Args:
        pretrained_model_name_or_path: Repository `'user/name'` on the Hub, or a local folder.
        model: Prompt paths only: the base model. Default: it is rebuilt through timm.
        **options: See `load_student`.

    Returns:
        A `DualForwardPathTeacher` or a timm model, in evaluation mode.

    Raises:
        HubError: If it is unavailable, or what was downloaded is damaged; the message says what to do.
        FileNotFoundError: If there is no such folder.
        TypeError: If there is no such option.
        ValueError: If it is of a third kind, or its files are not of one valid model.

    Example:
        >>> teacher = timm_dfpt.from_pretrained('user/resnet50-prompt')
        >>> student = timm_dfpt.from_pretrained('user/resnet18-student')
    """
    source = open_source(pretrained_model_name_or_path, **options)
    if source.has(PROMPT_CONFIG):
        return build_teacher(source, model)
    _check_student(source)
    if model is not None:
        raise ValueError(f'{source.name} is a student, which needs no base model: leave model= out.')
    return build_student(source)


def _check_student(source: Source) -> None:
    """Refuse what other libraries have published, by name."""
    names = source.names() or []
    for name, kind in _OTHERS.items():
        if name in names:
            raise ValueError(f'{source.name} holds {kind} ({name}), and neither a prompt path nor a timm model.')
    if names and CONFIG not in names:
        raise ValueError(
            f'{source.name} holds neither a prompt path ({PROMPT_CONFIG}) nor a timm model ({CONFIG}), but '
            f'{", ".join(names[:5])}.'
        )
    if not names and source.folder is not None:
        raise ValueError(
            f'{source.name} is an empty folder: name one that save_student or save_prompt_path has written.'
        )
    config = read_json(source.get(CONFIG, MAX_JSON_BYTES))
    if 'architecture' not in config:
        model_type = config.get('model_type')
        of = f'a transformers model of type {str(model_type)[:40]!r}' if model_type else 'of an unknown kind'
        raise ValueError(f'{source.name} is {of}, and neither a prompt path nor a timm model.')

