"""Where a backbone can be opened: the modules after which the prompt path puts its blocks."""
from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

__all__ = ['Feature', 'Stage', 'calibration_input', 'find_stages', 'token_grid']

_logger = logging.getLogger(__name__)

_DEFAULT_NUM_STAGES = 4
# Small enough that wrapping costs little, large enough that a reduction of 32 leaves a map and not a point.
_CALIBRATION_SIZES = (64, 96, 128, 224)


@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature tensor in the output of a stage.

    Args:
        index: Position among the tensors of the module's output (most modules return just one: 0).
        channels: Number of channels `C`.
        layout: `'NCHW'` `[B, C, H, W]`, `'NHWC'` `[B, H, W, C]` or `'NLC'` `[B, L, C]`.
        prefix_tokens: NLC only: leading class or register tokens, which are no part of the picture.
    """

    index: int
    channels: int
    layout: str
    prefix_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Stage:
    """A place where a backbone can be opened.

    Args:
        module: Name of the module whose output is the stage's output.
        reduction: Input pixels per feature pixel along a side.
        features: The feature tensors in that output.
    """

    module: str
    reduction: int
    features: tuple[Feature, ...]


def find_stages(
    model: nn.Module,
    stages: int | Sequence[str] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> list[Stage]:
    """Find the stages of a backbone, by its `feature_info` and one forward pass.

    Args:
        model: Any timm model, or with a list of module names any model that returns tensors there.
        stages: `None` for the model's own stages (at most four; a plain transformer's blocks are grouped evenly), a
            number for that many, or a list of module names in the order in which they run.
        input_size: Size `(C, H, W)` of the calibration input; by default the smallest that the model takes.

    Returns:
        The stages in the order in which they run.

    Raises:
        ValueError: The stages cannot be found; the message names the model, the reason and the remedy.
    """
    taps = _named_taps(model, stages) if _is_names(stages) else _feature_info_taps(model, stages)
    taps = [dataclasses.replace(tap, module=_leaf_of_container(model, tap.module)) for tap in taps]
    return _calibrate(model, taps, calibration_input(model, input_size))


@dataclasses.dataclass(frozen=True)
class _Tap:
    """What is known of a stage before the calibration pass."""

    module: str
    channels: int | None = None
    reduction: int | None = None


def _is_names(stages: Any) -> bool:
    return isinstance(stages, Sequence) and not isinstance(stages, str)


def _named_taps(model: nn.Module, names: Any) -> list[_Tap]:
    modules = dict(model.named_modules())
    if not names:
        raise ValueError('stages=[] names no module; name at least one, or leave stages=None.')
    for name in names:
        if not isinstance(name, str) or name not in modules or not name:
            raise ValueError(
                f'stages names {name!r}, which is no module of {type(model).__name__}. '
                'See [name for name, _ in model.named_modules()].'
            )
    if len(set(names)) != len(names):
        raise ValueError(f'stages={list(names)!r} names a module twice.')
    return [_Tap(name) for name in names]


def _feature_info_taps(model: nn.Module, num_stages: Any) -> list[_Tap]:
    if num_stages is not None and (type(num_stages) is not int or num_stages < 1):
        raise ValueError(
            f'stages must be None, a positive number of stages or a list of module names, got {num_stages!r}.'
        )
    info = getattr(model, 'feature_info', None)
    entries = getattr(info, 'info', info)
    if not entries:
        raise ValueError(
            f'{type(model).__name__} has no feature_info that says where its stages are; '
            'name the modules that end a stage, e.g. stages=["layer1", "layer2", "layer3"].'
        )
    taps = [_Tap(e['module'], e['num_chs'], e['reduction']) for e in entries]
    if len(taps) > 6 and len({(t.channels, t.reduction) for t in taps}) == 1:
        # A plain transformer: all blocks alike, so stages are even groups of blocks.
        count = num_stages or _DEFAULT_NUM_STAGES
        if count <= len(taps):
            return [taps[math.ceil(len(taps) * (i + 1) / count) - 1] for i in range(count)]
    count = num_stages or min(_DEFAULT_NUM_STAGES, len(taps))
    if count > len(taps):
        raise ValueError(
            f'stages={num_stages} asks for more stages than the {len(taps)} that {type(model).__name__} has.'
        )
    return taps[-count:]


def _leaf_of_container(model: nn.Module, name: str) -> str:
    """Return the last child of a container instead of it.

    timm's `checkpoint_seq` runs the children of an `nn.Sequential` one by one and so bypasses a hook on the container;
    an `nn.ModuleList` is never called at all.
    """
    module: Any = model.get_submodule(name)
    while type(module) in (nn.Sequential, nn.ModuleList) and len(module):
        child = list(module._modules)[-1]
        name, module = f'{name}.{child}', module.get_submodule(child)
    return name


def calibration_input(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> torch.Tensor:
    """Return a small input `[2, C, H, W]` that the model takes, with fixed pseudo-random values.

    Args:
        model: The model; its dtype and device are used.
        input_size: `(C, H, W)`; by default the smallest size that the model is known to take.
    """
    param = next(model.parameters(), None)
    device = param.device if param is not None else torch.device('cpu')
    dtype = param.dtype if param is not None else torch.float32
    size = input_size or _smallest_input_size(model)
    if device.type == 'meta':
        return torch.empty(2, *size, device=device, dtype=dtype)
    # A generator of its own: wrapping a model must not move the user's random state.
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    return x.to(device=device, dtype=dtype)


def _smallest_input_size(model: nn.Module) -> tuple[int, int, int]:
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    in_chans = getattr(model, 'in_chans', None) or (cfg.get('input_size') or (3,))[0]
    img_size = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    if img_size is not None:
        return (in_chans, *((img_size, img_size) if isinstance(img_size, int) else tuple(img_size)))
    if cfg.get('input_size') and cfg.get('fixed_input_size'):
        return (in_chans, *cfg['input_size'][1:])
    if cfg.get('min_input_size'):
        return (in_chans, *cfg['min_input_size'][1:])
    height, width = cfg['input_size'][1:] if cfg.get('input_size') else (_CALIBRATION_SIZES[-1],) * 2
    smallest = _CALIBRATION_SIZES[0]
    return in_chans, min(smallest, height), min(smallest, width)


def _calibrate(model: nn.Module, taps: list[_Tap], x: torch.Tensor) -> list[Stage]:
    outputs: dict[str, Any] = {}
    order: list[str] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[name] = output
            order.append(name)

        return hook

    handles = [model.get_submodule(tap.module).register_forward_hook(record(tap.module)) for tap in taps]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    names = [tap.module for tap in taps]
    if order != names:
        raise ValueError(
            f'The stages {names} of {type(model).__name__} must each run once a forward and in this order, but '
            f'{order or "none of them"} ran. Name other modules, in the order in which they run: stages=[...].'
        )
    return [_stage_of(model, tap, outputs[tap.module], (x.shape[-2], x.shape[-1])) for tap in taps]


def _stage_of(model: nn.Module, tap: _Tap, output: Any, image_size: tuple[int, int]) -> Stage:
    features, reduction = [], tap.reduction
    for index, tensor in enumerate(pytree.tree_leaves(output)):
        if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (3, 4):
            continue
        layout = _layout_of(model, tensor, tap.channels)
        if layout is None:
            continue
        side = image_size[0] // max(1, tensor.shape[2 if layout == 'NCHW' else 1]) if tensor.ndim == 4 else None
        reduction = reduction or side or max(1, round(math.sqrt(math.prod(image_size) / tensor.shape[1])))
        channels = tensor.shape[1 if layout == 'NCHW' else -1]
        prefix = _prefix_tokens(model, tensor.shape[1], image_size, reduction) if layout == 'NLC' else 0
        features.append(Feature(index, channels, layout, prefix))
    if not features:
        shapes = [tuple(t.shape) for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
        raise ValueError(
            f'The output of stage {tap.module!r} of {type(model).__name__} holds no features [B, C, H, W], '
            f'[B, H, W, C] or [B, L, C] of {tap.channels or "any"} channels, but tensors of shape {shapes}. '
            'Name another module: stages=[...].'
        )
    return Stage(tap.module, reduction or 1, tuple(features))


def _layout_of(model: nn.Module, tensor: torch.Tensor, channels: int | None) -> str | None:
    if tensor.ndim == 3:
        return 'NLC' if channels in (None, tensor.shape[2]) else None
    declared = str(getattr(model, 'output_fmt', 'NCHW'))
    fits = [
        layout
        for layout, axis in (('NCHW', 1), ('NHWC', 3))
        if channels in (None, tensor.shape[axis])
    ]
    return declared if declared in fits else next(iter(fits), None)


def _prefix_tokens(model: nn.Module, tokens: int, image_size: tuple[int, int], reduction: int) -> int:
    candidates = [getattr(model, 'num_prefix_tokens', 0), 0, 1, 2]
    for prefix in candidates:
        if token_grid(tokens - prefix, image_size, reduction) is not None:
            return prefix
    return candidates[0]


def token_grid(tokens: int, image_size: tuple[int, int], reduction: int) -> tuple[int, int] | None:
    """Return the grid `(H, W)` in which `tokens` image tokens stand, or `None` when they form none.

    Args:
        tokens: Number of tokens without class and register tokens.
        image_size: Height and width of the input in pixels.
        reduction: Input pixels per token along a side.
    """
    height, width = (-(-side // reduction) for side in image_size)
    if height * width == tokens:
        return height, width
    side = math.isqrt(max(tokens, 0))
    return (side, side) if side and side * side == tokens else None
