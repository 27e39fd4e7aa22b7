"""timm models by their source: a timm name, `hf-hub:user/name` or `local-dir:folder`."""
from __future__ import annotations

import contextlib
import difflib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..data.paths import similar_path
from ..teacher.prompt_path import match_dtype
from ..utils.messages import shorten
from .base import safe_weights_name
from .build import CONFIG, WEIGHTS, build_meta, count_values, record_loading, remember_origin
from .config import check_arg_names
from .errors import HubError
from .files import MAX_JSON_BYTES, check_finite, read_specs, read_tensors
from .repo import Source, open_source
from .sources import HUB, LOCAL_DIR, parse_source
from .student import read_student_config, require_weights

__all__ = ['ModelSource', 'check_takes', 'load_weights_file']

_logger = logging.getLogger(__name__)



class ModelSource:
    """Where a model comes from, found before anything is built.

    Args:
        source: timm name, `hf-hub:user/name` or `local-dir:folder`.
        option: The option that names it, for messages.

    Raises:
        ValueError: If it is not such a name, or the folder has no model.
    """

    def __init__(self, source: str, option: str) -> None:
        self._option, self._label = option, f'{option}={shorten(source)}'
        try:
            self.name = parse_source(source)
        except ValueError as error:
            raise ValueError(f'{option}: {error}') from error
        folder, architecture = self.name.folder, self.name.name.partition('.')[0]
        if folder is not None:
            if not folder.is_dir():
                raise ValueError(f'{self._label}: there is no such folder{similar_path(str(folder))}.')
            missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
            if missing:
                raise ValueError(f'{self._label}: the folder {str(folder)!r} has no {missing[0]}.')
        elif not self.name.kind and not timm.is_model(architecture):
            known = timm.list_models()
            wanted = architecture.lower()
            close = timm.list_models(f'*{wanted}*')[:3] or difflib.get_close_matches(wanted, known, 3)
            hint = f' Did you mean {", ".join(close)}?' if close else ' See timm.list_models().'
            if Path(self.name.name).is_dir():
                hint = f' For the folder of this name write {LOCAL_DIR}{self.name.name}.'
            raise ValueError(f'{self._label} is not a timm model.{hint}')

    @property
    def names_weights(self) -> bool:
        """Whether it names weights and not an architecture alone."""
        return bool(self.name.kind) or '.' in self.name.name

    def pretrained_cfg(self) -> dict[str, Any]:
        """Return timm's `pretrained_cfg`, empty for an architecture without one.

        Raises:
            ValueError: If it cannot be loaded.
        """
        with self._errors('cannot be loaded'):
            if self.name.kind:
                twin: Any = build_meta(lambda: self._create(False), torch.float32)
                return dict(twin.pretrained_cfg)
            return dict(self._timm_cfg)

    def create(self, pretrained: bool, **kwargs: Any) -> nn.Module:
        """Create the model.

        Args:
            pretrained: Load its weights, which are never read from a pickle.
            **kwargs: Arguments of `timm.create_model`.

        Raises:
            ValueError: If it cannot be created; the message names the arguments.
        """
        return self._create_noting(pretrained, kwargs)[0]

    def create_teacher(self, **kwargs: Any) -> nn.Module:
        """Create the model with all of its weights.

        Args:
            **kwargs: Arguments of `timm.create_model`.

        Raises:
            ValueError: If it cannot be created, or an argument would throw weights away.
        """
        model, missing, unexpected = self._create_noting(True, kwargs)
        if unexpected and kwargs:
            # Some files of timm hold more than its models: what they leave is not the fault of the arguments.
            unexpected -= self._create_noting(True, {})[2]
        if missing or unexpected:
            lost = f'{_some(missing)} would be random' if missing else f'{_some(unexpected)} would be thrown away'
            given = f'{self._option}_kwargs ({_shown(kwargs)})' if kwargs else 'its config.json'
            raise ValueError(
                f'{self._label}: with {given} it is not the model that its weights belong to, and {lost}: leave out '
                'the arguments that change the architecture, or fine-tune it first (--method supervised --student '
                'TEACHER --student-pretrained).'
            )
        return model

    def create_student(self, pretrained: bool, head_init_scale: float | None = None, **kwargs: Any) -> nn.Module:
        """Create the model; warn about pretrained weights that are not used, except those of the classifier.

        A new head behind pretrained weights is 0: in some families timm draws it so large that the student starts
        confidently wrong.

        Args:
            pretrained: Start from its weights.
            head_init_scale: Factor on the initial weights of a new head; `None`: 0 behind pretrained weights, else 1.
            **kwargs: Arguments of `timm.create_model`.

        Raises:
            ValueError: If it cannot be created, or has no new head that the factor is for.
        """
        if not pretrained and self.names_weights:
            _warn_once(
                f'{self._label} names weights, but the student starts from random ones: give --student-pretrained to '
                'start from them.'
            )
        model, missing, unexpected = self._create_noting(pretrained, kwargs)
        classifier: Any = model.pretrained_cfg.get('classifier') or ()
        heads = tuple(f'{name}.' for name in ([classifier] if isinstance(classifier, str) else classifier))
        new, unused = ({name for name in names if not name.startswith(heads)} for names in (missing, unexpected))
        if new or unused:
            notes = [f'{_some(new)} start from random values'] if new else []
            notes += [f'{_some(unused)} of its weights are not used'] if unused else []
            _warn_once(f'{self._label} with {_shown(kwargs)}: {", and ".join(notes)}.')
        is_new = not pretrained or any(name.startswith(heads) for name in missing)
        if head_init_scale is not None and not is_new:
            raise ValueError(
                f'head_init_scale={head_init_scale:g}: {self._label} keeps the head of its weights, which has the '
                'same number of classes: leave --head-init-scale out.'
            )
        scale = head_init_scale if head_init_scale is not None else 0 if pretrained and is_new else 1
        for name, param in model.named_parameters():
            if scale != 1 and name.startswith(heads):
                param.data.mul_(scale)
        return model

    def _create_noting(self, pretrained: bool, kwargs: Mapping[str, Any]) -> tuple[Any, set[str], set[str]]:
        """Create the model; return the names of tensors that its weights lack, too, and of those that it lacks."""
        check_arg_names(f'{self._option}_kwargs', kwargs)
        overlay: dict[str, Any] = {}
        if pretrained:
            with self._errors('cannot be loaded'):
                weights = self._weights()
                overlay = {'file': str(weights), **dict.fromkeys(('source', 'hf_hub_id', 'hf_hub_filename', 'url'))}
                overlay['custom_load'] = False
        with self._errors(f'cannot be created with {_shown({"pretrained": pretrained, **kwargs})}'):
            if self.name.kind:
                # What an untrusted config asks for is bounded by the weights before memory is taken.
                specs = read_specs(weights) if pretrained else {}
                build_meta(lambda: self._create(False, **kwargs), torch.float32, len(specs), count_values(specs))
            with record_loading() as loaded:
                model = self._create(pretrained, overlay, **kwargs)
            missing, unexpected = loaded(model)
        if pretrained:
            with self._errors('cannot be loaded'):
                check_finite(weights.name, model.state_dict())
        self._note_origin(model)
        return model, missing, unexpected

    def _create(self, pretrained: bool, overlay: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        spec = f'{LOCAL_DIR}{self._folder}' if self.name.kind else self.name.name
        return timm.create_model(spec, pretrained=pretrained, pretrained_cfg_overlay=dict(overlay or {}), **kwargs)

    def _note_origin(self, model: Any) -> None:
        if self.name.kind:
            remember_origin(model, self._files)
        elif model.pretrained_cfg.pop('file', None):
            model.pretrained_cfg.update(self._timm_cfg, hf_hub_id=self._files.pinned)

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turn whatever timm and the Hub raise into an error that names the option."""
        try:
            yield
        except HubError as error:
            here = f' Weights that you have are loaded as {LOCAL_DIR}FOLDER (with {CONFIG} and {WEIGHTS}).'
            raise ValueError(f'{self._label} {doing}: {error}{"" if self.name.folder else here}') from error
        except Exception as error:
            raise ValueError(f'{self._label} {doing}: {" ".join(str(error).split())}') from error

    @functools.cached_property
    def _timm_cfg(self) -> Mapping[str, Any]:
        cfg = timm.get_pretrained_cfg(self.name.name)
        return cfg.to_dict() if cfg is not None else {}

    @functools.cached_property
    def _files(self) -> Source:
        """The folder or repository that its weights are in."""
        if self.name.kind:
            return open_source(str(self.name))
        if not self._timm_cfg.get('hf_hub_id'):
            has = 'them as a pickle only' if self._timm_cfg.get('url') else 'none of this name'
            raise ValueError(f'it needs pretrained weights, and timm has {has}.')
        return open_source(f'{HUB}{self._timm_cfg["hf_hub_id"]}')

    @functools.cached_property
    def _folder(self) -> Path:
        """Where its validated config is."""
        read_student_config(self._files)
        return self._files.get(CONFIG, MAX_JSON_BYTES).parent

    def _weights(self) -> Path:
        """Fetch and verify its safetensors: where there are none, timm would read a pickle."""
        cfg = self._timm_cfg if not self.name.kind else read_student_config(self._files)['pretrained_cfg']
        filename = WEIGHTS if self.name.folder else safe_weights_name(cfg)
        require_weights(self._files, filename)
        return self._files.get(filename)


@functools.cache
def _warn_once(message: str) -> None:
    # Every arm of a run creates the student anew.
    _logger.warning(message)


def _shown(kwargs: Mapping[str, Any]) -> str:
    return ', '.join(f'{key}={shorten(value)}' for key, value in kwargs.items())


def _some(names: set[str], most: int = 3) -> str:
    return ', '.join(sorted(names)[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


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
        model.load_state_dict(read_tensors(Path(path)), strict=True)
    except Exception as error:
        why = ' '.join(str(error).split())
        raise ValueError(f'{option} {path!r} does not fit {type(model).__name__}: {why}') from error


def check_takes(model: nn.Module, size: Sequence[int], label: str, classes: int | None) -> None:
    """Run a model in evaluation on an empty image; it is in training afterwards.

    Args:
        model: The model.
        size: `(C, H, W)` of the image.
        label: The option that names the model, for messages.
        classes: Number of classes; `None` for any number of features.

    Raises:
        ValueError: If it cannot take images of this size, or gives no logits `[B, K]`.
    """
    model.eval()
    try:
        with torch.no_grad():
            output = model(match_dtype(torch.zeros(1, *size), model))
    except Exception as error:
        why = ' '.join(str(error).split()).rstrip('.') or type(error).__name__
        raise ValueError(
            f'{label} cannot take images of input_size={size}: {why}. Give another '
            '--input-size, or the arguments of the architecture that fit it.'
        ) from error
    wanted = classes if classes is not None or not isinstance(output, torch.Tensor) else output.shape[-1]
    if not isinstance(output, torch.Tensor) or output.shape != (1, wanted):
        needed = f'logits [1, {classes}]' if classes is not None else 'features [1, D]'
        gives = f'a tensor {list(output.shape)}' if isinstance(output, torch.Tensor) else f'a {type(output).__name__}'
        raise ValueError(
            f'{label} gives {gives} for one image, not {needed}. Leave out the arguments of the '
            'architecture that change its output, or name a classifier.'
        )
    model.train()
