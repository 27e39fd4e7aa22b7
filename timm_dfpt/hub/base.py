"""The base model of a prompt path: what it is recorded as, and how it is found, rebuilt and checked."""
from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from ..backbone.input_size import published_state
from .build import BUILD_ERRORS, CONFIG, WEIGHTS, build_meta, remember_origin
from .config import Fingerprint, PromptPathRecord
from .errors import HubError
from .files import MAX_JSON_BYTES
from .options import LoadOptions
from .repo import Source, open_source
from .sources import HUB, parse_source, split_hub_id
from .student import read_student_config

__all__ = [
    'RecordedBase',
    'canonical_base',
    'check_base',
    'fingerprint',
    'hash_tensors',
    'hub_repo_of',
    'origin_of',
    'safe_weights_name',
]


def canonical_base(base_model: str | None) -> str | None:
    """Return a base model, as the user has named it, in the one way in which it is recorded.

    Raises:
        ValueError: If it is malformed.
    """
    try:
        return str(parse_source(base_model)) if base_model else base_model
    except ValueError as error:
        raise ValueError(f'base_model must be a timm name or {HUB}user/name: {error}') from error


def origin_of(base: Any) -> tuple[str | None, str | None]:
    """Return where timm loaded a model from, as an id that others can use, and its commit in the local cache.

    Both are `None` where it is not available to others.
    """
    cfg = getattr(base, 'pretrained_cfg', None) or {}
    hub_id = cfg.get('hf_hub_id')
    if cfg.get('source') == 'hf-hub' and hub_id:
        repo_id, revision = split_hub_id(hub_id)
        return f'{HUB}{repo_id}', _commit_in_cache(repo_id, revision, CONFIG)
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
    if base_model is None or base_model.startswith(HUB):
        return base_model and base_model.removeprefix(HUB)
    cfg = timm.get_pretrained_cfg(base_model)
    return split_hub_id(cfg.hf_hub_id)[0] if cfg is not None and cfg.hf_hub_id else None


def fingerprint(model: nn.Module) -> Fingerprint:
    """Return what identifies a base model: its shapes and its weights, as hashes.

    The shapes alone are hashed of a model on the meta device. Of a model that was set to another input size it is what
    was published.
    """
    state = published_state(model)
    shapes, weights = hash_tensors(state)
    parameters = dict(model.named_parameters())
    dtype: Any = str(next(iter(parameters.values())).dtype).removeprefix('torch.')
    count = sum(state.get(name, p).numel() for name, p in parameters.items())
    return Fingerprint(dtype, count, shapes, weights)


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    """Return hashes of the shapes and of the values of tensors; those on the meta device have no values."""
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        shapes.update(f'{name} {list(tensor.shape)} {tensor.dtype}\n'.encode())
        if tensor.device.type != 'meta':
            plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            weights.update(plain.numpy().data)
    return shapes.hexdigest(), weights.hexdigest()


def check_base(config: PromptPathRecord, found: Fingerprint, shapes_only: bool = False) -> None:
    """Compare a base model with the one that the prompt path was tuned on.

    Raises:
        ValueError: If it is another one; the message says what was expected and what was found.
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


class RecordedBase:
    """The base model that a prompt path names, resolved once: built without memory first, and then with its weights.

    Args:
        record: Names it.
        source: Where the prompt path is from; token, cache and offline mode are taken from it.

    Raises:
        ValueError: If the base is not named.
    """

    def __init__(self, record: PromptPathRecord, source: Source) -> None:
        if record.base_model is None or record.base_architecture is None:
            architecture = record.base_architecture or 'a model that is not of timm'
            raise ValueError(
                f'{source.name} was tuned on {architecture}, which its author did not publish '
                f'({record.base_fingerprint}): pass that model, load_teacher({source.name!r}, model=...).'
            )
        self.name = record.base_model
        self.record = record
        self.dtype: torch.dtype = getattr(torch, record.base_fingerprint.dtype)
        self._prompt_source = source

    @functools.cached_property
    def source(self) -> Source:
        """Its repository, at the recorded commit.

        Raises:
            HubError: If it is unavailable.
            ValueError: If timm has no safetensors of it.
        """
        named = self._timm_cfg['hf_hub_id'] if self._timm_cfg else self.name.removeprefix(HUB)
        repo_id, revision = split_hub_id(named)
        options: LoadOptions = {
            **self._prompt_source.options,
            'revision': self.record.base_revision or revision,
            'subfolder': None,
            'local_files_only': self._prompt_source.offline,
        }
        try:
            return open_source(f'{HUB}{repo_id}', **options)
        except HubError as error:
            raise HubError(f'The base model of {self._prompt_source.name}: {error}') from error

    @property
    def commit(self) -> str | None:
        """The commit that it is loaded at, where it is known."""
        return self.source.commit or self.source.options.get('revision')

    def build_meta(self) -> nn.Module:
        """Build it without memory for its weights, and without downloading them.

        Raises:
            HubError: If its config is unavailable.
            ValueError: If it cannot be built.
        """
        spec = self._spec
        values = self.record.base_fingerprint.parameters
        return build_meta(lambda: timm.create_model(spec, **self.record.base_model_args), self.dtype, elements=values)

    def build(self) -> nn.Module:
        """Build it through timm, from safetensors only.

        Raises:
            HubError: If its files are unavailable.
            ValueError: If it cannot be built from them.
        """
        cfg = self._timm_cfg
        filename = safe_weights_name(cfg) if cfg else WEIGHTS
        weights = self.source.get(filename)
        count = self.record.base_fingerprint.parameters
        if weights.stat().st_size < count * self.dtype.itemsize // 2:
            # Half, because weights may be stored in half precision. This bounds the memory that is taken below.
            raise ValueError(
                f'{filename} of {self.source.name} is too small for a model of {count:,} parameters: it is damaged, '
                'or belongs to another model.'
            )
        overlay = {'file': str(weights), 'hf_hub_id': None, 'url': None, 'custom_load': False} if cfg else None
        args = self.record.base_model_args
        try:
            model = timm.create_model(self._spec, pretrained=True, pretrained_cfg_overlay=overlay, **args)
        except BUILD_ERRORS as error:
            raise ValueError(f'The base model {self.name} cannot be built: {type(error).__name__}: {error}') from error
        if cfg:
            model.pretrained_cfg.update(cfg, hf_hub_id=self.source.pinned)
            model.pretrained_cfg.pop('file', None)
        else:
            remember_origin(model, self.source)
        return model.to(self.dtype)

    @functools.cached_property
    def _timm_cfg(self) -> dict[str, Any] | None:
        """What timm knows of the pretrained model of this name; `None` for a repository."""
        if self.name.startswith(HUB):
            return None
        cfg = timm.get_pretrained_cfg(self.name)
        if cfg is None or not cfg.hf_hub_id or not safe_weights_name(cfg.to_dict()).endswith('.safetensors'):
            raise ValueError(
                f'The weights of {self.name} are not on the Hub as safetensors for this timm ({timm.__version__}). '
                'Create the model yourself and pass it: load_teacher(..., model=...).'
            )
        return cfg.to_dict()

    @functools.cached_property
    def _spec(self) -> str:
        """What `timm.create_model` takes for it."""
        if self._timm_cfg:
            return self.name
        read_student_config(self.source)
        return f'local-dir:{self.source.get(CONFIG, MAX_JSON_BYTES).parent}'
