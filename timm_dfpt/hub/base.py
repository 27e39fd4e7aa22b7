"""The base model of a prompt path: what it is recorded as, and how it is found, rebuilt and checked."""
from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from .config import Fingerprint, PromptPathRecord
from .download import Source, open_source, split_hub_id
from .errors import HubError
from .files import MAX_JSON_BYTES
from .student import BUILD_ERRORS, CONFIG, WEIGHTS, build_meta, read_student_config, remember_origin

__all__ = ['build_base', 'build_meta_base', 'check_base', 'commit_of', 'fingerprint', 'hub_repo_of', 'origin_of']


def origin_of(base: Any) -> tuple[str | None, str | None]:
    """Return where timm loaded a model from, as an id that others can use, and its commit in the local cache.

    Both are `None` where others cannot have it.
    """
    cfg = getattr(base, 'pretrained_cfg', None) or {}
    hub_id = cfg.get('hf_hub_id')
    if cfg.get('source') == 'hf-hub' and hub_id:
        repo_id, revision = split_hub_id(hub_id)
        return f'hf-hub:{repo_id}', _commit_in_cache(repo_id, revision, CONFIG)
    if cfg.get('source') == 'local-dir' or cfg.get('file') or not (hub_id or cfg.get('url')):
        return None, None
    name = '.'.join(filter(None, (cfg.get('architecture'), cfg.get('tag'))))
    if not hub_id:
        return name, None
    repo_id, revision = split_hub_id(hub_id)
    return name, _commit_in_cache(repo_id, revision, safe_weights_name(cfg))


def _commit_in_cache(repo_id: str, revision: str | None, filename: str) -> str | None:
    if revision is not None and re.fullmatch(r'[0-9a-f]{40}', revision):
        return revision
    path = try_to_load_from_cache(repo_id, filename, revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def safe_weights_name(cfg: Mapping[str, Any]) -> str:
    """Return the name of a pretrained model's weights file in safetensors form (timm's own rule)."""
    name = cfg.get('hf_hub_filename') or 'pytorch_model.bin'
    known = {'pytorch_model.bin': WEIGHTS, 'open_clip_pytorch_model.bin': 'open_clip_model.safetensors'}
    return known.get(name, name.removesuffix('.bin') + '.safetensors' if name.endswith('.bin') else name)


def hub_repo_of(base_model: str | None) -> str | None:
    """Return the repository on the Hub that a recorded base is in."""
    if base_model is None or base_model.startswith('hf-hub:'):
        return base_model and base_model.removeprefix('hf-hub:')
    cfg = timm.get_pretrained_cfg(base_model)
    return split_hub_id(cfg.hf_hub_id)[0] if cfg is not None and cfg.hf_hub_id else None


def commit_of(model: Any) -> str | None:
    """Return the commit that a model loaded from the Hub is of."""
    hub_id = model.pretrained_cfg.get('hf_hub_id')
    return split_hub_id(hub_id)[1] if hub_id else None


def fingerprint(model: nn.Module) -> Fingerprint:
    """Return what identifies a base model: its shapes and its weights, as hashes.

    The shapes alone are hashed of a model on the meta device.
    """
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        shapes.update(f'{name} {list(tensor.shape)} {tensor.dtype}\n'.encode())
        if tensor.device.type != 'meta':
            plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            weights.update(plain.numpy().data)
    parameters = list(model.parameters())
    dtype: Any = str(parameters[0].dtype).removeprefix('torch.')
    count = sum(p.numel() for p in parameters)
    return Fingerprint(dtype, count, shapes.hexdigest(), weights.hexdigest())


def check_base(config: PromptPathRecord, found: Fingerprint, shapes_only: bool = False) -> None:
    """Compare a base model with the one that the prompt path was tuned on.

    Raises:
        ValueError: It is another one; the message says what was expected and what was found.
    """
    wanted = config.base_fingerprint
    if shapes_only:
        # Of a model without memory only the rest is known.
        found, wanted = (dataclasses.replace(f, weights='') for f in (found, wanted))
    if found == wanted:
        return
    name = config.base_model or config.base_architecture or 'a model that is not on the Hub'
    at = f' at revision {config.base_revision}' if config.base_revision else ''
    same = found.shapes == wanted.shapes
    raise ValueError(
        f'The base model is not the one that this prompt path was tuned on. Expected {name}{at}: {wanted}; '
        f'found: {found}. ' + ('Same architecture, other weights: ' if same else 'Another architecture: ') + 'pass '
        'model= the very teacher that it was tuned on (same checkpoint, same number of classes, same dtype).'
    )


def build_meta_base(config: PromptPathRecord, source: Source) -> nn.Module:
    """Build the base model without memory for its weights, and without downloading them.

    Raises:
        HubError: Its config cannot be had.
        ValueError: The base is not named, or cannot be built.
    """
    if config.base_model is None or config.base_architecture is None:
        raise ValueError(
            f'{source.name} was tuned on {config.base_architecture or "a model that is not of timm"}, which its author '
            f'did not publish ({config.base_fingerprint}). Pass it: from_pretrained({source.name!r}, model=...).'
        )
    name = config.base_model
    if name.startswith('hf-hub:'):
        base = _base_source(name, config, source)
        read_student_config(base)
        name = f'local-dir:{base.get(CONFIG, MAX_JSON_BYTES).parent}'
    return build_meta(lambda: timm.create_model(name, **config.base_model_args), _dtype(config))


def build_base(config: PromptPathRecord, source: Source) -> nn.Module:
    """Build the base model through timm, from safetensors only, at the recorded revision.

    Args:
        config: Says which.
        source: Where the prompt path is from; token, cache and offline mode are taken from it.

    Raises:
        HubError: Its files cannot be had.
        ValueError: It cannot be built from them.
    """
    name = str(config.base_model)
    from_repo = name.startswith('hf-hub:')
    hub_id, filename = (name, WEIGHTS) if from_repo else _timm_weights(name)
    base = _base_source(hub_id, config, source)
    weights = base.get(filename)
    needed = config.base_fingerprint.parameters * _dtype(config).itemsize
    if weights.stat().st_size < needed // 2:
        # Half, because weights may be stored in half precision. This bounds the memory that is taken below.
        count = config.base_fingerprint.parameters
        raise ValueError(f'{filename} of {base.name} is too small for a model of {count:,} parameters.')
    if from_repo:
        spec, overlay = f'local-dir:{base.get(CONFIG, MAX_JSON_BYTES).parent}', None
    else:
        spec, overlay = name, {'file': str(weights), 'hf_hub_id': None, 'url': None, 'custom_load': False}
    try:
        model = timm.create_model(spec, pretrained=True, pretrained_cfg_overlay=overlay, **config.base_model_args)
    except BUILD_ERRORS as error:
        raise ValueError(f'The base model {name} cannot be built: {type(error).__name__}: {error}') from error
    if from_repo:
        remember_origin(model, base)
    else:
        model.pretrained_cfg.update(timm.get_pretrained_cfg(name).to_dict(), hf_hub_id=base.pinned)
        model.pretrained_cfg.pop('file', None)
    return model.to(_dtype(config))


def _timm_weights(name: str) -> tuple[str, str]:
    """Return repository and file of the weights that timm has under a name."""
    cfg = timm.get_pretrained_cfg(name)
    filename = safe_weights_name(cfg.to_dict()) if cfg is not None else ''
    if cfg is None or not cfg.hf_hub_id or not filename.endswith('.safetensors'):
        raise ValueError(
            f'The weights of {name} are not on the Hub as safetensors for this timm ({timm.__version__}). Create the '
            'model yourself and pass it: from_pretrained(..., model=...).'
        )
    return cfg.hf_hub_id, filename


def _base_source(name: str, config: PromptPathRecord, source: Source) -> Source:
    repo_id, revision = split_hub_id(name)
    offline = source.folder is None and source.files is None
    try:
        return open_source(
            f'hf-hub:{repo_id}',
            revision=config.base_revision or revision,
            token=source.token,
            cache_dir=source.cache_dir,
            local_files_only=offline,
            force_download=source.force_download,
        )
    except HubError as error:
        raise HubError(f'The base model of {source.name}: {error}') from error


def _dtype(config: PromptPathRecord) -> torch.dtype:
    return getattr(torch, config.base_fingerprint.dtype)
