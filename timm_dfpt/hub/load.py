"""`from_pretrained`: one line for whatever timm_dfpt has published."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..teacher.teacher import DualForwardPathTeacher
from .download import Source, open_source
from .files import MAX_JSON_BYTES, read_json
from .prompt_path import PROMPT_CONFIG, load_prompt_path
from .student import CONFIG, load_student

__all__ = ['from_pretrained', 'load_teacher']

# Files by which repositories of other libraries are known.
_OTHERS = {
    'adapter_config.json': 'a PEFT adapter',
    'model_index.json': 'a diffusers pipeline',
    'open_clip_config.json': 'an OpenCLIP model',
    'config_sentence_transformers.json': 'a sentence-transformers model',
    'tokenizer.json': 'a language model or tokenizer',
}


def from_pretrained(
    id_or_dir: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | None = None,
) -> nn.Module:
    """Load a prompt path (as a `DualForwardPathTeacher`) or a student (as a timm model), whichever it is.

    Only safetensors are read. Downloaded files are compared with the hashes that the Hub gives; configs are validated
    before anything is built.

    Args:
        id_or_dir: Repository `'user/name'` on the Hub, or a local folder.
        model: Prompt paths only: the base model, if it is at hand. Default: it is rebuilt through timm.
        revision: Branch, tag or commit.
        token: Token of the user, `None` for the stored one, `False` for none.
        cache_dir: Cache of downloads, `None` for huggingface_hub's.
        local_files_only: Use the cache only, without a request.
        force_download: Download again what is in the cache.
        subfolder: Folder inside the repository.

    Returns:
        The model in evaluation mode.

    Raises:
        HubError: It cannot be had, or what was downloaded is damaged; the message says what to do.
        FileNotFoundError: There is no such folder.
        ValueError: It is of a third kind, or its files are not of one valid model.

    Example:
        >>> teacher = timm_dfpt.from_pretrained('user/resnet50-prompt')
        >>> student = timm_dfpt.from_pretrained('user/resnet18-student')
    """
    source = open_source(
        id_or_dir,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
        subfolder=subfolder,
    )
    if source.has(PROMPT_CONFIG):
        return load_prompt_path(source, model)
    _check_student(source)
    if model is not None:
        raise ValueError(f'{source.name} is a student, which has no base: leave model= out.')
    return load_student(source)


def load_teacher(
    id_or_dir: str | os.PathLike[str], model: nn.Module | None = None, **options: Any
) -> DualForwardPathTeacher:
    """Load what must be a prompt path. Arguments as in `from_pretrained`.

    Raises:
        ValueError: It is something else.
    """
    loaded = from_pretrained(id_or_dir, model, **options)
    if not isinstance(loaded, DualForwardPathTeacher):
        raise ValueError(
            f'{os.fspath(id_or_dir)!r} is a student and no prompt path. '
            f'Load it with timm_dfpt.from_pretrained({os.fspath(id_or_dir)!r}).'
        )
    return loaded


def _check_student(source: Source) -> None:
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
        raise ValueError(f'{source.name} is an empty folder.')
    config = read_json(source.get(CONFIG, MAX_JSON_BYTES))
    if 'architecture' not in config:
        model_type = config.get('model_type')
        of = f'a transformers model of type {str(model_type)[:40]!r}' if model_type else 'of an unknown kind'
        raise ValueError(f'{source.name} is {of}, and neither a prompt path nor a timm model.')

