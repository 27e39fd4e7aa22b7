"""The table of methods: the only place that knows their names.

A method with a loss of its own between the logits of student and teacher is that function and one row here:

    register_method(Method('mine', 'My KD', my_loss))

Options, command line, training, comparison and cards then know it.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..losses import KDLoss, dist_loss, dkd_loss, kd_loss, logit_std_loss, ttm_loss
from ..teacher.prompt_path import Variant
from .base import StudentTask
from .baselines import CTKDTask, LogitLossTask, SupervisedTask
from .dfpt import DFPTDistillationTask
from .features import FeatureTask

__all__ = [
    'ALIASES', 'DEFAULT_LOSS', 'DEFAULT_METHOD', 'KD_LOSSES', 'METHODS', 'REFERENCE_METHOD', 'Method',
    'register_method',
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train a student.

    Args:
        name: What the command line calls it.
        label: What tables and cards call it.
        kd_loss: Distillation loss `(student_logits, teacher_logits, target, temperature) -> scalar` of its own. It can
            also take the place of plain KD in the four terms of DFPT-KD.
        task: Class of its task.
        needs_teacher: Whether there is a teacher.
        needs_classes: Whether the teacher must know the classes that the student learns.
        needs_hard_labels: Whether labels must be class indices, which mixup and cutmix do not leave.
        variant: Variant of the teacher's prompt path, if it has one.
        description: What cards say of it in whole sentences, where that is more than the label.
    """

    name: str
    label: str
    kd_loss: KDLoss | None = None
    task: type[StudentTask] = LogitLossTask
    needs_teacher: bool = True
    needs_classes: bool = True
    needs_hard_labels: bool = False
    variant: Variant | None = None
    description: str = ''

    @property
    def copies_backbone(self) -> bool:
        """Whether the prompt path is a trainable copy of the backbone."""
        return self.variant == 'dfpt+'


def _without_target(
    loss: Callable[..., Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float,
    **kwargs: Any,
) -> Tensor:
    return loss(student_logits, teacher_logits, temperature=temperature, **kwargs)


_SUPERVISED = 'Trained on the labels only, without a teacher.'
_FEATURE = 'Distilled from the pooled features of the teacher, through a linear layer if their number differs.'
_PAPER = '[arXiv 2506.18244](https://arxiv.org/abs/2506.18244)'
_DFPT = f"""\
DFPT-KD ({_PAPER}) gives a frozen, pretrained teacher a second forward path, the *prompt path*: the same stages
with small trainable blocks between them and a head of its own. While the student learns from labels, teacher and prompt
path, the prompt path learns from labels, teacher and student: it stays accurate, but within the student's reach.
The teacher's own path is not changed."""
_DFPT_PLUS = f"{_DFPT} In DFPT-KD+ the prompt path also tunes a copy of the teacher's backbone."

METHODS: dict[str, Method] = {}
"""The methods by name."""

ALIASES = {'scratch': 'supervised'}
"""Other names by which a comparison knows methods."""

DEFAULT_METHOD = 'dfpt'
DEFAULT_LOSS = 'kd'
"""Loss of the terms of DFPT-KD in the paper."""
REFERENCE_METHOD = 'kd'
"""Method that others are compared with."""


KD_LOSSES: dict[str, KDLoss] = {}
"""The losses between logits by the names of their methods, all called in one way."""


def register_method(method: Method) -> None:
    """Add a method to the table.

    Raises:
        ValueError: If there is one of that name.
    """
    if method.name in METHODS:
        raise ValueError(f'The method {method.name!r} exists already; choose another name.')
    METHODS[method.name] = method
    if method.kd_loss is not None:
        KD_LOSSES[method.name] = method.kd_loss


for _method in (
    Method('supervised', 'supervised training', task=SupervisedTask, needs_teacher=False, description=_SUPERVISED),
    Method('kd', 'KD', partial(_without_target, kd_loss)),
    Method('dkd', 'DKD', dkd_loss, needs_hard_labels=True),
    Method('dist', 'DIST', partial(_without_target, dist_loss)),
    Method('logit-std', 'logit standardization', partial(_without_target, logit_std_loss)),
    Method('ttm', 'TTM', partial(_without_target, ttm_loss)),
    Method('wttm', 'WTTM', partial(_without_target, ttm_loss, weighted=True)),
    Method('ctkd', 'CTKD', task=CTKDTask),
    Method('feature', 'feature distillation', task=FeatureTask, needs_classes=False, description=_FEATURE),
    Method('dfpt', 'DFPT-KD', task=DFPTDistillationTask, variant='dfpt', description=_DFPT),
    Method('dfpt+', 'DFPT-KD+', task=DFPTDistillationTask, variant='dfpt+', description=_DFPT_PLUS),
):
    register_method(_method)
