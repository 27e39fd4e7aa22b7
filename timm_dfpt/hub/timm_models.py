"""timm models by their source: a timm name, `hf-hub:user/name` or `local-dir:folder`."""
from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
from torch import nn

from .base import safe_weights_name
from .build import CONFIG, WEIGHTS
from .files import MAX_JSON_BYTES, read_json
from .repo import open_source
from .student import require_weights

__all__ = ['LOCAL_DIR', 'ModelSource', 'local_folder']

LOCAL_DIR = 'local-dir:'
"""What the source of a local folder begins with."""
_HUB = 'hf-hub:'


def local_folder(source: str) -> Path | None:
    """Return the folder that a source names, if it names one."""
    return Path(source.removeprefix(LOCAL_DIR)) if source.startswith(LOCAL_DIR) else None


class ModelSource:
    """Where a model comes from, found before anything is built.

    Args:
        source: timm name, `hf-hub:user/name` or `local-dir:folder`.
        option: The option that names it, for messages.

    Raises:
        ValueError: If it is not such a name, or the folder has no model.
    """

    def __init__(self, source: str, option: str) -> None:
        self.source = source
        self._label = f'{option}={source!r}'
        folder = local_folder(source)
        if folder is not None:
            missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
            if missing:
                raise ValueError(f'{self._label}: the folder {str(folder)!r} has no {missing[0]}.')
        elif ':' not in source and not timm.is_model(source.split('.')[0]):
            close = timm.list_models(f'*{source}*')[:3] or difflib.get_close_matches(source, timm.list_models(), 3)
            hint = f' Did you mean {", ".join(close)}?' if close else ' See timm.list_models().'
            raise ValueError(f'{self._label} is not a timm model.{hint}')

    def pretrained_cfg(self) -> dict[str, Any]:
        """Return timm's `pretrained_cfg`, empty for an architecture without one.

        Raises:
            ValueError: If it cannot be loaded.
        """
        try:
            if ':' in self.source:
                return dict(timm.create_model(self.source, pretrained=False).pretrained_cfg)
            cfg = timm.get_pretrained_cfg(self.source)
        except Exception as error:
            raise ValueError(f'{self._label} cannot be loaded: {error}') from error
        return cfg.to_dict() if cfg is not None else {}

    def create(self, pretrained: bool, **kwargs: Any) -> nn.Module:
        """Create the model.

        Args:
            pretrained: Load its weights, from the Hub as safetensors only.
            **kwargs: Arguments of `timm.create_model`.

        Raises:
            ValueError: If it cannot be created; the message names the arguments.
        """
        if pretrained and self.source.startswith(_HUB):
            self._fetch_weights()
        try:
            return timm.create_model(self.source, pretrained=pretrained, **kwargs)
        except Exception as error:
            shown = ', '.join(f'{key}={value!r}' for key, value in {'pretrained': pretrained, **kwargs}.items())
            raise ValueError(f'{self._label} cannot be created with {shown}: {error}') from error

    def _fetch_weights(self) -> None:
        """Fetch and verify the safetensors of a repository: where there are none, timm would read a pickle."""
        try:
            files = open_source(self.source)
            config = read_json(files.get(CONFIG, MAX_JSON_BYTES))
            cfg = config.get('pretrained_cfg')
            # Old repositories have these keys at the top.
            filename = safe_weights_name(cfg if isinstance(cfg, dict) else config)
            require_weights(files, filename)
            files.get(filename)
        except (OSError, ValueError) as error:
            raise ValueError(f'{self._label} cannot be loaded: {error}') from error
