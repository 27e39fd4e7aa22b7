"""Pushing a folder to the Hub: once, in one commit, and not over somebody's other content."""
from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..version import __version__
from .download import file_hashes
from .errors import hub_errors

__all__ = ['check_repo_id', 'push_folder']

_logger = logging.getLogger(__name__)

# The Hub itself puts this file into every new repository.
_NOT_OURS = ('.gitattributes',)


def check_repo_id(repo_id: str) -> str:
    """Return `repo_id` if it can be one, before any work is done.

    Raises:
        ValueError: It is not of the form `'user/name'` or `'name'`.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f'repo_id must be "user/name" or "name", got {repo_id!r}: {error}') from error
    return repo_id


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = 'Upload with timm_dfpt',
    token: str | bool | None = None,
    force: bool = False,
) -> str:
    """Upload the files of a folder in one commit.

    Args:
        folder: The folder; its files are the whole content of the repository.
        repo_id: Repository, made where it does not exist.
        private: Whether a new repository is private; an existing one stays as it is.
        revision: Branch to commit to, made where it does not exist. Default: `main`.
        create_pr: Open a pull request instead.
        commit_message: First line of the commit.
        token: Token of the user, `None` for the stored one.
        force: Replace files of the same name in a repository that holds something else; other files stay.

    Returns:
        Where it is now: the address of the repository, or of the pull request.

    Raises:
        FileExistsError: The repository holds other content, and `force` was not given.
        HubError: The upload failed. The folder is untouched, and a second try finishes the job.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token, library_name='timm_dfpt', library_version=__version__)
    with hub_errors(f'Pushing to {repo_id}'):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        repo_id = url.repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        remote = _remote_hashes(api, repo_id, revision)
        local = {path.name: file_hashes(path) for path in sorted(folder.iterdir())}
        differing = sorted(name for name, hashes in remote.items() if name not in local or hashes not in local[name])
        if set(remote) == set(local) and not differing:
            _logger.info(f'{repo_id} holds exactly this already; nothing to push.')
            return str(url)
        if differing and not (force or create_pr):
            raise FileExistsError(
                f'{repo_id} holds other content ({", ".join(differing[:5])}). Choose another repo_id, pass force=True '
                '(--force) to replace files of the same name, or create_pr=True to propose it as a pull request.'
            )
        # The Hub commits all or nothing, so what was uploaded by a try that failed is not seen by anyone.
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
        return str(commit.pr_url or url)


def _remote_hashes(api: HfApi, repo_id: str, revision: str | None) -> dict[str, str]:
    try:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    except RepositoryNotFoundError:
        # create_repo has just succeeded, so this token may write but not read.
        return {}
    files = {s.rfilename: (s.lfs.sha256 if s.lfs else s.blob_id) or '' for s in info.siblings or []}
    return {name: digest for name, digest in files.items() if name not in _NOT_OURS}
