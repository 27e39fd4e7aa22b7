"""The calibration pass: what a backbone really returns at its stages, found by running it."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .layouts import compare_layouts, find_layout, find_prefix_tokens, guess_layout, is_doubtful
from .modes import evaluating
from .types import Feature, Layout, Stage, Tap, name_of

__all__ = ['Calibration', 'calibrate', 'calibration_input']

# Small enough that wrapping costs little, large enough that a reduction of 32 leaves a map, not a point.
_SIDE = 64
_DEFAULT_SIDE = 224
_BATCH, _OTHER_BATCH = 2, 3

_Layouts = dict[tuple[str, int], Layout | None]
"""For the module of a tap and the number of a tensor in its output: how that tensor lies, where that is not plain."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What the calibration pass found.

    Args:
        stages: The stages, without features that do not reach the output.
        bypassed: Modules of stages around which the model passes features on to later layers, so that the blocks
            behind them do not see everything.
        unused: Modules of stages whose output does not reach the model's output at all; not among `stages`.
    """

    stages: tuple[Stage, ...]
    bypassed: tuple[str, ...]
    unused: tuple[str, ...]


class _Probe:
    """Hook on a tap: finds the features in the output and adds to each a zero that requires a gradient.

    The zero's gradient shows what the feature reaches. With `cut`, what comes from before the tap ends there, so that
    only what goes around it is reached.
    """

    def __init__(
        self,
        model: nn.Module,
        tap: Tap,
        image_size: tuple[int, int],
        order: list[str],
        layouts: _Layouts,
        cut: bool,
    ) -> None:
        self.model, self.tap, self.image_size, self.order, self.cut = model, tap, image_size, order, cut
        self.layouts = layouts
        self.reduction = 1
        self.features: tuple[Feature, ...] = ()
        self.doubtful: dict[int, torch.Size] = {}
        self.zeros: list[torch.Tensor] = []
        self.inputs: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.order.append(self.tap.module)
        if self.features:
            return output
        leaves, spec = pytree.tree_flatten(output)
        self.reduction, self.features = _find_features(self.model, self.tap, leaves, self.image_size, self.layouts)
        for feature in self.features:
            h = leaves[feature.index]
            if is_doubtful(h.shape, self.tap.channels):
                self.doubtful[feature.index] = h.shape
            zero = torch.zeros((), device=h.device, dtype=h.dtype, requires_grad=True)
            self.zeros.append(zero)
            self.inputs.append(h)
            leaves[feature.index] = (h.detach() if self.cut else h) + zero
        return pytree.tree_unflatten(leaves, spec)


def calibrate(model: nn.Module, taps: Sequence[Tap], x: torch.Tensor) -> Calibration:
    """Run `model` on `x` `[B, C, H, W]` and find the features behind `taps`.

    Raises:
        ValueError: If a tap does not run exactly once and in order, or its output holds no features.
    """
    modules = dict(model.named_modules())
    missing = [tap.module for tap in taps if tap.module not in modules]
    if missing:
        raise ValueError(
            f'{name_of(model)} has no module {missing[0]!r}, after which a stage should end. '
            'Name the modules that end a stage: stages=[...].'
        )
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        model.requires_grad_(False)
        layouts: _Layouts = {}
        probes, _, outputs = _run(model, taps, x, layouts, cut=False)
        doubtful = {(probe.tap.module, index): shape for probe in probes for index, shape in probe.doubtful.items()}
        if doubtful:
            layouts = _compare_sizes(model, x, doubtful)
            probes, _, outputs = _run(model, taps, x, layouts, cut=False)
        zeros = [zero for probe in probes for zero in probe.zeros]
        reached = iter(_reached(outputs, zeros))
        around = _bypassed(*_run(model, taps, x, layouts, cut=True))
    stages, bypassed, unused = [], [], []
    for i, (tap, probe) in enumerate(zip(taps, probes, strict=True)):
        features = tuple(feature for feature in probe.features if next(reached))
        if not features:
            unused.append(tap.module)
            continue
        stages.append(Stage(tap.module, probe.reduction, features))
        if i in around:
            bypassed.append(tap.module)
    return Calibration(tuple(stages), tuple(bypassed), tuple(unused))


def _run(
    model: nn.Module, taps: Sequence[Tap], x: torch.Tensor, layouts: _Layouts, cut: bool
) -> tuple[list[_Probe], torch.Tensor, list[torch.Tensor]]:
    """Return the probes, the input and the tensors in the output."""
    order: list[str] = []
    probes = [_Probe(model, tap, (x.shape[-2], x.shape[-1]), order, layouts, cut) for tap in taps]
    handles = [model.get_submodule(probe.tap.module).register_forward_hook(probe) for probe in probes]
    leaf = x.detach().requires_grad_(True)
    try:
        # Not the leaf itself: a model may change its input in place.
        output = model(leaf.clone())
    except (AssertionError, IndexError, RuntimeError) as error:
        raise ValueError(
            f'{name_of(model)} does not run on a calibration input {tuple(x.shape)}: {error}. Give the size that it '
            'takes: input_size=(channels, height, width).'
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    names = [tap.module for tap in taps]
    if order != names:
        raise ValueError(
            f'The stages {names} of {name_of(model)} must each run once per forward and in this order, but '
            f'{order or "none of them"} ran. Name other modules, in the order in which they run: stages=[...].'
        )
    return probes, leaf, [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]


def _compare_sizes(model: nn.Module, x: torch.Tensor, doubtful: dict[tuple[str, int], torch.Size]) -> _Layouts:
    """Find out how features lie by a second input, of another size.

    Args:
        model: The model, in evaluation.
        x: The calibration input `[B, C, H, W]`.
        doubtful: For the module of a tap and the number of a tensor in its output: the shape for that input.
    """
    channels, height, width = x.shape[1:]
    for size in ((channels, height, 2 * width), (channels, 2 * height, 2 * width), (channels, height, width + 32)):
        shapes: dict[tuple[str, int], torch.Size] = {}
        handles = [
            model.get_submodule(name).register_forward_hook(_note_shapes(name, shapes)) for name, _ in doubtful
        ]
        try:
            with torch.no_grad():
                model(_random_input(model, size, _OTHER_BATCH))
        except (AssertionError, IndexError, RuntimeError, ValueError):
            continue
        finally:
            for handle in handles:
                handle.remove()
        batches = x.shape[0], _OTHER_BATCH
        return {
            key: compare_layouts(shape, shapes[key], batches)
            for key, shape in doubtful.items()
            if key in shapes and len(shapes[key]) == len(shape)
        }
    # A model of one size.
    guesses = {key: guess_layout(shape, (height, width)) for key, shape in doubtful.items()}
    unclear = [key for key, layout in guesses.items() if layout is None]
    # timm's models say how features lie, or it is NCHW.
    if unclear and not (hasattr(model, 'output_fmt') or hasattr(model, 'pretrained_cfg')):
        raise ValueError(
            f'The output of stage {unclear[0][0]!r} of {name_of(model)}, {tuple(doubtful[unclear[0]])}, does not show '
            'which axis holds the channels, and the model takes images of one size only. Set its layout: '
            "model.output_fmt = 'NCHW' or 'NHWC'."
        )
    return {key: layout for key, layout in guesses.items() if layout is not None}


def _note_shapes(name: str, shapes: dict[tuple[str, int], torch.Size]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        for index, leaf in enumerate(pytree.tree_leaves(output)):
            if isinstance(leaf, torch.Tensor):
                shapes.setdefault((name, index), leaf.shape)

    return hook


def _reached(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[bool]:
    """Return for each input whether one of the outputs depends on it."""
    sums = [t.float().sum() for t in outputs if t.requires_grad]
    if not sums or not inputs:
        return [False] * len(inputs)
    return [g is not None for g in torch.autograd.grad(sums, inputs, retain_graph=True, allow_unused=True)]


def _bypassed(probes: Sequence[_Probe], leaf: torch.Tensor, outputs: list[torch.Tensor]) -> set[int]:
    """Return around which taps something flows, from a run with `cut`.

    Each target, a tap or the output, may then depend on the tap just before it (the first one: on the input) and on
    nothing from before that.
    """
    sources = [[leaf], *(probe.zeros for probe in probes)]
    targets = [*(probe.inputs for probe in probes), outputs]
    around: set[int] = set()
    for j, target in enumerate(targets[1:], start=1):
        for i, source in enumerate(sources[:j]):
            if any(_reached(target, source)):
                around.update(range(i, j))
    return around


def _find_features(
    model: nn.Module, tap: Tap, leaves: list[Any], image_size: tuple[int, int], layouts: _Layouts
) -> tuple[int, tuple[Feature, ...]]:
    declared_layout = getattr(model, 'output_fmt', None)
    declared_prefix = int(getattr(model, 'num_prefix_tokens', 0) or 0)
    features, reductions = [], []
    for index, tensor in enumerate(leaves):
        if not isinstance(tensor, torch.Tensor) or (tap.leaves is not None and index not in tap.leaves):
            continue
        known = (tap.module, index)
        layout = layouts[known] if known in layouts else find_layout(tensor.shape, tap.channels, declared_layout)
        if layout is None:
            continue
        prefix = 0
        if layout == 'NLC':
            prefix = find_prefix_tokens(tensor.shape[1], declared_prefix, image_size, tap.reduction)
            places = tensor.shape[1] - prefix
        else:
            places = tensor[0].numel() // tensor.shape[1 if layout == 'NCHW' else 3]
        features.append(Feature(index, tensor.shape[1 if layout == 'NCHW' else -1], layout, prefix))
        reductions.append(max(1, round(math.sqrt(math.prod(image_size) / max(1, places)))))
    if not features:
        shapes = [tuple(t.shape) for t in leaves if isinstance(t, torch.Tensor)]
        raise ValueError(
            f'The output of stage {tap.module!r} of {name_of(model)} does not hold features [B, C, H, W], [B, H, W, '
            f'C] or [B, L, C] of {tap.channels or "any number of"} channels, but tensors of shape {shapes}. Name '
            'another module: stages=[...].'
        )
    return tap.reduction or min(reductions), tuple(features)


def calibration_input(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> torch.Tensor:
    """Return a small input `[2, C, H, W]` that the model takes, with fixed pseudo-random values.

    Args:
        model: The model; its dtype and device are used.
        input_size: `(C, H, W)`; by default the first of a few small sizes that the model takes.

    Raises:
        ValueError: If the model takes none of them.
    """
    if input_size is not None and not (
        isinstance(input_size, Sequence)
        and len(input_size) == 3
        and all(isinstance(side, int) and side > 0 for side in input_size)
    ):
        raise ValueError(f'input_size must be (channels, height, width), got {input_size!r}.')
    if input_size is not None:
        return _random_input(model, tuple(input_size))
    sizes = _sizes_to_try(model)
    error: Exception | None = None
    for size in sizes:
        x = _random_input(model, size)
        try:
            with evaluating(model), torch.no_grad():
                model(x)
        except (AssertionError, IndexError, RuntimeError, ValueError) as e:
            error = e
            continue
        return x
    raise ValueError(
        f'{name_of(model)} does not take a calibration input of {" or ".join(str(size) for size in sizes)}: {error}. '
        'Give the one that it takes: input_size=(channels, height, width).'
    ) from error


def _sizes_to_try(model: nn.Module) -> list[tuple[int, ...]]:
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    configured = cfg.get('input_size') or (3, _DEFAULT_SIDE, _DEFAULT_SIDE)
    channels = getattr(model, 'in_chans', None) or configured[0]
    largest = configured[1:]
    img_size = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    if img_size is not None:
        largest = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    sides = [tuple(min(side, limit) for limit in largest) for side in (_SIDE, 2 * _SIDE)]
    sides = [largest] if cfg.get('fixed_input_size') else [*sides, (cfg.get('min_input_size') or largest)[-2:], largest]
    return [(channels, *side) for side in dict.fromkeys(sides)]


def _random_input(model: nn.Module, size: tuple[int, ...], batch: int = _BATCH) -> torch.Tensor:
    param = next(model.parameters(), None)
    device = param.device if param is not None else torch.device('cpu')
    dtype = param.dtype if param is not None else torch.float32
    if device.type == 'meta':
        return torch.empty(batch, *size, device=device, dtype=dtype)
    # A generator of its own: wrapping a model must not move the user's random state.
    with torch.inference_mode(False):
        x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
        return x.to(device=device, dtype=dtype)
