"""Losses of DFPT-KD: student and prompt path teach each other, and both hear the frozen teacher."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    check_logits,
    check_target,
    check_temperature,
    full_precision,
    kl_from_log_probs,
    upcast,
)
from .registry import KDLoss

__all__ = ['DFPTWeights', 'dfpt_losses']


@dataclasses.dataclass(frozen=True)
class DFPTWeights:
    """Weights of the six terms of DFPT-KD (arXiv 2506.18244). The values are ours, the paper's are not at hand.

    A name says who learns from whom: `prompt_teacher` is what the prompt path learns from the teacher.

    Attributes:
        prompt_teacher: Weight a: the prompt path stays as accurate as the teacher.
        prompt_student: Weight b: the prompt path stays within the student's reach.
        student_teacher: Weight c: the student follows the original path.
        student_prompt: Weight d: the student follows the prompt path.
        prompt_task: Weight of the prompt path's loss on the labels.
        student_task: Weight of the student's loss on the labels.

    Raises:
        TypeError: A weight is not a number.
        ValueError: A weight is negative or not finite, or all of them are zero.
    """

    prompt_teacher: float = 1.0
    prompt_student: float = 0.25
    student_teacher: float = 1.0
    student_prompt: float = 1.0
    prompt_task: float = 1.0
    student_task: float = 1.0

    def __post_init__(self) -> None:
        weights = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, Real):
                raise TypeError(f'DFPTWeights.{name} must be a number, got {weight!r}; set it to e.g. 1.0.')
            if not (math.isfinite(weight) and float(weight) >= 0):
                raise ValueError(f'DFPTWeights.{name} must be finite and at least 0, got {weight!r}; 0 drops the term.')
        if not any(weights.values()):
            raise ValueError('DFPTWeights are all 0, nothing would be trained; set at least one above 0.')


def dfpt_losses(
    student_logits: Tensor,
    prompt_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    prompt_temperature: float | None = None,
    weights: DFPTWeights = DFPTWeights(),  # noqa: B008 - frozen, so one instance can serve every call
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    kd_fn: KDLoss | None = None,
) -> dict[str, Tensor]:
    """Both directions of DFPT-KD, ready for one backward.

        L_prompt  = CE(z_p, y) + a T^2 KL(softmax(z_t/T) || softmax(z_p/T)) + b T^2 KL(softmax(z_s/T) || softmax(z_p/T))
        L_student = CE(z_s, y) + c T^2 KL(softmax(z_t/T) || softmax(z_s/T)) + d T^2 KL(softmax(z_p/T) || softmax(z_s/T))

    Source: DFPT-KD, arXiv 2506.18244. Whoever is learned from is detached, so that the terms of the student give the
    prompt path no gradient and the other way round: one backward of the sum trains both as two separate ones would.
    Half-precision logits are computed in float32 whatever the autocast, the loss on the labels included.

    If the prompt path equals the teacher and c = d, the student's loss and gradient are those of plain distillation
    with the weight c + d (`timm.task.LogitDistillationTask`), bit for bit in full precision.

    Args:
        student_logits: Logits of the student z_s `[B, K]`.
        prompt_logits: Logits of the prompt path z_p `[B, K]`.
        teacher_logits: Logits of the original path z_t `[B, K]`; no gradient flows into them.
        target: Class indices `[B]` (int64) or class probabilities `[B, K]`, whatever `criterion` understands.
        temperature: Softmax temperature T > 0.
        prompt_temperature: Another one (ours) for the two terms between student and prompt path, which is softer than
            the teacher already; `None` for the same.
        weights: Weights of the six terms. A term with weight 0 is left out of the graph and reported detached.
        criterion: Loss on the labels, `(logits [B, K], target) -> scalar`.
        kd_fn: Loss of the four distillation terms in place of `T^2 KL`, called as
            `kd_fn(learner_logits, source_logits, target, temperature)` (see `KD_LOSSES`).

    Returns:
        `loss`, the weighted sum, and the six unweighted terms `student_task_loss`, `student_teacher_loss`,
        `student_prompt_loss`, `prompt_task_loss`, `prompt_teacher_loss` and `prompt_student_loss`, all scalars.

    Raises:
        TypeError: Logits, target, or temperature have the wrong type.
        ValueError: Shapes or devices differ, a temperature is not positive and finite, or `kd_fn` needs class
            indices and the target is soft.
    """
    check_logits(student_logits, prompt_logits=prompt_logits, teacher_logits=teacher_logits)
    check_target(target, student_logits)
    between = temperature if prompt_temperature is None else prompt_temperature
    for value in (temperature, between):
        if isinstance(value, Tensor):
            raise TypeError('temperature must be a number: a learned one would get the gradient of both directions.')
        check_temperature(value)

    with full_precision(student_logits):
        logits = {
            'student': upcast(student_logits),
            'prompt': upcast(prompt_logits),
            'teacher': upcast(teacher_logits).detach(),
        }
        log_probs: dict[tuple[str, float], Tensor] = {}
        if kd_fn is None:
            # Each network takes part in several terms, so its log-softmax is computed once for all of them.
            log_probs = {(k, temperature): F.log_softmax(v / temperature, dim=1) for k, v in logits.items()}
            if between != temperature:
                log_probs |= {(k, between): F.log_softmax(logits[k] / between, dim=1) for k in ('student', 'prompt')}
        terms: dict[str, Tensor] = {}
        parts: dict[str, Tensor] = {}
        for name in (field.name for field in dataclasses.fields(weights)):
            learner, source = name.split('_')
            weight = getattr(weights, name)
            t = temperature if 'teacher' in name else between
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
                if source == 'task':
                    terms[name] = criterion(logits[learner], target)
                elif kd_fn is not None:
                    terms[name] = kd_fn(logits[learner], logits[source].detach(), target, t)
                else:
                    terms[name] = kl_from_log_probs(log_probs[learner, t], log_probs[source, t].detach()) * t**2
            if terms[name].ndim != 0:
                raise ValueError(
                    f"{'criterion' if source == 'task' else 'kd_fn'} must return a scalar, got the shape "
                    f"{list(terms[name].shape)}; average over the batch (reduction='mean')."
                )
            # A constant instead of 0 * term, which a term that is not finite would turn into NaN.
            parts[name] = weight * terms[name] if weight > 0 else terms[name].new_zeros(())
        # The two distillation terms are added first: equal ones then sum up without rounding, as 2 * kd would.
        student = parts['student_task'] + (parts['student_teacher'] + parts['student_prompt'])
        prompt = parts['prompt_task'] + (parts['prompt_teacher'] + parts['prompt_student'])
    return {'loss': student + prompt, **{f'{name}_loss': value for name, value in terms.items()}}
