"""A distillation temperature that is learned against the student (CTKD)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ['GlobalTemperature']


class _ReverseGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by `-strength` (Ganin and Lempitsky, arXiv 1409.7495)."""

    @staticmethod
    def forward(value: Tensor, strength: float) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.strength = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grad_outputs[0], None


class GlobalTemperature(nn.Module):
    """One learned temperature for all samples, trained to make distillation harder: `T = low + span sigmoid(raw)`.

    The same optimizer that lowers the distillation loss through the student raises it through the temperature, because
    the gradient of `raw` is reversed. A curriculum lets the reversed gradient grow from 0 to its full size along a half
    cosine. Source: Li et al., "Curriculum Temperature for Knowledge Distillation" (CTKD), AAAI 2023, arXiv 2211.16231;
    the defaults are those of the authors' CIFAR-100 script (5 curriculum epochs on ImageNet).

    Pass the temperature on to any of the logit losses, `kd_loss(student_logits, teacher_logits, temperature(epoch))`,
    and give `raw` to the optimizer without weight decay.

    Args:
        low: Lower bound of the temperature, above 0.
        span: Distance from the lower to the upper bound, above 0.
        curriculum_epochs: Epochs until the reversed gradient has its full size, at least 1.

    Raises:
        ValueError: A bound is not positive and finite, or there is no curriculum epoch.
    """

    def __init__(self, low: float = 1.0, span: float = 20.0, curriculum_epochs: int = 10) -> None:
        super().__init__()
        for name, value in (('low', low), ('span', span)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f'{name} must be positive and finite, got {value!r}; set it to e.g. 1.0.')
        if curriculum_epochs < 1:
            raise ValueError(f'curriculum_epochs must be at least 1, got {curriculum_epochs!r}; 1 means no curriculum.')
        self.low = low
        self.span = span
        self.curriculum_epochs = curriculum_epochs
        # One element and not a scalar, which FSDP2 cannot shard.
        self.raw = nn.Parameter(torch.ones(1))

    def strength(self, epoch: int) -> float:
        """Return the factor of the reversed gradient in `[0, 1]`.

        Args:
            epoch: Epochs completed, from 0 in the first one.
        """
        # The authors count epochs from 1, so that the temperature learns from the first epoch on.
        progress = min(epoch + 1, self.curriculum_epochs) / self.curriculum_epochs
        return (1 - math.cos(math.pi * progress)) / 2

    def forward(self, epoch: int) -> Tensor:
        """Return the temperature as a scalar tensor whose gradient is reversed.

        Args:
            epoch: Epochs completed, from 0 in the first one.
        """
        raw = _ReverseGradient.apply(self.raw, self.strength(epoch))
        return (self.low + self.span * torch.sigmoid(raw)).squeeze(0)
