"""Publishing a model that is at hand, with one line."""
from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..teacher.teacher import DualForwardPathTeacher
from .repo_folder import stage_prompt_path, stage_student
from .upload import check_repo_id, push_folder

__all__ = ['empty_folder', 'push_prompt_path', 'push_student']


def push_student(
    model: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    license: str | None = None,
    distillation: Mapping[str, Any] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = 'Add model',
    token: str | bool | None = None,
    force: bool = False,
    dry_run: str | os.PathLike[str] | None = None,
) -> str:
    """Publish a timm model so that timm and transformers load it with one line, without timm_dfpt.

    Args:
        model: Classifier made by `timm.create_model`, or a folder that `save_student` has written.
        repo_id: Repository `'user/name'`, made where it does not exist.
        label_names: See `save_student`; of a folder all of these are as saved.
        data_config: See `save_student`.
        model_args: See `save_student`.
        license: Licence of the weights, e.g. `'apache-2.0'`; never taken from the checkpoint the model started from.
        distillation: See `save_student`.
        private: Whether a new repository is private.
        revision: Branch to push to, made where it does not exist.
        create_pr: Open a pull request instead of committing.
        commit_message: First line of the commit.
        token: Token of the user, `None` for the stored one.
        force: Replace files of the same name in a repository that holds something else.
        dry_run: Write the exact repository to this empty folder and push nothing.

    Returns:
        Address of the repository or pull request, or the folder of the dry run.

    Raises:
        FileExistsError: The repository holds something else.
        HubError: The upload failed; doing the same again finishes it.
        ValueError: The model cannot be saved, or an argument does not fit it.
    """
    saving: dict[str, Any] = {
        'label_names': label_names,
        'data_config': data_config,
        'model_args': model_args,
        'distillation': distillation,
    }
    options: dict[str, Any] = {
        'private': private,
        'revision': revision,
        'create_pr': create_pr,
        'commit_message': commit_message,
        'token': token,
        'force': force,
    }
    return _publish(lambda folder: stage_student(model, folder, repo_id, license, **saving), repo_id, dry_run, options)


def push_prompt_path(
    teacher: DualForwardPathTeacher | str | os.PathLike[str],
    repo_id: str,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = 'Add prompt path',
    token: str | bool | None = None,
    force: bool = False,
    dry_run: str | os.PathLike[str] | None = None,
) -> str:
    """Publish a prompt path; the base model that it names is built once more and proven to be its own.

    Args:
        teacher: The teacher, or a folder that `save_prompt_path` has written.
        repo_id: Repository `'user/name'`, made where it does not exist.
        base_model: See `save_prompt_path`.
        base_revision: See `save_prompt_path`.
        label_names: See `save_prompt_path`; of a folder these two are as saved.
        data_config: See `save_prompt_path`.
        license: Licence of the weights.
        private: Whether a new repository is private.
        revision: Branch to push to, made where it does not exist.
        create_pr: Open a pull request instead of committing.
        commit_message: First line of the commit.
        token: Token of the user, `None` for the stored one.
        force: Replace files of the same name in a repository that holds something else.
        dry_run: Write the exact repository to this empty folder and push nothing.

    Returns:
        Address of the repository or pull request, or the folder of the dry run.

    Raises:
        FileExistsError: The repository holds something else.
        HubError: The base cannot be had, or the upload failed; doing the same again finishes it.
        ValueError: The base that is named is not the one that the prompt path was tuned on.
    """
    saving: dict[str, Any] = {
        'base_model': base_model,
        'base_revision': base_revision,
        'label_names': label_names,
        'data_config': data_config,
        'token': token,
    }
    options: dict[str, Any] = {
        'private': private,
        'revision': revision,
        'create_pr': create_pr,
        'commit_message': commit_message,
        'token': token,
        'force': force,
    }
    return _publish(
        lambda folder: stage_prompt_path(teacher, folder, repo_id, license, **saving), repo_id, dry_run, options
    )


def _publish(
    stage: Callable[[Path], Any], repo_id: str, dry_run: str | os.PathLike[str] | None, options: Mapping[str, Any]
) -> str:
    check_repo_id(repo_id)
    if dry_run is not None:
        folder = empty_folder(dry_run)
        stage(folder)
        return str(folder)
    with tempfile.TemporaryDirectory() as temporary:
        stage(Path(temporary))
        return push_folder(Path(temporary), repo_id, **options)


def empty_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder for a dry run.

    Raises:
        FileExistsError: It is there and not empty.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f'dry_run must be a new or empty folder, and {str(path)!r} is not empty.')
    return folder
