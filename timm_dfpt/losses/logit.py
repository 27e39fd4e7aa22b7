"""Distillation losses between the logits of one student and one teacher.

All of them are free functions of raw logits `[B, K]` and return a scalar averaged over the batch. They share three
rules: the teacher gets no gradient, half-precision logits are computed in float32 whatever the autocast (float64 stays
float64), and the argument checks never wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable

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

__all__ = ['KDLoss', 'dist_loss', 'dkd_loss', 'kd_loss', 'logit_std_loss', 'ttm_loss']

KDLoss = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""A loss `(student_logits [B, K], teacher_logits [B, K], target, temperature) -> scalar`."""


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 4.0) -> Tensor:
    """Knowledge distillation: `T^2 KL(softmax(t / T) || softmax(s / T))`.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2; the factor T^2
    keeps the size of the gradient when the temperature changes.

    Args:
        student_logits: Logits of the student `[B, K]`.
        teacher_logits: Logits of the teacher `[B, K]`; no gradient flows into them.
        temperature: Softmax temperature T > 0; a tensor without dimensions if it is learned.

    Returns:
        Scalar loss, mean over the batch. Rounding may leave it a little below zero when both distributions agree.

    Raises:
        TypeError: If the logits are not floating-point tensors, or the temperature is not a number.
        ValueError: If shapes or devices differ, or the temperature is not positive and finite.
    """
    check_logits(student_logits, teacher_logits=teacher_logits)
    check_temperature(temperature)
    with full_precision(student_logits):
        log_student = F.log_softmax(upcast(student_logits) / temperature, dim=1)
        log_teacher = F.log_softmax(upcast(teacher_logits).detach() / temperature, dim=1)
        return kl_from_log_probs(log_student, log_teacher) * temperature**2


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float | Tensor = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled knowledge distillation: `T^2 (alpha TCKD + beta NCKD)`.

    TCKD is the divergence between the two-way distributions (target class, all others), NCKD the one between the
    distributions over the other classes alone. Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022. The
    authors' CIFAR-100 recipes have alpha = 1, T = 4 and beta = 8, but 2 for resnet56 -> resnet20 and resnet110 ->
    resnet32, and 6 for vgg13 and for the WRN students of wrn_40_2. The other classes are masked out exactly, and the
    two-way distribution comes from one logit, `z_target - logsumexp(z_others)`, so large logits lose nothing.

    Args:
        student_logits: Logits of the student `[B, K]`.
        teacher_logits: Logits of the teacher `[B, K]`; no gradient flows into them.
        target: Class indices `[B]`, int64. Soft labels (mixup, cutmix) have no target class and are refused.
        temperature: Softmax temperature T > 0; a tensor without dimensions if it is learned.
        alpha: Weight of the target class term.
        beta: Weight of the term over the other classes.

    Returns:
        Scalar loss, mean over the batch; zero with a single class.

    Raises:
        TypeError: If the logits are not floating-point tensors, or temperature or target have the wrong type.
        ValueError: If shapes or devices differ, the target is soft, or the temperature is not positive and finite.
    """
    check_logits(student_logits, teacher_logits=teacher_logits)
    check_target(target, student_logits, hard_only='dkd_loss')
    check_temperature(temperature)
    with full_precision(student_logits):
        classes = torch.arange(student_logits.shape[1], device=target.device)
        is_target = classes == target.unsqueeze(1)
        binary_student, others_student = _decouple(upcast(student_logits) / temperature, target, is_target)
        binary_teacher, others_teacher = _decouple(upcast(teacher_logits).detach() / temperature, target, is_target)
        tckd = kl_from_log_probs(binary_student, binary_teacher)
        nckd = kl_from_log_probs(others_student, others_teacher)
        return (alpha * tckd + beta * nckd) * temperature**2


def _decouple(logits: Tensor, target: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Split tempered logits into log-probabilities of (target, others) `[B, 2]` and among the others `[B, K]`."""
    # The lowest number instead of -inf, which would turn into NaN in the divergence.
    others = logits.masked_fill(is_target, torch.finfo(logits.dtype).min)
    margin = logits.gather(1, target.unsqueeze(1)).squeeze(1) - others.logsumexp(dim=1)
    binary = torch.stack([F.logsigmoid(margin), F.logsigmoid(-margin)], dim=1)
    return binary, F.log_softmax(others, dim=1)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """DIST: one minus the Pearson correlation of the tempered probabilities, between and within classes.

    `T^2 (beta (1 - mean_b rho(p_s[b, :], p_t[b, :])) + gamma (1 - mean_k rho(p_s[:, k], p_t[:, k])))`. Source: Huang et
    al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022; the factor T^2 is that of public code. A
    correlation that does not exist because one side is constant (one class, a batch of one, a zero-initialised head)
    is 0 and gives no gradient, where dividing by a small number would give a huge one.

    Args:
        student_logits: Logits of the student `[B, K]`.
        teacher_logits: Logits of the teacher `[B, K]`; no gradient flows into them.
        temperature: Softmax temperature T > 0; a tensor without dimensions if it is learned.
        beta: Weight of the relation between the classes of a sample.
        gamma: Weight of the relation between the samples of a class; constant for a batch of 1.

    Returns:
        Scalar loss, in `[0, 2 T^2 (beta + gamma)]`.

    Raises:
        TypeError: If the logits are not floating-point tensors, or the temperature is not a number.
        ValueError: If shapes or devices differ, or the temperature is not positive and finite.
    """
    check_logits(student_logits, teacher_logits=teacher_logits)
    check_temperature(temperature)
    with full_precision(student_logits):
        student = F.softmax(upcast(student_logits) / temperature, dim=1)
        teacher = F.softmax(upcast(teacher_logits).detach() / temperature, dim=1)
        inter = 1 - _pearson(student, teacher, dim=1).mean()
        intra = 1 - _pearson(student, teacher, dim=0).mean()
        return (beta * inter + gamma * intra) * temperature**2


def _centre(values: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return centred values, their norm along `dim`, and where that norm is more than rounding noise."""
    centred = values - values.mean(dim, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=dim, keepdim=True)
    number = torch.finfo(values.dtype)
    noise = 8 * number.eps * torch.linalg.vector_norm(values.detach(), dim=dim, keepdim=True)
    # Below the floor the squares in the norm underflow, and the correlation could exceed 1.
    floor = (number.tiny / number.eps) ** 0.5
    return centred, norm, norm.detach() > noise.clamp_min(floor)


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson correlation along `dim`, 0 where one side is constant."""
    unit = []
    for values in (a, b):
        centred, norm, varies = _centre(values, dim)
        # The inner `where` keeps the zero norm out of the division, whose gradient would be NaN.
        unit.append(torch.where(varies, centred / torch.where(varies, norm, 1.0), 0.0))
    return (unit[0] * unit[1]).sum(dim)


def logit_std_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 2.0) -> Tensor:
    """Logit standardisation: `kd_loss` of logits brought to zero mean and unit standard deviation over the classes.

    Source: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, algorithms 1 and 2: the standard
    deviation divides by K (the authors' code divides by K - 1, which is the same as a temperature larger by
    `sqrt(K / (K - 1))`). Their code multiplies this loss by 9 and uses T = 2; the weight is left to the caller. Logits
    that are all equal (a zero-initialised head, one class) have no standard score: it is 0, without gradient.

    Args:
        student_logits: Logits of the student `[B, K]`.
        teacher_logits: Logits of the teacher `[B, K]`; no gradient flows into them.
        temperature: Base temperature T > 0 after the standardisation; a tensor without dimensions if it is learned.

    Returns:
        Scalar loss, mean over the batch.

    Raises:
        TypeError: If the logits are not floating-point tensors, or the temperature is not a number.
        ValueError: If shapes or devices differ, or the temperature is not positive and finite.
    """
    check_logits(student_logits, teacher_logits=teacher_logits)
    with full_precision(student_logits):
        return kd_loss(_standardize(upcast(student_logits)), _standardize(upcast(teacher_logits)), temperature)


def _standardize(logits: Tensor) -> Tensor:
    """Z-score of each row of logits `[B, K]`, 0 where a row is constant."""
    centred, norm, varies = _centre(logits, dim=1)
    std = norm / logits.shape[1] ** 0.5
    return torch.where(varies, centred / torch.where(varies, std, 1.0), 0.0)


def ttm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor = 10.0,
    *,
    weighted: bool = False,
) -> Tensor:
    """Transformed teacher matching: `KL(p_t^gamma / sum(p_t^gamma) || softmax(s))` with `gamma = 1 / T`.

    Only the teacher is tempered (raising probabilities to the power gamma is tempering by 1 / gamma), and there is no
    factor T^2. Source: Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024,
    arXiv 2402.11148; gamma is 0.1 in the authors' example (T = 10). The weighted form (WTTM)
    multiplies each sample by its power sum `sum_k p_t[k]^gamma`, more for the samples on which the teacher is unsure.

    Args:
        student_logits: Logits of the student `[B, K]`.
        teacher_logits: Logits of the teacher `[B, K]`; no gradient flows into them.
        temperature: Temperature of the teacher T = 1 / gamma > 0; a tensor without dimensions if it is learned.
        weighted: Weigh the samples by their power sum (WTTM).

    Returns:
        Scalar loss, mean over the batch.

    Raises:
        TypeError: If the logits are not floating-point tensors, or the temperature is not a number.
        ValueError: If shapes or devices differ, or the temperature is not positive and finite.
    """
    check_logits(student_logits, teacher_logits=teacher_logits)
    check_temperature(temperature)
    with full_precision(student_logits):
        log_student = F.log_softmax(upcast(student_logits), dim=1)
        teacher = upcast(teacher_logits).detach()
        log_teacher = F.log_softmax(teacher / temperature, dim=1)
        if not weighted:
            return kl_from_log_probs(log_student, log_teacher)
        divergence = F.kl_div(log_student, log_teacher, reduction='none', log_target=True).sum(dim=1)
        power_sum = (F.log_softmax(teacher, dim=1) / temperature).exp().sum(dim=1)
        return (power_sum * divergence).mean()
