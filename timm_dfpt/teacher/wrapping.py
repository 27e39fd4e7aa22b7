"""`wrap`: from a model to a teacher with two forward paths, proven on this very model."""
from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..backbone.calibration import Calibration, calibrate, calibration_input
from ..backbone.heads import pool_features, watch_inputs
from ..backbone.modes import evaluating, look_through
from ..backbone.stages import find_taps
from ..backbone.types import Stage, name_of
from .blocks import PromptConfig
from .checks import check_finite, check_model, find_classifier
from .prefix import plan_prefix
from .prompt_path import VARIANTS, PromptPath, Variant
from .teacher import DualForwardPathTeacher

__all__ = ['open_stages', 'wrap']

_logger = logging.getLogger(__name__)

# Relative difference of the logits that another kernel for another memory layout may cause.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
# What is trained is kept in float32, so the paths of a teacher in bfloat16 or float16 round differently.
_LOW_PRECISION_TOLERANCE = 0.1


def wrap(
    model: nn.Module,
    *,
    stages: int | Sequence[str] | None = None,
    num_classes: int | None = None,
    prompt: PromptConfig | None = None,
    variant: Variant = 'dfpt',
    classifier: str | Sequence[str] | None = None,
    save_memory: bool = True,
    input_size: tuple[int, int, int] | None = None,
) -> DualForwardPathTeacher:
    """Freeze a pre-trained model in place, run it a few times, and give it a second, prompt-based forward path.

    Source: DFPT-KD, arXiv 2506.18244. Before any training the prompt path returns what the model returns. The few runs
    on a small input prove on this very model that every block runs once, that the paths agree and that every new
    parameter is reached by the gradient. `teacher.unwrap()` gives the model back as it was.

    Args:
        model: Any timm model; with `stages=[...]` (and `classifier=`) any model.
        stages: `None` for the model's own stages, a number, or the names of the modules that end a stage.
        num_classes: Give the prompt path a new head for this number of classes; `None` copies the model's head. An
            encoder (timm's models of `num_classes=0`, and any that returns features) needs it: its head is where timm's
            `reset_classifier` would put it, else behind the mean of its tokens or its map, and starts with logits of
            zero.
        prompt: Shape of prompt blocks, fusion and head; `None` for the defaults.
        variant: `'dfpt'` tunes blocks and head only; `'dfpt+'` also a trainable copy of the backbone.
        classifier: Name (or names) of the classifier module; by default what timm or `get_classifier()` says; `()`
            where there is none.
        save_memory: With `'dfpt'`, do not save inputs of frozen convolution and BatchNorm layers for the backward pass.
            Logits and gradients are the same to the last bit.
        input_size: `(C, H, W)` of the calibration input; by default the smallest size that the model takes.

    Returns:
        The teacher: `teacher(x)` returns the logits of both paths.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the model cannot be opened as asked; the message names model, reason and remedy.

    Example:
        >>> teacher = timm_dfpt.wrap(timm.create_model('resnet50', pretrained=True))
        >>> out = teacher(images)
        >>> out.original, out.prompt
    """
    return open_stages(
        model,
        stages,
        close_last=True,
        num_classes=num_classes,
        prompt=PromptConfig() if prompt is None else prompt,
        variant=variant,
        classifier=classifier,
        save_memory=save_memory,
        input_size=input_size,
    )


def open_stages(
    model: nn.Module,
    stages: int | Sequence[str] | None,
    *,
    close_last: bool,
    prompt: PromptConfig,
    variant: Variant,
    classifier: str | Sequence[str] | None,
    num_classes: int | None,
    save_memory: bool = True,
    input_size: tuple[int, int, int] | None = None,
) -> DualForwardPathTeacher:
    """Do what `wrap` does, with the last stage open or closed; the other arguments are those of `wrap`.

    Blocks go between stages, so that `wrap` leaves the last one closed. A saved prompt path names those that are open.
    """
    model = look_through(model)
    check_model(model)
    if variant not in VARIANTS:
        raise ValueError(f'variant must be one of {VARIANTS}, got {variant!r}.')
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise ValueError(f'num_classes must be None or a positive integer, got {num_classes!r}.')
    if not isinstance(prompt, PromptConfig):
        raise TypeError(f'prompt must be a PromptConfig, got {type(prompt).__name__}.')
    names = find_classifier(model, classifier, num_classes, input_size)
    taps = find_taps(model, stages)
    x = calibration_input(model, input_size)
    found = calibrate(model, taps, x)
    closed = {taps[-1].module} if close_last else set()
    opened = _stages_to_open(model, found, closed, named=isinstance(stages, Sequence))
    prefix = []
    # Norms of its own make the prompt path another one from the first of them on.
    if variant == 'dfpt' and prompt.norms == 'teacher':
        with evaluating(model):
            prefix = plan_prefix(model, opened[0].module, x)
    # Weights made under inference_mode could never be trained.
    with torch.inference_mode(False):
        path = PromptPath(
            model,
            opened,
            prompt,
            variant=variant,
            classifier=names,
            num_classes=num_classes,
            save_memory=save_memory,
            x=x,
        )
    modules = {stage.module for stage in opened}
    teacher = DualForwardPathTeacher(model, path, prefix, [name for name in found.bypassed if name in modules])
    try:
        _verify(teacher, x, num_classes, encoder=not names)
    except Exception:
        teacher.unwrap()
        raise
    return teacher


def _stages_to_open(model: nn.Module, found: Calibration, closed: set[str], named: bool) -> list[Stage]:
    kind = name_of(model)
    unused = [name for name in found.unused if name not in closed]
    if unused and named:
        raise ValueError(
            f'The output of {kind} does not depend on the features after {unused[0]!r}, so that a block there would '
            'not be trained; name other modules in stages=[...].'
        )
    for name in unused:
        _logger.info(f'{kind}: no block after {name}, since the output does not depend on its features.')
    stages = [stage for stage in found.stages if stage.module not in closed]
    if not stages:
        raise ValueError(
            f'{kind} has a single stage, and blocks go between stages. Name more stages in stages=[...].'
        )
    return stages


def _verify(teacher: DualForwardPathTeacher, x: torch.Tensor, num_classes: int | None, encoder: bool) -> None:
    """Prove the teacher on one batch, with the blocks in evaluation so that no statistic moves."""
    kind = name_of(teacher.model)
    speaking = contextlib.nullcontext() if num_classes is None else _speaking(teacher.prompt_path)
    with evaluating(teacher.prompt_path), torch.inference_mode(False), torch.enable_grad(), speaking:
        with watch_inputs(teacher.prompt_path.model.get_submodule(teacher.prompt_path.heads[0])) as seen:
            (original, shared), prompt = teacher(x), teacher.prompt(x)
        if not isinstance(prompt, torch.Tensor) or prompt.ndim != 2:
            raise ValueError(f'{kind} must return logits [B, K], got {_describe(prompt)}.')
        check_finite(teacher.model, original)
        teacher.num_classes, teacher.prompt_path.num_classes = 0 if encoder else original.shape[1], prompt.shape[1]
        # The logits of a new head are others, but what enters it is what an encoder returns.
        ends = (pool_features(teacher.model, original), seen[-1].flatten(1)) if encoder else (original, prompt)
        comparable = ends[0].shape == ends[1].shape if encoder else num_classes is None
        # Logits in float32 may be of weights in half precision, which a copy of the backbone has in float32.
        weights = next((p.dtype for p in teacher.model.parameters()), original.dtype)
        if comparable and not _close(ends[0], ends[1], weights):
            difference = (ends[0] - ends[1]).abs().max().item()
            raise ValueError(
                f'{kind}: prompt {"features" if encoder else "logits"} differ from the original by {difference:.2e} '
                'before training: the forward is not deterministic in eval mode. Name other modules in stages=[...].'
            )
        named = [(name, p) for name, p in teacher.prompt_path.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(
                f'The prompt path of {kind} has nothing to train: without blocks and fusion, with the head'
                + (' and the norms of the teacher' if teacher.config.norms == 'teacher' else '')
                + (' of the teacher' if teacher.config.norms == 'own' else '')
                + ". Give it one of them: block=True, fusion='conv', norms='own' where there are norm layers, "
                "new_head=True, or variant='dfpt+'."
            )
        grads = torch.autograd.grad(prompt.float().square().sum(), [p for _, p in named], allow_unused=True)
        idle = {name: param for (name, param), grad in zip(named, grads, strict=True) if grad is None}
        # Some models have norm layers that they do not use.
        teacher.prompt_path.leave_unused(param for name, param in idle.items() if name.startswith('norms.'))
        unused = [name for name in idle if not name.startswith('norms.')]
        if unused and teacher.variant == 'dfpt':
            raise ValueError(
                f'{kind}: the logits do not depend on {len(unused)} of {len(named)} new parameters, such as '
                f'{unused[0]}. The output of one of the stages {[s.module for s in teacher.stages]} is not used; '
                'name other modules in stages=[...].'
            )
        if teacher.prefix and not (shared.device.type == 'meta' or torch.equal(shared, prompt)):
            _logger.info(f'{kind}: the computation before {teacher.stages[0].module} is not shared between the paths.')
            teacher.stop_sharing_prefix()


@contextlib.contextmanager
def _speaking(path: PromptPath) -> Iterator[None]:
    """Give a new head of zeros other weights for the time of the proof: what it returns would prove nothing."""
    weights = [next(path.model.get_submodule(name).parameters()) for name in path.classifier]
    silent = [weight for weight in weights if not (weight.is_meta or weight.any())]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for weight in silent:
                weight.copy_(torch.randn(weight.shape, generator=generator).mul_(weight[0].numel() ** -0.5))
        yield
    finally:
        with torch.no_grad():
            for weight in silent:
                weight.zero_()


def _close(a: torch.Tensor, b: torch.Tensor, weights: torch.dtype) -> bool:
    if a.device.type == 'meta':
        return a.shape == b.shape
    tolerance = _TOLERANCE.get(weights, _LOW_PRECISION_TOLERANCE)
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * a.abs().max())


def _describe(value: object) -> str:
    return f'a tensor {tuple(value.shape)}' if isinstance(value, torch.Tensor) else type(value).__name__

