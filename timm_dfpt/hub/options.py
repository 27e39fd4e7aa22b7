"""The options of loading, saving and publishing. Each is written down once, here; mypy and editors know them."""
from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack

__all__ = [
    'LoadOptions',
    'PromptPathOptions',
    'PushOptions',
    'PushPromptPathOptions',
    'PushStudentOptions',
    'StudentOptions',
    'Unpack',
    'check_options',
    'select_options',
]

_Options = TypeVar('_Options')


class LoadOptions(TypedDict, total=False):
    """Options of `load_student`, `load_teacher` and `from_pretrained`, with huggingface_hub's names.

    Args:
        revision: Branch, tag or commit of the repository. Default: its main branch.
        token: Token of the user, `None` (default) for the stored one, `False` for none.
        cache_dir: Cache of downloads. Default: huggingface_hub's.
        local_files_only: Use the cache only, without a request.
        force_download: Download again what is in the cache.
        subfolder: Folder inside the repository or the local folder.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool
    subfolder: str | None


class StudentOptions(TypedDict, total=False):
    """What is saved of a student besides its weights: options of `save_student` and `push_student`.

    Args:
        label_names: A name for each class. Default: those in the model's `pretrained_cfg`, else `LABEL_0`, ... (without
            any, transformers would take whatever has 1000 classes for ImageNet).
        data_config: The preprocessing that the model was trained with, keys as `timm.data.resolve_data_config`
            returns them (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`). Default: the model's.
        model_args: Arguments of `timm.create_model` where they cannot be written as JSON (an activation class);
            timm remembers the others.
        license: License of the weights, e.g. `'apache-2.0'`. Never taken from the checkpoint the model started from.
        license_name: Name of the license where `license` is `'other'`.
        license_link: Address of its text.
        distillation: Facts about the distillation, JSON values: teacher, prompt path, recipe, metrics, versions.
    """

    label_names: Sequence[str] | None
    data_config: Mapping[str, Any] | None
    model_args: Mapping[str, Any] | None
    license: str | None
    license_name: str | None
    license_link: str | None
    distillation: Mapping[str, Any] | None


class PromptPathOptions(TypedDict, total=False):
    """What is saved of a prompt path besides its weights: options of `save_prompt_path` and `push_prompt_path`.

    Args:
        base_model: Where others find the base model: `'hf-hub:user/name'` or a timm name. Default: where timm loaded it
            from; for a model from a local folder, or with `''`, nowhere: the prompt path then needs `model=` to load.
        base_revision: Commit of the base's repository. Default: the one in the local cache.
        label_names: A name for each class. Default: the base's, where it has them.
        data_config: Preprocessing of the base's input, keys as `timm.data.resolve_data_config` returns them. Default:
            the base's.
        training: Facts about the training, JSON values.
    """

    base_model: str | None
    base_revision: str | None
    label_names: Sequence[str] | None
    data_config: Mapping[str, Any] | None
    training: Mapping[str, Any] | None


class PushOptions(TypedDict, total=False):
    """Options of everything that publishes: `push_student`, `push_prompt_path` and `publish_run`.

    Args:
        private: Whether a new repository is private; an existing one stays as it is. Default: as the account has it.
        revision: Branch to commit to, created if it does not exist. Default: `main`.
        create_pr: Open a pull request instead of committing.
        commit_message: First line of the commit.
        token: Token of the user, `None` (default) for the stored one.
        force: Replace files of the same name in a repository that holds something else; other files stay.
        dry_run: Write the exact repository to this new or empty folder and push nothing.
    """

    private: bool | None
    revision: str | None
    create_pr: bool
    commit_message: str
    token: str | bool | None
    force: bool
    dry_run: str | os.PathLike[str] | None


class PushStudentOptions(StudentOptions, PushOptions, total=False):
    """Options of `push_student`."""


class PushPromptPathOptions(PromptPathOptions, PushOptions, total=False):
    """Options of `push_prompt_path`.

    Args:
        license: License of the weights, e.g. `'apache-2.0'`.
        license_name: Name of the license where `license` is `'other'`.
        license_link: Address of its text.
    """

    license: str | None
    license_name: str | None
    license_link: str | None


def check_options(options: Mapping[str, Any], kind: type) -> None:
    """Refuse options that do not exist, as Python does for keyword arguments.

    Args:
        options: What a function was given.
        kind: What it has: one of the classes above.

    Raises:
        TypeError: If `kind` lacks one of the options.
    """
    unknown = sorted(set(options) - set(kind.__annotations__))
    if unknown:
        known = ', '.join(kind.__annotations__)
        raise TypeError(f'unexpected keyword argument {unknown[0]!r}; the options are {known}.')


def select_options(options: Mapping[str, Any], kind: type[_Options]) -> _Options:
    """Return those of `options` that `kind` has."""
    return cast(_Options, {name: value for name, value in options.items() if name in kind.__annotations__})
