"""Repositories on the Hub and local folders: verified files from them, and a whole folder to them in one commit."""
from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ..data.paths import similar_path
from ..version import __version__
from .errors import HubError, hub_errors, is_unreachable
from .options import LoadOptions, PushOptions, Unpack, check_options
from .sources import SourceName, check_repo_id, parse_place, split_hub_id

__all__ = ['Source', 'empty_folder', 'open_source', 'push_folder']

_logger = logging.getLogger(__name__)

# The Hub itself puts this file into every new repository.
_NOT_OURS = ('.gitattributes',)


@dataclasses.dataclass(frozen=True)
class _File:
    """What the Hub says of a file. The digest is the sha256 of large (LFS) files, and git's sha1 of the others."""

    size: int | None = None
    digest: str | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder, or one commit of a repository, from which files are taken by name.

    Args:
        name: What the user called it, for messages.
        folder: The local folder, or `None` for a repository.
        repo_id: Repository on the Hub.
        commit: The commit that the asked revision stands for now; unknown when offline.
        files: Files in the subfolder by name; `None` when offline.
        options: What was asked for.
    """

    name: str
    folder: Path | None = None
    repo_id: str = ''
    commit: str | None = None
    files: dict[str, _File] | None = None
    options: LoadOptions = dataclasses.field(default_factory=lambda: LoadOptions())

    @property
    def pinned(self) -> str:
        """The repository with the commit that is loaded, as timm writes it."""
        at = self.commit or self.options.get('revision')
        return f'{self.repo_id}@{at}' if at else self.repo_id

    @property
    def offline(self) -> bool:
        """Whether files are taken from the cache only."""
        return self.options.get('local_files_only', False) or (self.folder is None and self.files is None)

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
            HubError: If the file is unavailable, or damaged.
            ValueError: If the file is too large.
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
                f'{filename} of {self.name} has {size:,} bytes, more than the limit of {max_bytes:,}: it was not '
                'written by timm_dfpt or timm.'
            )

    def _download(self, filename: str) -> Path:
        path = hf_hub_download(
            self.repo_id,
            filename,
            subfolder=self.options.get('subfolder') or None,
            revision=self.options.get('revision'),
            cache_dir=self.options.get('cache_dir'),
            token=self.options.get('token'),
            # What was listed must be fetched; a damaged copy in the cache must not be taken when the Hub is gone.
            force_download=self.options.get('force_download', False) and not self.offline,
            local_files_only=self.offline,
            library_name='timm_dfpt',
            library_version=__version__,
        )
        return Path(path)

    def _verify(self, filename: str, path: Path, listed: _File) -> None:
        """Compare the content with the hash that the Hub gave; the client itself does not."""
        if self.commit and self.commit not in path.parts:
            raise HubError(
                f'{self.repo_id} changed while it was being downloaded, so its files may not fit each other. Run the '
                'same again, or pass a commit as revision=.'
            )
        expected = listed.digest or _digest_in_cache(path)
        if expected is not None and not _has_digest(path, expected):
            raise HubError(
                f'{filename} of {self.name} is damaged: its content does not match the hash {expected[:12]}... that '
                'the Hub gives. Load again with force_download=True to replace it.'
            )


def open_source(
    pretrained_model_name_or_path: str | os.PathLike[str], **options: Unpack[LoadOptions]
) -> Source:
    """Find a folder or a repository and list its files.

    When the Hub cannot be reached, what the cache holds is used, with a warning that says why.

    Args:
        pretrained_model_name_or_path: Local folder, or repository `'user/name'`; timm's `'hf-hub:user/name@revision'`
            and `'local-dir:folder'` are understood, too.
        **options: See `LoadOptions`.

    Raises:
        HubError: If there is no such repository or revision, it is unavailable, or nothing is cached while offline.
        FileNotFoundError: If there is no such folder.
        TypeError: If there is no such option.
        ValueError: If the name or `subfolder` is malformed, or a local folder is to have a `revision`.
    """
    check_options(options, LoadOptions)
    inner = _checked_subfolder(options.get('subfolder'))
    text = os.fspath(pretrained_model_name_or_path)
    place = SourceName('local-dir', os.path.expanduser(text))
    if isinstance(pretrained_model_name_or_path, str) and not Path(place.name).is_dir():
        place = parse_place(text) if not text.startswith(('.', '/', '~', '\\')) else place
    if place.folder is not None:
        if options.get('revision') is not None:
            raise ValueError(
                f'revision={options["revision"]!r} is for repositories on the Hub, and {text!r} is a local folder: '
                'leave it out.'
            )
        folder = place.folder / inner
        if not folder.is_dir():
            missing = f'{inner!r} in {text!r}' if place.folder.is_dir() else repr(text)
            raise FileNotFoundError(f'The folder {missing} does not exist{similar_path(str(folder))}.')
        return Source(text, folder=folder, options=options)
    repo_id, at = (place.name, place.revision) if place.kind else split_hub_id(place.name)
    revision = options.get('revision')
    if at and revision and at != revision:
        raise ValueError(f'{text!r} names revision {at!r}, but revision={revision!r} was passed: give one of them.')
    revision = revision or at
    name = f'{repo_id}@{revision}' if revision else repo_id
    source = Source(name, repo_id=repo_id, options={**options, 'revision': revision, 'subfolder': inner})
    if source.options.get('local_files_only') or constants.HF_HUB_OFFLINE:
        return source
    # Without a prefix it may have been meant as a folder.
    with hub_errors(f'Loading {source.name}{"" if place.kind else similar_path(text)}'):
        try:
            return _listed(source)
        except (HTTPError, OfflineModeIsEnabled) as error:
            if not is_unreachable(error) or not _is_cached(source) or options.get('force_download'):
                raise
            _logger.warning(
                f'The Hub cannot be reached ({type(error).__name__}: {error}); using the cached copy of {repo_id}.'
            )
            return source


def _listed(source: Source) -> Source:
    api = HfApi(library_name='timm_dfpt', library_version=__version__, token=source.options.get('token'))
    # Without a timeout a silent server is waited for forever.
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    revision, subfolder = source.options.get('revision'), source.options.get('subfolder')
    info = api.model_info(source.repo_id, revision=revision, files_metadata=True, timeout=timeout)
    prefix = f'{subfolder}/' if subfolder else ''
    files = {}
    for entry in info.siblings or []:
        name = entry.rfilename.removeprefix(prefix)
        if not entry.rfilename.startswith(prefix) or '/' in name:
            continue
        files[name] = _File(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
    return dataclasses.replace(source, commit=info.sha, files=files)


def _is_cached(source: Source) -> bool:
    return any(source.has(name) for name in ('prompt_config.json', 'config.json', 'model.safetensors'))


def _checked_subfolder(subfolder: str | None) -> str:
    if not subfolder:
        return ''
    parts = subfolder.strip('/').split('/')
    if subfolder.startswith('/') or '\\' in subfolder or any(part in ('', '.', '..') for part in parts):
        raise ValueError(f'subfolder must be a relative folder inside the repository, got {subfolder!r}.')
    return '/'.join(parts)


def _digest_in_cache(path: Path) -> str | None:
    """Return the hash by which the cache names a file's content (the Hub's ETag), if the cache has links."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ''
    return name if len(name) in (40, 64) and all(c in '0123456789abcdef' for c in name) else None


def _has_digest(path: Path, digest: str) -> bool:
    """Whether a file has the content that the Hub knows by a sha256 (of 64 digits) or by git's sha1."""
    if len(digest) == 64:
        with path.open('rb') as file:
            return sha_fileobj(file).hex() == digest
    return git_hash(path.read_bytes()) == digest


def empty_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder for a dry run.

    Raises:
        FileExistsError: If it exists and is not empty.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f'dry_run must be a new or empty folder, and {str(path)!r} is not empty.')
    return folder


def push_folder(folder: Path, repo_id: str, space: bool = False, **options: Unpack[PushOptions]) -> str:
    """Upload the files of a folder in one commit, but not over other content.

    Args:
        folder: The folder; its files are the whole content of the repository.
        repo_id: Repository, created if it does not exist.
        space: Whether it is a static Space instead of a model.
        **options: See `PushOptions`.

    Returns:
        Where it is now: the address of the repository or of the pull request, or the folder of the dry run.

    Raises:
        FileExistsError: If the repository holds other content, and `force` was not given.
        HubError: If the upload failed, or another commit was pushed at the same time. The folder is untouched, and a
            second try finishes the job.
        TypeError: If there is no such option.
    """
    check_options(options, PushOptions)
    check_repo_id(repo_id)
    dry_run = options.get('dry_run')
    if dry_run is not None:
        return str(shutil.copytree(folder, empty_folder(dry_run), dirs_exist_ok=True))
    revision, create_pr = options.get('revision'), options.get('create_pr', False)
    api = HfApi(token=options.get('token'), library_name='timm_dfpt', library_version=__version__)
    with hub_errors(f'Pushing to {repo_id}'):
        kind: dict[str, Any] = {'repo_type': 'space'} if space else {}
        sdk: dict[str, Any] = {'space_sdk': 'static'} if space else {}
        url = api.create_repo(repo_id, private=options.get('private'), exist_ok=True, **kind, **sdk)
        repo_id = url.repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True, **kind)
        parent, remote = _remote_state(api, repo_id, revision, space)
        local = {path.relative_to(folder).as_posix(): path for path in folder.rglob('*') if path.is_file()}
        differing = sorted(n for n, digest in remote.items() if n not in local or not _has_digest(local[n], digest))
        if set(remote) == set(local) and not differing:
            _logger.info(f'{repo_id} has exactly these files already; nothing to push.')
            return str(url)
        if differing and not (options.get('force') or create_pr):
            raise FileExistsError(
                f'{repo_id} holds other content ({", ".join(differing[:5])}). Choose another repo_id, pass force=True '
                '(--force) to replace files of the same name, or create_pr=True to propose it as a pull request.'
            )
        # The Hub commits all or nothing, so what was uploaded by a try that failed is not seen by anyone; nor does
        # it commit on top of what others have pushed since the check.
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            parent_commit=None if create_pr else parent,
            **kind,
            commit_message=options.get('commit_message', 'Upload with timm_dfpt'),
        )
        return str(commit.pr_url or url)


def _remote_state(
    api: HfApi, repo_id: str, revision: str | None, space: bool
) -> tuple[str | None, dict[str, str]]:
    """Return the commit that a revision is at, and the digests of its files."""
    try:
        info: Any = (api.space_info if space else api.model_info)(repo_id, revision=revision, files_metadata=True)
    except RepositoryNotFoundError:
        # create_repo has just succeeded, so this token may write but not read.
        return None, {}
    digests = {s.rfilename: (s.lfs.sha256 if s.lfs else s.blob_id) or '' for s in info.siblings or []}
    return info.sha, {name: digest for name, digest in digests.items() if name not in _NOT_OURS}
