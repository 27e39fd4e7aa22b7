"""Students on disk: timm's own layout, which timm and transformers load without timm_dfpt."""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf
from timm.utils import unwrap_model
from torch import nn

from ..version import __version__
from .config import check_data_config, check_label_names, check_model_args
from .download import Source
from .errors import HubError
from .files import (
    MAX_JSON_BYTES,
    TensorSpec,
    check_tensors,
    read_json,
    read_specs,
    read_tensors,
    write_json,
    write_tensors,
)

__all__ = ['CONFIG', 'DISTILLATION', 'WEIGHTS', 'load_student', 'save_student']

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
DISTILLATION = 'distillation.json'

_PICKLES = ('.bin', '.pt', '.pth', '.pth.tar', '.ckpt', '.pkl', '.pickle')
# What timm copies from the checkpoint that a model started from, and what is not true of the student.
_NOT_INHERITED = ('tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes')
_LABELS = ('label_names', 'label_descriptions')  # they stand one level above
# What building a model from a wrong config can end in, all over timm's models.
BUILD_ERRORS = (
    AssertionError,
    AttributeError,
    ArithmeticError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def save_student(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    license: str | None = None,
    distillation: Mapping[str, Any] | None = None,
) -> Path:
    """Save a timm model so that timm and transformers load it, bit for bit, without timm_dfpt.

    Writes `config.json` and `model.safetensors` in timm's layout, and `distillation.json`. Before anything is written
    the model is built once more from its config without memory, and the shapes are compared.

    Args:
        model: Any classifier made by `timm.create_model`; `torch.compile`, DDP and EMA wrappers are looked through.
        save_directory: Folder, made where it does not exist.
        label_names: A name for each class. Default: those in the model's `pretrained_cfg`, else `LABEL_0`, ... (without
            any, transformers would take whatever has 1000 classes for ImageNet).
        data_config: The preprocessing that the model was trained with, keys as `timm.data.resolve_data_config`
            returns them (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`). Default: the model's.
        model_args: Arguments of `timm.create_model` where they cannot be written as JSON (an activation class);
            timm remembers the others.
        license: Licence of the weights, e.g. `'apache-2.0'`. Never taken from the checkpoint the model started from.
        distillation: Facts about the distillation, JSON values: teacher, prompt path, recipe, metrics, versions.

    Returns:
        The folder.

    Raises:
        TypeError: `model` is no timm model.
        ValueError: The model cannot be rebuilt from its config, has weights that are not finite, or an argument does
            not fit it.
    """
    unwrapped = unwrap_model(model)
    if not isinstance(unwrapped, nn.Module) or not hasattr(unwrapped, 'pretrained_cfg'):
        raise TypeError(f'model must be made by timm.create_model, got {type(unwrapped).__name__}.')
    plain: Any = unwrapped
    classes = plain.num_classes
    known = plain.pretrained_cfg.get('label_names')
    if label_names is None and known and len(known) == classes:
        label_names = known
    names = list(label_names) if label_names is not None else [f'LABEL_{i}' for i in range(classes)]
    check_label_names(names, classes)
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    config_path = folder / f'.{CONFIG}.incomplete'
    try:
        save_config_for_hf(
            plain,
            config_path,
            model_config={'label_names': names},
            model_args=dict(model_args or {}),
            data_config=dict(data_config or {}),
        )
        config = read_json(config_path)
    finally:
        config_path.unlink(missing_ok=True)
    # transformers passes num_classes itself and stumbles over a second one; timm finds it in the config.
    config.get('model_args', {}).pop('num_classes', None)
    for key in _NOT_INHERITED + _LABELS:
        config['pretrained_cfg'].pop(key, None)
    if license is not None:
        config['pretrained_cfg']['license'] = license
    tensors = plain.state_dict()
    _check_rebuild(config, tensors)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config)
    versions = {'timm_dfpt': __version__, 'timm': timm.__version__, 'torch': torch.__version__}
    write_json(folder / DISTILLATION, {'format_version': 1, **(distillation or {}), 'versions': versions})
    return folder


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


def load_student(source: Source) -> nn.Module:
    """Load a student, or any other model in timm's layout with safetensors, strictly and in evaluation mode.

    The config is validated, and compared with the header of the weights file, before memory is taken.

    Args:
        source: Folder or repository.

    Raises:
        HubError: A file cannot be had or is damaged.
        ValueError: Config and weights are not of one valid model.
    """
    require_weights(source)
    config = read_student_config(source)
    weights = source.get(WEIGHTS)
    found = read_specs(weights)
    dtype = float_dtype(found)
    twin = build_student_twin(config, dtype)
    check_tensors(f'{WEIGHTS} of {source.name}', found, specs_of(twin))
    model = _create(config).to(dtype)
    model.load_state_dict(read_tensors(weights), strict=True)
    remember_origin(model, source)
    return model.eval()


def require_weights(source: Source, filename: str = WEIGHTS) -> None:
    """Refuse a folder or repository whose weights are no safetensors.

    Raises:
        HubError: They are not, or there are none; the message says what there is instead.
    """
    if not filename.endswith('.safetensors'):
        raise HubError(f'Loading {source.name} refused: it has its weights in {filename}, which is no safetensors.')
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
        HubError: It cannot be had.
        ValueError: A value in it is not allowed.
    """
    config = read_json(source.get(CONFIG, MAX_JSON_BYTES))
    architecture = config.get('architecture')
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(
            f'{CONFIG} of {source.name} names the architecture {str(architecture)[:80]!r}, which this timm '
            f'({timm.__version__}) does not have; a newer timm may.'
        )
    cfg = config.get('pretrained_cfg')
    classes = config.get('num_classes')
    if not isinstance(cfg, dict) or type(classes) is not int or not 0 <= classes <= 10**6:
        raise ValueError(f'{CONFIG} of {source.name} is not of a timm model: it lacks pretrained_cfg or num_classes.')
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


def build_student_twin(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build the model of a `config.json` without memory for its weights."""
    return build_meta(lambda: _create(config), dtype)


def build_meta(create: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """Build a model without memory for its weights.

    Raises:
        ValueError: It cannot be built; whatever was raised is the cause.
    """
    try:
        with torch.device('meta'):
            return create().to(dtype)
    except BUILD_ERRORS as error:
        raise ValueError(f'No model can be built from this config: {type(error).__name__}: {error}') from error


def specs_of(model: nn.Module) -> dict[str, TensorSpec]:
    """Return shape and dtype of every tensor in a model's state dict."""
    return {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}


def float_dtype(specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """Return the dtype of the first floating-point tensor, float32 where there is none."""
    return next((dtype for _, dtype in specs.values() if dtype.is_floating_point), torch.float32)


def remember_origin(model: Any, source: Source) -> None:
    """Note in the model's `pretrained_cfg`, as timm does, where its weights are from."""
    for key in ('file', 'url', 'hf_hub_id', 'source'):
        model.pretrained_cfg.pop(key, None)
    if source.folder is not None:
        model.pretrained_cfg.update(source='local-dir', file=str(source.folder))
        return
    model.pretrained_cfg.update(source='hf-hub', hf_hub_id=source.pinned)
