"""Where a model comes from: a local folder or a repository on the Hub, whose files are verified once downloaded."""
from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..version import __version__
from .errors import HubError, hub_errors, is_unreachable

__all__ = ['Source', 'file_hashes', 'open_source', 'split_hub_id']

_logger = logging.getLogger(__name__)

_CHUNK = 2**20
_CURE = 'Load again with force_download=True to replace it.'


@dataclasses.dataclass(frozen=True)
class _File:
    """What the Hub says of a file. `sha256` is known of large (LFS) files, `git_sha1` of the others."""

    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder, or one commit of a repository, from which files are taken by name.

    Args:
        name: What the user called it, for messages.
        folder: The local folder, or `None` for a repository.
        repo_id: Repository on the Hub.
        commit: The commit that the asked revision stands for now; unknown when offline.
        revision: Branch, tag or commit as asked for.
        subfolder: Folder inside the repository, or `''`.
        files: Files in the subfolder by name; `None` when offline.
        token: See `open_source`.
        cache_dir: See `open_source`.
        force_download: See `open_source`.
    """

    name: str
    folder: Path | None = None
    repo_id: str = ''
    commit: str | None = None
    revision: str | None = None
    subfolder: str = ''
    files: dict[str, _File] | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False

    @property
    def pinned(self) -> str:
        """The repository with the commit that is loaded, as timm writes it."""
        at = self.commit or self.revision
        return f'{self.repo_id}@{at}' if at else self.repo_id

    def names(self) -> list[str] | None:
        """Return the names of all files, or `None` when they are not known (offline)."""
        if self.folder is not None:
            return sorted(path.name for path in self.folder.iterdir() if path.is_file())
        return None if self.files is None else sorted(self.files)

    def has(self, filename: str) -> bool:
        """Whether the file is there (offline: whether it is in the cache)."""
        names = self.names()
        if names is not None:
            return filename in names
        try:
            self._download(filename)
        except EntryNotFoundError:
            return False
        return True

    def get(self, filename: str, max_bytes: int | None = None) -> Path:
        """Return the path of a file, after downloading and verifying it.

        Args:
            filename: Name of the file.
            max_bytes: Refuse a larger file, before it is downloaded where its size is known.

        Raises:
            HubError: The file cannot be had, or is damaged.
            ValueError: The file is too large.
        """
        listed = (self.files or {}).get(filename)
        if listed is not None:
            self._check_size(filename, listed.size, max_bytes)
        if self.folder is not None:
            path = self.folder / filename
            if not path.is_file():
                raise HubError(f'Loading {self.name} failed: there is no file {filename} in it.')
        else:
            with hub_errors(f'Loading {filename} of {self.name}'):
                path = self._download(filename)
                self._verify(filename, path, listed or _File())
        self._check_size(filename, path.stat().st_size, max_bytes)
        return path

    def _check_size(self, filename: str, size: int | None, max_bytes: int | None) -> None:
        if size is not None and max_bytes is not None and size > max_bytes:
            raise ValueError(
                f'{filename} of {self.name} has {size:,} bytes, and more than {max_bytes:,} are not read. '
                'This is not a file that timm_dfpt or timm has written.'
            )

    def _download(self, filename: str) -> Path:
        offline = self.files is None
        path = hf_hub_download(
            self.repo_id,
            filename,
            subfolder=self.subfolder or None,
            revision=self.revision,
            cache_dir=self.cache_dir,
            token=self.token,
            # What was listed must be fetched; a damaged copy in the cache must not be taken when the Hub is gone.
            force_download=self.force_download and not offline,
            local_files_only=offline,
            library_name='timm_dfpt',
            library_version=__version__,
        )
        return Path(path)

    def _verify(self, filename: str, path: Path, listed: _File) -> None:
        """Compare the content with the hash that the Hub gave; the client itself does not."""
        if self.commit and self.commit not in path.parts:
            raise HubError(
                f'{self.repo_id} changed while it was being downloaded, so its files may not fit each other. '
                'Run the same again, or pass revision= a commit.'
            )
        expected = listed.sha256 or listed.git_sha1 or _hash_in_cache(path)
        if expected is None:
            return
        if expected not in file_hashes(path):
            raise HubError(
                f'{filename} of {self.name} is damaged: its content does not match the hash {expected[:12]}... that '
                f'the Hub gives. {_CURE}'
            )


def open_source(
    id_or_dir: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | None = None,
) -> Source:
    """Find a folder or a repository and list its files.

    When the Hub cannot be reached, what the cache holds is used, with a warning that says why.

    Args:
        id_or_dir: Local folder, or repository `'user/name'` (`'hf-hub:user/name@revision'` is understood, too).
        revision: Branch, tag or commit of the repository.
        token: Token of the user, `None` for the stored one, `False` for none.
        cache_dir: Cache of downloads, `None` for huggingface_hub's.
        local_files_only: Use the cache only.
        force_download: Download again what is in the cache.
        subfolder: Folder inside the repository or folder.

    Raises:
        HubError: There is no such repository or revision, it is not to be had, or nothing is cached while offline.
        FileNotFoundError: There is no such folder.
        ValueError: `id_or_dir` or `subfolder` is malformed.
    """
    inner = _checked_subfolder(subfolder)
    text = os.fspath(id_or_dir)
    folder = Path(text.removeprefix('local-dir:')).expanduser()
    if folder.is_dir() and not text.startswith('hf-hub:'):
        folder = folder / inner
        if not folder.is_dir():
            raise FileNotFoundError(f'There is no folder {inner!r} in {text!r}.')
        return Source(text, folder=folder)
    if isinstance(id_or_dir, os.PathLike) or text.startswith(('local-dir:', '.', '/', '~')):
        raise FileNotFoundError(f'There is no folder {text!r}.')
    repo_id, at = split_hub_id(text)
    if at and revision and at != revision:
        raise ValueError(f'{text!r} names revision {at!r}, but revision={revision!r} was passed; drop one of them.')
    source = Source(
        repo_id,
        repo_id=repo_id,
        revision=revision or at,
        subfolder=inner,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
    )
    if local_files_only or constants.HF_HUB_OFFLINE:
        return source
    with hub_errors(f'Loading {repo_id}'):
        try:
            return _listed(source)
        except (HTTPError, OfflineModeIsEnabled) as error:
            if not is_unreachable(error) or not _is_cached(source) or force_download:
                raise
            _logger.warning(
                f'The Hub cannot be reached ({type(error).__name__}: {error}); using the cached copy of {repo_id}.'
            )
            return source


def split_hub_id(hub_id: str) -> tuple[str, str | None]:
    """Split `'user/name'`, `'hf-hub:user/name'` or `'hf-hub:user/name@revision'` into repository and revision.

    Raises:
        ValueError: It is none of them.
    """
    repo_id, _, revision = hub_id.removeprefix('hf-hub:').partition('@')
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f'{hub_id!r} is neither a folder nor a repository id such as "user/name": {error}'
        ) from error
    return repo_id, revision or None


def _listed(source: Source) -> Source:
    api = HfApi(library_name='timm_dfpt', library_version=__version__, token=source.token)
    # Without a timeout a silent server is waited for forever.
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = api.model_info(source.repo_id, revision=source.revision, files_metadata=True, timeout=timeout)
    prefix = f'{source.subfolder}/' if source.subfolder else ''
    files = {}
    for entry in info.siblings or []:
        name = entry.rfilename.removeprefix(prefix)
        if not entry.rfilename.startswith(prefix) or '/' in name:
            continue
        sha256 = entry.lfs.sha256 if entry.lfs else None
        files[name] = _File(entry.size, sha256, None if sha256 else entry.blob_id)
    return dataclasses.replace(source, commit=info.sha, files=files)


def _is_cached(source: Source) -> bool:
    return any(source.has(name) for name in ('prompt_config.json', 'config.json'))


def _checked_subfolder(subfolder: str | None) -> str:
    if not subfolder:
        return ''
    parts = subfolder.strip('/').split('/')
    if subfolder.startswith('/') or '\\' in subfolder or any(part in ('', '.', '..') for part in parts):
        raise ValueError(f'subfolder must be a relative folder inside the repository, got {subfolder!r}.')
    return '/'.join(parts)


def _hash_in_cache(path: Path) -> str | None:
    """Return the hash by which the cache names a file's content (the Hub's ETag), if the cache has links."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ''
    return name if len(name) in (40, 64) and all(c in '0123456789abcdef' for c in name) else None


def file_hashes(path: Path) -> tuple[str, str]:
    """Return the sha256 and git's sha1 of a file: by one of them the Hub knows it."""
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b'blob %d\0' % path.stat().st_size, usedforsecurity=False)
    with path.open('rb') as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            sha1.update(chunk)
    return sha256.hexdigest(), sha1.hexdigest()
