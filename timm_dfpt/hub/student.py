"""Students on disk: timm's own layout, which timm and transformers load without timm_dfpt."""
from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf
from timm.utils import unwrap_model
from torch import nn

from ..version import __version__
from .build import CONFIG, WEIGHTS, build_meta, count_values, float_dtype, remember_origin, specs_of
from .config import check_data_config, check_label_names, check_model_args
from .errors import HubError
from .files import (
    MAX_JSON_BYTES,
    check_tensors,
    read_json,
    read_specs,
    read_tensors,
    write_json,
    write_tensors,
)
from .licenses import License
from .options import StudentOptions, Unpack, check_options
from .repo import Source

__all__ = [
    'DISTILLATION',
    'build_student',
    'build_student_twin',
    'check_student',
    'read_student_config',
    'require_weights',
    'save_student',
]

DISTILLATION = 'distillation.json'

_PICKLES = ('.bin', '.pt', '.pth', '.pth.tar', '.ckpt', '.pkl', '.pickle')
# What timm copies from the checkpoint that a model started from, and what is not true of the student.
_NOT_INHERITED = ('tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes')
_LABELS = ('label_names', 'label_descriptions')  # they stand one level above


def save_student(
    model: nn.Module, save_directory: str | os.PathLike[str], **options: Unpack[StudentOptions]
) -> Path:
    """Save a timm model so that timm and transformers load the same weights, without timm_dfpt.

    Writes `config.json` and `model.safetensors` in timm's layout, and `distillation.json`. Before anything is written
    the model is built once more from its config without memory, and the shapes are compared.

    Args:
        model: Any classifier made by `timm.create_model`; wrappers of `torch.compile`, DDP and EMA are removed.
        save_directory: Folder, created if it does not exist.
        **options: `label_names`, `data_config`, `model_args`, `license`, `license_name`, `license_link`,
            `distillation`; see `timm_dfpt.hub.StudentOptions`.

    Returns:
        The folder.

    Raises:
        TypeError: If `model` is not a timm model, or there is no such option.
        ValueError: If the model cannot be rebuilt from its config, has weights that are not finite, or an option does
            not fit it.

    Example:
        >>> timm_dfpt.save_student(model, 'my-student', label_names=['cat', 'dog'], license='apache-2.0')
    """
    config, tensors = _prepared(model, options)
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config)
    versions = {'timm_dfpt': __version__, 'timm': timm.__version__, 'torch': torch.__version__}
    facts = options.get('distillation') or {}
    write_json(folder / DISTILLATION, {'format_version': 1, **facts, 'versions': versions})
    return folder


def check_student(model: nn.Module, **options: Unpack[StudentOptions]) -> None:
    """Refuse what `save_student` would, except weights that are not finite, and write nothing.

    Args:
        model: As in `save_student`.
        **options: As in `save_student`.

    Raises:
        TypeError: If `save_student` would raise it.
        ValueError: If `save_student` would raise it.
    """
    _prepared(model, options)


def _prepared(model: nn.Module, options: StudentOptions) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the `config.json` and the weights of a model that can be built again from them."""
    check_options(options, StudentOptions)
    if options.get('model_args'):
        check_model_args('model_args', options['model_args'])
    unwrapped = unwrap_model(model)
    if not isinstance(unwrapped, nn.Module) or not hasattr(unwrapped, 'pretrained_cfg'):
        raise TypeError(f'model must be made by timm.create_model, got {type(unwrapped).__name__}.')
    plain: Any = unwrapped
    config = _config_of(plain, options)
    tensors = plain.state_dict()
    _check_rebuild(config, tensors)
    return config, tensors


def _config_of(model: Any, options: StudentOptions) -> dict[str, Any]:
    """Return the `config.json` of a model: timm's, without what would be wrong for a student."""
    known = model.pretrained_cfg.get('label_names')
    names = options.get('label_names')
    if names is None:
        fits = known and len(known) == model.num_classes
        names = known if fits else [f'LABEL_{i}' for i in range(model.num_classes)]
    check_label_names(names, model.num_classes)
    with tempfile.TemporaryDirectory() as temporary:
        # timm gives its config as a file only.
        path = Path(temporary) / CONFIG
        save_config_for_hf(
            model,
            str(path),
            model_config={'label_names': list(names)},
            model_args=dict(options.get('model_args') or {}),
            data_config=dict(options.get('data_config') or {}),
        )
        config = read_json(path)
    # transformers passes num_classes itself and stumbles over a second one; timm finds it in the config.
    config.get('model_args', {}).pop('num_classes', None)
    for key in _NOT_INHERITED + _LABELS:
        config['pretrained_cfg'].pop(key, None)
    License.given(options).write_to(config)
    return config


def _check_rebuild(config: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    try:
        twin = build_student_twin(config, float_dtype(found))
        check_tensors('The model', found, specs_of(twin))
    except ValueError as error:
        raise ValueError(
            f'The model cannot be built again from its architecture {config["architecture"]!r} and arguments '
            f'{config.get("model_args", {})}, so nobody could load it: {error} '
            'Was it changed after timm.create_model? Save an unchanged architecture, or pass model_args=.'
        ) from error


def build_student(source: Source) -> nn.Module:
    """Build a student, or any other model in timm's layout with safetensors, strictly and in evaluation mode.

    The config is validated, and compared with the header of the weights file, before memory is taken.

    Args:
        source: Folder or repository.

    Raises:
        HubError: If a file is unavailable or damaged.
        ValueError: If config and weights are not of one valid model.
    """
    require_weights(source)
    config = read_student_config(source)
    weights = source.get(WEIGHTS)
    found = read_specs(weights)
    dtype = float_dtype(found)
    twin = build_student_twin(config, dtype, len(found), count_values(found))
    check_tensors(f'{WEIGHTS} of {source.name}', found, specs_of(twin))
    model = _create(config).to(dtype)
    model.load_state_dict(read_tensors(weights), strict=True)
    remember_origin(model, source)
    return model.eval()


def require_weights(source: Source, filename: str = WEIGHTS) -> None:
    """Refuse a folder or repository whose weights are not safetensors.

    Raises:
        HubError: If they are not, or there are none; the message says what there is instead.
    """
    if not filename.endswith('.safetensors'):
        raise HubError(f'Loading {source.name} refused: it has its weights in {filename}, which is not safetensors.')
    if source.has(filename):
        return
    pickles = [name for name in source.names() or [] if name.endswith(_PICKLES)]
    if pickles:
        raise HubError(
            f'Loading {source.name} refused: it has {pickles[0]}, a pickle, which can run code when it is read, and no '
            f'{filename}. Ask its author for safetensors.'
        )
    raise HubError(f'Loading {source.name} failed: there is no {filename} in it (or not in the cache, when offline).')


def read_student_config(source: Source) -> dict[str, Any]:
    """Read and validate `config.json` in timm's layout.

    Raises:
        HubError: If it is unavailable.
        ValueError: If a value in it is not allowed.
    """
    config = read_json(source.get(CONFIG, MAX_JSON_BYTES))
    if 'pretrained_cfg' not in config:
        # Old repositories have its keys at the top.
        top = {key: config.pop(key, None) for key in ('architecture', 'num_features')}
        config = {**top, 'num_classes': config.get('num_classes'), 'pretrained_cfg': config}
    architecture = config.get('architecture')
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(
            f'{CONFIG} of {source.name} names the architecture {str(architecture)[:80]!r}, which this timm '
            f'({timm.__version__}) does not have: try a newer timm.'
        )
    cfg = config.get('pretrained_cfg')
    classes = config.get('num_classes')
    if not isinstance(cfg, dict) or type(classes) is not int or not 0 <= classes <= 10**6:
        raise ValueError(
            f'{CONFIG} of {source.name} is not the config of a timm model: it needs pretrained_cfg, and num_classes '
            'up to 10**6.'
        )
    check_model_args('model_args', config.get('model_args', {}))
    check_data_config(cfg)
    if config.get('label_names') is not None and isinstance(config['label_names'], list):
        check_label_names(config['label_names'], classes)
    return config


def _create(config: Mapping[str, Any]) -> nn.Module:
    cfg = dict(config['pretrained_cfg'], architecture=config['architecture'], num_classes=config['num_classes'])
    if config.get('label_names') is not None:
        cfg['label_names'] = config['label_names']
    args = config.get('model_args', {})
    return timm.create_model(config['architecture'], pretrained=False, pretrained_cfg=cfg, **args)


def build_student_twin(
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    tensors: int | None = None,
    elements: int | None = None,
) -> nn.Module:
    """Build the model of a `config.json` without memory for its weights, see `build_meta`."""
    return build_meta(lambda: _create(config), dtype, tensors, elements)
