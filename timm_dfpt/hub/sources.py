"""Names of models, datasets and repositories: parsed once, as timm does, and written one way from then on."""
from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models import parse_model_name

from ..utils.messages import shorten

__all__ = [
    'HUB',
    'LOCAL_DIR',
    'SourceName',
    'canonical',
    'check_repo_id',
    'parse_dataset',
    'parse_place',
    'parse_source',
    'resolve_path',
    'split_hub_id',
]

HUB = 'hf-hub:'
LOCAL_DIR = 'local-dir:'
"""What the name of a local folder begins with."""

# Two characters at least, as for timm: C: is a drive.
_PREFIX = re.compile(r'\s*([a-zA-Z][a-zA-Z0-9+.\-_]+):(.*)', re.DOTALL)
_HUB_URL = re.compile(r'https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(datasets/)?([\w.\-]+/[\w.\-]+)')


class SourceName(NamedTuple):
    """A parsed name; `str` of it is the one way in which it is written.

    Args:
        kind: `'hf-hub'` for a repository, `'local-dir'` for a folder, `''` for a name without a prefix.
        name: Repository, folder, or the name as it is.
        revision: Revision of the repository.
    """

    kind: Literal['hf-hub', 'local-dir', '']
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        prefix = {'hf-hub': HUB, 'local-dir': LOCAL_DIR, '': ''}[self.kind]
        return f'{prefix}{self.name}' + (f'@{self.revision}' if self.revision else '')

    @property
    def folder(self) -> Path | None:
        """The folder that it names, if it names one."""
        return Path(self.name) if self.kind == 'local-dir' else None


def parse_source(source: str) -> SourceName:
    """Parse the name of a model by timm's rules: a timm name, `hf-hub:user/name@revision` or `local-dir:folder`.

    Capital letters in a prefix, timm's older `hf_hub:`, blanks around, a slash at the end and `~` are understood.

    Raises:
        ValueError: If it has another prefix, is a path or a repository without one, or is malformed; the message says
            what to write instead.
    """
    try:
        kind, name = parse_model_name(source.strip())
    except ValueError as error:
        found = _PREFIX.match(source)
        raise ValueError(_remedy(source) if found and found[2].strip() else str(error)) from error
    if kind == 'hf-hub':
        return SourceName('hf-hub', *split_hub_id(name))
    if kind == 'local-dir':
        return SourceName('local-dir', os.path.expanduser(name))
    return SourceName('', name)


def parse_place(source: str) -> SourceName:
    """Parse the name of a folder or a repository, for which no prefix is needed.

    Raises:
        ValueError: If `parse_source` raises it.
    """
    return parse_source(source) if _PREFIX.match(source) else SourceName('', source.strip())


def parse_dataset(source: str) -> str:
    """Return the id or the path of a dataset, of which the prefixes of models are taken off.

    Raises:
        ValueError: If it has another prefix, or a revision.
    """
    if os.path.exists(os.path.expanduser(source)):
        return source
    found = _PREFIX.match(source)
    if found and found[1].lower() not in ('hf-hub', 'hf_hub', 'local-dir'):
        url = _HUB_URL.match(source.strip())
        raise ValueError(
            f'{shorten(source)} has the prefix {found[1] + ":"!r}, which is not a prefix of datasets. Give '
            + (f'{url[2]!r}.' if url else 'user/name for a dataset on the Hub, or the path of a folder.')
        )
    place = parse_place(source)
    if place.revision:
        raise ValueError(f'{shorten(source)}: give the revision with --dataset-revision {place.revision}.')
    return place.name


_PARSERS = {'teacher': parse_source, 'student': parse_source, 'prompt_path': parse_place, 'dataset': parse_dataset}


def canonical(option: str, name: str | None) -> str | None:
    """Return what an option of a job names in the one way in which it is written.

    Args:
        option: `teacher`, `student`, `prompt_path` or `dataset`.
        name: Its value.

    Raises:
        ValueError: If it is malformed.
    """
    try:
        return name and str(_PARSERS[option](name))
    except ValueError as error:
        raise ValueError(f'{option}: {error}') from error


def resolve_path(source: str, folder: Path, bare: bool = True, missing: bool = False) -> str:
    """Return a relative path, one with dots, as it is from the working directory instead of `folder`; others as are.

    Args:
        source: The path, or `local-dir:` with one.
        folder: What it is relative to.
        bare: Whether it may be a path without a prefix.
        missing: Whether it may be shortened where nothing is there yet.
    """
    prefix = LOCAL_DIR if source.strip().lower().startswith(LOCAL_DIR) else ''
    relative = source.strip()[len(prefix) :]
    if (prefix or bare) and relative.startswith('~'):
        return prefix + os.path.expanduser(relative)
    if not (prefix or bare) or not relative.startswith(('./', '../')):
        return source
    found = folder / relative
    full = found.resolve()
    if not found.exists() and not missing:
        # It keeps its full name: without the dots it could be the name of something on the Hub.
        return f'{prefix}{full}'
    # Relative where that is shorter: the record of a run should not reveal a home folder.
    return prefix + str(full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else full)


def _remedy(source: str) -> str:
    prefix = source.strip().partition(':')[0]
    text = f'{shorten(source)} has the prefix {prefix + ":"!r}, which is not one of timm. '
    url = _HUB_URL.match(source.strip())
    if url and not url[1]:
        return text + f'Write {HUB + url[2]!r}.'
    if prefix.lower() == 'file':
        return text + f'Write {LOCAL_DIR}FOLDER.'
    return text + f'Write a timm name, {HUB}user/name for a repository on the Hub, or {LOCAL_DIR}FOLDER.'


def split_hub_id(hub_id: str) -> tuple[str, str | None]:
    """Split `'user/name'` or `'user/name@revision'` into repository and revision.

    Raises:
        ValueError: If it is none of them.
    """
    repo_id, _, revision = hub_id.strip().partition('@')
    repo_id = repo_id.rstrip('/')
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f'{shorten(hub_id)} is neither a folder nor a repository id such as "user/name": {_one_line(error)}'
        ) from error
    if '@' in revision or revision != revision.strip():
        raise ValueError(f'{shorten(hub_id)} must name one revision, as in user/name@v1.')
    return repo_id, revision or None


def check_repo_id(repo_id: str, option: str = 'repo_id') -> str:
    """Return the id of a repository to publish to, before any work is done.

    Args:
        repo_id: The id.
        option: What it was given as, for messages.

    Raises:
        ValueError: If it is not of the form `'user/name'` or `'name'`.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f'{option} must be "user/name" or "name", got {shorten(repo_id)}: {_one_line(error)}'
        ) from error
    return repo_id


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split())
