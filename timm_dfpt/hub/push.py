"""Publishing a model or a saved folder with one line."""
from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..teacher.teacher import DualForwardPathTeacher
from .licenses import License
from .options import (
    PromptPathOptions,
    PushOptions,
    PushPromptPathOptions,
    PushStudentOptions,
    StudentOptions,
    Unpack,
    check_options,
    select_options,
)
from .repo import empty_folder, push_folder
from .repo_folder import write_prompt_path_repo, write_student_repo
from .sources import check_repo_id

__all__ = ['push_prompt_path', 'push_student']


def push_student(
    model: nn.Module | str | os.PathLike[str], repo_id: str, **options: Unpack[PushStudentOptions]
) -> str:
    """Publish a timm model so that timm and transformers load it with one line, without timm_dfpt.

    Args:
        model: Classifier made by `timm.create_model`, or a folder that `save_student` has written.
        repo_id: Repository `'user/name'`, created if it does not exist.
        **options: Those of `save_student` (of a folder all but the license and `distillation` stay as saved), and
            `private`, `revision`, `create_pr`, `commit_message`, `token`, `force`, `dry_run`; see
            `timm_dfpt.hub.StudentOptions` and `timm_dfpt.hub.PushOptions`.

    Returns:
        Address of the repository or pull request, or the folder of the dry run.

    Raises:
        FileExistsError: If the repository holds something else.
        HubError: If the upload failed; doing the same again finishes it.
        TypeError: If there is no such option.
        ValueError: If the model cannot be saved, or an option does not fit it.

    Example:
        >>> timm_dfpt.push_student(model, 'user/student', label_names=['cat', 'dog'], license='apache-2.0')
    """
    check_options(options, PushStudentOptions)
    saving = select_options(options, StudentOptions)
    return _push(lambda folder: write_student_repo(model, folder, repo_id, **saving), repo_id, 'Add model', options)


def push_prompt_path(
    teacher: DualForwardPathTeacher | str | os.PathLike[str], repo_id: str, **options: Unpack[PushPromptPathOptions]
) -> str:
    """Publish a prompt path; the base model that it names is built once more and proven to be its own.

    Args:
        teacher: The teacher, or a folder that `save_prompt_path` has written.
        repo_id: Repository `'user/name'`, created if it does not exist.
        **options: Those of `save_prompt_path` (of a folder `label_names` and `data_config` stay as saved), `license`,
            `license_name`, `license_link`, and `private`, `revision`, `create_pr`, `commit_message`, `token`, `force`,
            `dry_run`; see `timm_dfpt.hub.PromptPathOptions` and `timm_dfpt.hub.PushOptions`.

    Returns:
        Address of the repository or pull request, or the folder of the dry run.

    Raises:
        FileExistsError: If the repository holds something else.
        HubError: If the base is unavailable, or the upload failed; doing the same again finishes it.
        TypeError: If there is no such option.
        ValueError: If the base that is named is not the one that the prompt path was tuned on.

    Example:
        >>> timm_dfpt.push_prompt_path(teacher, 'user/prompt', license='apache-2.0')
    """
    check_options(options, PushPromptPathOptions)
    saving, license, token = select_options(options, PromptPathOptions), License.given(options), options.get('token')
    return _push(
        lambda folder: write_prompt_path_repo(teacher, folder, repo_id, license=license, token=token, **saving),
        repo_id,
        'Add prompt path',
        options,
    )


def _push(write: Callable[[Path], Any], repo_id: str, message: str, options: Any) -> str:
    check_repo_id(repo_id)
    if options.get('dry_run') is not None:
        empty_folder(options['dry_run'])
    pushing = select_options({'commit_message': message, **options}, PushOptions)
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        return push_folder(Path(temporary), repo_id, **pushing)
