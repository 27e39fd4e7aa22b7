"""The logit losses by name, all called in one way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from .logit import dist_loss, dkd_loss, kd_loss, logit_std_loss, ttm_loss

__all__ = ['KD_LOSSES', 'KDLoss']

KDLoss = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""A loss `(student_logits [B, K], teacher_logits [B, K], target, temperature) -> scalar`."""


def _without_target(
    loss: Callable[..., Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float,
    **kwargs: Any,
) -> Tensor:
    return loss(student_logits, teacher_logits, temperature=temperature, **kwargs)


KD_LOSSES: dict[str, KDLoss] = {
    'kd': partial(_without_target, kd_loss),
    'dkd': dkd_loss,
    'dist': partial(_without_target, dist_loss),
    'logit-std': partial(_without_target, logit_std_loss),
    'ttm': partial(_without_target, ttm_loss),
    'wttm': partial(_without_target, ttm_loss, weighted=True),
}
"""The losses by the names the command line gives them."""
