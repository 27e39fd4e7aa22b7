"""Losses of DFPT-KD: student and prompt path teach each other, and both are supervised by the frozen teacher."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from numbers import Real

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
from .logit import KDLoss

__all__ = ['DFPTWeights', 'dfpt_losses']


@dataclasses.dataclass(frozen=True)
class DFPTWeights:
    """Weights of the six terms of DFPT-KD (arXiv 2506.18244). The values are ours: the paper's are not public.

    A name says who learns from whom: `prompt_teacher` is what the prompt path learns from the teacher.

    Attributes:
        prompt_teacher: Weight a: the prompt path stays as accurate as the teacher.
        prompt_student: Weight b: the prompt path stays within the student's reach.
        student_teacher: Weight c: the student follows the original path.
        student_prompt: Weight d: the student follows the prompt path.
        prompt_task: Weight of the prompt path's loss on the labels.
        student_task: Weight of the student's loss on the labels.

    Raises:
        TypeError: If a weight is not a number.
        ValueError: If a weight is negative or not finite, or if all of them are zero.
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
            raise ValueError('DFPTWeights are all 0, so that nothing would be trained; set at least one above 0.')


def dfpt_losses(
    student_logits: Tensor,
    prompt_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    *,
    temperature: float = 4.0,
    weights: DFPTWeights = DFPTWeights(),  # noqa: B008 - frozen, so one instance can serve every call
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    kd_fn: KDLoss | None = None,
    prompt_learns: bool = True,
) -> dict[str, Tensor]:
    """Both directions of DFPT-KD, ready for one backward.

        L_prompt  = CE(z_p, y) + a T^2 KL(softmax(z_t/T) || softmax(z_p/T)) + b T^2 KL(softmax(z_s/T) || softmax(z_p/T))
        L_student = CE(z_s, y) + c T^2 KL(softmax(z_t/T) || softmax(z_s/T)) + d T^2 KL(softmax(z_p/T) || softmax(z_s/T))

    Source: DFPT-KD, arXiv 2506.18244. Targets are detached (stop-gradient), so that the terms of the student give the
    prompt path no gradient and the other way round: one backward of the sum trains both as two separate ones would.
    Half-precision logits are computed in float32 whatever the autocast, the loss on the labels included.

    If the prompt path equals the teacher and c = d, the student's loss and gradient are those of plain distillation
    with the weight c + d (`timm.task.LogitDistillationTask`), bit for bit in full precision.

    Args:
        student_logits: Logits of the student z_s `[B, K]`.
        prompt_logits: Logits of the prompt path z_p `[B, K]`.
        teacher_logits: Logits of the original path z_t `[B, K]`; no gradient flows into them. `None` where nothing
            learns from it (a = c = 0): its terms are then not computed.
        target: Class indices `[B]` (int64) or class probabilities `[B, K]`, whatever `criterion` understands.
        temperature: Softmax temperature T > 0.
        weights: Weights of the six terms. A term with weight 0 is not part of the loss and is reported detached.
        criterion: Loss on the labels, `(logits [B, K], target) -> scalar`.
        kd_fn: Loss of the four distillation terms in place of `T^2 KL`, called as
            `kd_fn(learner_logits, source_logits, target, temperature)`.
        prompt_learns: Whether the prompt path is trained. Where it is frozen, `loss` is `L_student` alone, and the
            prompt path's three terms are not computed.

    Returns:
        `loss`, the weighted sum, and the unweighted terms `student_task_loss`, `student_teacher_loss`,
        `student_prompt_loss`, `prompt_task_loss`, `prompt_teacher_loss` and `prompt_student_loss`, all scalars.

    Raises:
        TypeError: If logits, target, or temperature have the wrong type.
        ValueError: If the teacher's logits are missing and a or c is not 0, if shapes or devices differ, if the
            temperature is not positive and finite, if `criterion` or `kd_fn` do not return a scalar, or if `kd_fn`
            needs class indices and the target is soft.
    """
    known = {'prompt_logits': prompt_logits}
    if teacher_logits is not None:
        known['teacher_logits'] = teacher_logits
    elif weights.student_teacher or (prompt_learns and weights.prompt_teacher):
        raise ValueError('teacher_logits=None needs DFPTWeights with prompt_teacher=0 and student_teacher=0.')
    check_logits(student_logits, **known)
    check_target(target, student_logits)
    if isinstance(temperature, Tensor):
        raise TypeError(
            'temperature must be a number, not a tensor: a learned temperature would get the gradients of both '
            'directions.'
        )
    check_temperature(temperature)

    with full_precision(student_logits):
        z_s, z_p = upcast(student_logits), upcast(prompt_logits)
        networks = {'student': z_s, 'prompt': z_p}
        if teacher_logits is not None:
            networks['teacher'] = upcast(teacher_logits).detach()
        if kd_fn is None:
            # Each network takes part in several terms, so its log-softmax is computed once for all of them.
            networks = {name: F.log_softmax(z / temperature, dim=1) for name, z in networks.items()}

        def distill(learner: str, source: str) -> Tensor:
            mine, theirs = networks[learner], networks[source].detach()
            if kd_fn is None:
                return kl_from_log_probs(mine, theirs) * temperature**2
            return _scalar('kd_fn', kd_fn(mine, theirs, target, temperature))

        learners = {'prompt': z_p, 'student': z_s} if prompt_learns else {'student': z_s}
        sources = [name for name in ('teacher', 'student', 'prompt') if name in networks]
        # Their order is that in which gradients are added up, and decides the last bits.
        terms = {f'{a}_{b}': distill(a, b) for a in learners for b in sources if a != b}
        terms |= {f'{name}_task': _scalar('criterion', criterion(z, target)) for name, z in learners.items()}

        def weighted(name: str) -> Tensor:
            # A constant instead of 0 * term, which a term that is not finite would turn into NaN.
            weight = getattr(weights, name)
            return weight * terms[name] if weight else z_s.new_zeros(())

        # The two distillation terms are added first: equal ones then sum up without rounding, as 2 * kd would.
        loss = weighted('student_task') + (weighted('student_teacher') + weighted('student_prompt'))
        if prompt_learns:
            loss = loss + (weighted('prompt_task') + (weighted('prompt_teacher') + weighted('prompt_student')))

    losses = {f'{name}_loss': term if getattr(weights, name) else term.detach() for name, term in terms.items()}
    return {'loss': loss, **losses}


def _scalar(function: str, value: Tensor) -> Tensor:
    if value.ndim != 0:
        raise ValueError(
            f'{function} must return a scalar, got the shape {list(value.shape)}; '
            "average over the batch (reduction='mean')."
        )
    return value
