"""The Hub methods of `DualForwardPathTeacher`; what they do is in `timm_dfpt.hub`."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .teacher import DualForwardPathTeacher

__all__ = ['PromptPathHubMixin']


class PromptPathHubMixin:
    """`save_pretrained`, `from_pretrained` and `push_to_hub`, with huggingface_hub's signatures.

    Only the prompt path is stored; the base model is named by id, commit and fingerprint. The imports stand inside the
    methods because `timm_dfpt.hub` builds on the teacher, and not the other way round.
    """

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        base_model: str | None = None,
        base_revision: str | None = None,
        label_names: Sequence[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> Path:
        """Save the prompt path alone. See `timm_dfpt.hub.save_prompt_path`."""
        from ..hub import save_prompt_path

        return save_prompt_path(
            self,  # type: ignore[arg-type]
            save_directory,
            base_model=base_model,
            base_revision=base_revision,
            label_names=label_names,
            data_config=data_config,
            training=training,
        )

    @staticmethod
    def from_pretrained(
        repo_or_dir: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str | None = None,
    ) -> DualForwardPathTeacher:
        """Load a prompt path, on `model` or on the base that it names. See `timm_dfpt.from_pretrained`."""
        from ..hub import load_teacher

        return load_teacher(
            repo_or_dir,
            model,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            subfolder=subfolder,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = 'Add prompt path',
        token: str | bool | None = None,
        force: bool = False,
        **others: Any,
    ) -> str:
        """Publish the prompt path. See `timm_dfpt.hub.push_prompt_path`, which has the other arguments, too."""
        from ..hub import push_prompt_path

        return push_prompt_path(
            self,  # type: ignore[arg-type]
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            token=token,
            force=force,
            **others,
        )
