"""timm models by their source: a timm name, `hf-hub:user/name` or `local-dir:folder`."""
from __future__ import annotations

import difflib
import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from .base import safe_weights_name
from .build import CONFIG, WEIGHTS
from .files import MAX_JSON_BYTES, read_json
from .repo import open_source
from .student import require_weights

__all__ = ['LOCAL_DIR', 'ModelSource', 'check_class_order', 'check_takes', 'load_weights_file', 'local_folder']

_logger = logging.getLogger(__name__)

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


def load_weights_file(model: nn.Module, path: str, option: str) -> None:
    """Load a safetensors file into `model`, strictly.

    Args:
        model: The model.
        path: The file.
        option: The option that names it, for messages.

    Raises:
        ValueError: If the file is missing, not safetensors, or does not fit the model.
    """
    if not path.endswith('.safetensors') or not Path(path).is_file():
        raise ValueError(
            f'{option} must be an existing .safetensors file, got {path!r}. Pickled checkpoints are never loaded; '
            'convert them once with torch.load(weights_only=True) and safetensors.torch.save_file.'
        )
    try:
        model.load_state_dict(load_file(path), strict=True)
    except Exception as error:
        raise ValueError(f'{option} {path!r} does not fit {type(model).__name__}: {error}') from error


def check_class_order(teacher: str, known: Sequence[str], class_names: Sequence[str]) -> None:
    """Refuse a teacher that has other names for the classes than the data, or the same in another order.

    Args:
        teacher: Its source, for messages.
        known: Its names, empty if it has none.
        class_names: Those of the data.

    Raises:
        ValueError: If they differ.
    """
    # Those of the data are NFC; a decomposed é of the teacher's is the same letter.
    known = [unicodedata.normalize('NFC', name) for name in known]
    if not known or known == list(class_names):
        return
    if len(known) != len(class_names):
        raise ValueError(
            f'teacher {teacher!r} has {len(known)} names for {len(class_names)} classes: repair label_names in its '
            'config.json.'
        )
    where = next(i for i, (a, b) in enumerate(zip(known, class_names, strict=True)) if a != b)
    if _are_numbers(known) != _are_numbers(class_names):
        _logger.warning(
            f'Either the teacher {teacher!r} or the data have numbers for names of the classes (class {where} is '
            f'{known[where]!r} for the teacher and {class_names[where]!r} in the data): that their order is the same '
            'is taken on trust.'
        )
        return
    raise ValueError(
        f'teacher {teacher!r} and the data name their classes differently: class {where} is {known[where]!r} for the '
        f'teacher and {class_names[where]!r} in the data. Use the data (or the class order) that the teacher was '
        'trained on.'
    )


def _are_numbers(names: Sequence[str]) -> bool:
    # What integer labels are called, here and in a student that was trained on them, and what `save_student` writes
    # where it is given none: no names of their own.
    return all(name.removeprefix('LABEL_').removeprefix('-').isdecimal() for name in names)


def check_takes(model: nn.Module, size: Sequence[int], label: str) -> None:
    """Run a model in evaluation on an empty image; it is in training afterwards.

    Args:
        model: The model.
        size: `(C, H, W)` of the image.
        label: The option that names the model, for messages.

    Raises:
        ValueError: If it cannot take images of this size.
    """
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, *size))
    except Exception as error:
        raise ValueError(
            f'{label} cannot take images of input_size={size}: {str(error) or type(error).__name__}. Give another '
            '--input-size, or the arguments of the architecture that fit it.'
        ) from error
    model.train()
