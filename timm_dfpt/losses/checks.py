"""What every loss shares: argument checks, precision, and the tempered KL divergence."""

from __future__ import annotations

import contextlib
import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor


def check_logits(reference: Tensor, **others: Tensor) -> None:
    """Refuse logits that are not floating-point tensors of one shape `[B, K]` on one device.

    Reads metadata only, so that no check waits for the device.

    Args:
        reference: Student logits `[B, K]`, which the others are held against.
        **others: Further logits by argument name.

    Raises:
        TypeError: If something is not a floating-point tensor.
        ValueError: If a shape or a device does not fit.
    """
    for name, logits in {'student_logits': reference, **others}.items():
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f'{name} must be a floating-point tensor of raw logits [B, K], got {got}.')
        if logits.ndim != 2 or 0 in logits.shape:
            raise ValueError(
                f'{name} must have the shape [B, K] with at least one sample and one class, got {list(logits.shape)}; '
                f'pass the output of the classification head for a non-empty batch.'
            )
        if logits.shape != reference.shape:
            raise ValueError(
                f'{name} has the shape {list(logits.shape)} but student_logits has {list(reference.shape)}; '
                f'teacher and student must see the same batch and have the same number of classes (num_classes).'
            )
        if logits.device != reference.device:
            raise ValueError(
                f'{name} is on {logits.device} but student_logits is on {reference.device}; move both to one device.'
            )


def check_target(target: Tensor, logits: Tensor, hard_only: str | None = None) -> None:
    """Refuse labels that are neither class indices nor class probabilities of the batch.

    The range of the labels is not checked: that would wait for the device at every step.

    Args:
        target: Class indices `[B]` (int64) or class probabilities `[B, K]` (floating point).
        logits: Logits `[B, K]` the labels belong to.
        hard_only: Name of the loss that needs class indices; None accepts class probabilities too.

    Raises:
        TypeError: If `target` is not a tensor, or its dtype does not fit.
        ValueError: If shape or device do not fit, or the labels are soft where `hard_only` is set.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f'target must be a tensor of class indices [B] or probabilities [B, K], got {type(target)}.')
    if target.device != logits.device:
        raise ValueError(f'target is on {target.device} but the logits are on {logits.device}; move it there.')
    if hard_only is not None and (target.ndim == 2 or target.is_floating_point()):
        raise ValueError(
            f'{hard_only} needs class indices [B], got soft labels {list(target.shape)} ({target.dtype}); '
            f'switch mixup, cutmix and soft label smoothing off, or take a loss without labels such as kd.'
        )
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(
                f'soft target must have the shape of the logits {list(logits.shape)}, got {list(target.shape)}; '
                f'set the number of classes of mixup (or of the one-hot encoding) to {logits.shape[1]}.'
            )
    elif target.dtype != torch.int64:
        raise TypeError(f'target with class indices must be int64, got {target.dtype}; convert it with target.long().')
    elif target.shape != logits.shape[:1]:
        raise ValueError(
            f'target with class indices must have the shape [{logits.shape[0]}] of the batch, '
            f'got {list(target.shape)}; give one class index per sample.'
        )


def check_temperature(temperature: float | Tensor) -> None:
    """Refuse a temperature that is not a positive finite number.

    The value of a tensor (a learned temperature) is not checked: that would wait for the device.

    Args:
        temperature: Softmax temperature, a number or a tensor without dimensions.

    Raises:
        TypeError: If `temperature` is neither a number nor a tensor.
        ValueError: If it is not positive and finite, or a tensor with dimensions.
    """
    if isinstance(temperature, Tensor):
        if temperature.ndim != 0:
            raise ValueError(
                f'a temperature tensor must have no dimension, got the shape {list(temperature.shape)}; '
                f'take the one value with temperature.squeeze().'
            )
        return
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f'temperature must be a number, got {temperature!r}; set it to e.g. 4.0.')
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f'temperature must be positive and finite, got {temperature!r}; set it to e.g. 4.0.')


def full_precision(logits: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context in which autocast leaves the loss on the device of `logits` alone."""
    # The meta device has no autocast; torch.amp.is_autocast_available would say so, but torch 2.9 cannot compile it.
    return contextlib.nullcontext() if logits.is_meta else torch.autocast(logits.device.type, enabled=False)


def upcast(logits: Tensor) -> Tensor:
    """Return half-precision logits in float32, and float32 or float64 ones as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def kl_from_log_probs(learner: Tensor, source: Tensor) -> Tensor:
    """Kullback-Leibler divergence `KL(source || learner)`, averaged over the batch.

    Args:
        learner: Log-probabilities `[B, K]` of the network that learns.
        source: Log-probabilities `[B, K]` of the network it learns from.

    Returns:
        Scalar, in nats.
    """
    return F.kl_div(learner, source, reduction='batchmean', log_target=True)
