"""What the trainer asks a task: timm's questions, and those that distillation adds to them."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import auto_group_layers
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from ..teacher.teacher import DualForwardPathTeacher

__all__ = ['NoLabels', 'StudentModule', 'StudentTask', 'TeacherLogits', 'check_kd_loss']

TeacherLogits = dict[nn.Module, torch.Tensor]
"""Logits `[B, K]` of one batch by the frozen model that gave them: computed once for all students that need them."""


class StudentModule(nn.Module):
    """A student and what is trained with it, as timm's parameter groups ask for it.

    Args:
        student_model: The student.
    """

    def __init__(self, student_model: nn.Module) -> None:
        super().__init__()
        self.student = student_model

    def no_weight_decay(self) -> set[str]:
        """Return the student's parameters that timm's optimizers must not decay."""
        student: Any = unwrap_model(self.student)
        names = student.no_weight_decay() if hasattr(student, 'no_weight_decay') else ()
        return {f'student.{name}' for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return timm's layer number by parameter name: the student's own, and for all else that of its head."""
        student: Any = unwrap_model(self.student)
        if hasattr(student, 'group_matcher'):
            layers = group_parameters(student, student.group_matcher(coarse=coarse), reverse=True)
        else:
            # As timm does where a model itself is trained.
            layers = auto_group_layers(student)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix('student.'), last) if name.startswith('student.') else last


class NoLabels(nn.Module):
    """The loss on labels where there are none: 0, whatever is given."""

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return 0 as a scalar."""
        return logits.new_zeros(())


class StudentTask(TrainingTask):
    """A timm task that trains a student, and answers what a trainer asks; these are the answers without a teacher.

    Attributes:
        compares_logits: Whether student and teacher, if there is one, have the same classes, and logits are compared.
        prompt_epochs: Epochs after which `set_progress` freezes the prompt path, if there is one; `None` for never.
    """

    compares_logits: bool = True
    prompt_epochs: int | None = None

    def get_student(self, ema: bool = False) -> nn.Module:
        """Return the student itself, or its moving average, without wrappers of distributed training or compilation."""
        student: nn.Module = unwrap_model(self.get_eval_model(ema=ema))
        return student

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the forward of a whole step, teacher and losses included, as one graph.

        What is not part of a step stays as it is: it sees batches of other sizes.

        Returns:
            The compiled student for evaluation, which `get_student` and evaluations of this package look through.
        """
        nn.Module.compile(self, backend=backend, mode=mode, **compile_kwargs)
        eval_model: Any = torch.compile(self.get_student(), backend=backend, mode=mode, **compile_kwargs)
        self.eval_model = eval_model
        return eval_model

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return what gradient clipping is for; `exclude_head` leaves out the last layer of the student."""
        student = list(self.get_student().parameters())
        own = {id(parameter) for parameter in student}
        others = [p for p in unwrap_model(self.get_trainable_module()).parameters() if id(p) not in own]
        return [*(student[:-2] if exclude_head else student), *others]

    def get_teacher(self) -> nn.Module | None:
        """Return the frozen model that the student learns from, if there is one."""
        return None

    def get_dual_teacher(self) -> DualForwardPathTeacher | None:
        """Return the teacher with both of its paths, if it has a prompt path."""
        return None

    def get_frozen_path(self) -> nn.Module | None:
        """Return the prompt path if there is one that is not trained, or not any more.

        `forward` then takes its logits `[B, K]` as `prompt_logits`, if they are known already.
        """
        return None

    @property
    def needs_teacher_logits(self) -> bool:
        """Whether a step needs the frozen teacher's logits."""
        return self.get_teacher() is not None

    @property
    def shows_teacher(self) -> bool:
        """Whether there is a teacher, and its classes are the student's, so that its accuracy means something."""
        return self.get_teacher() is not None

    def teacher_logits(self, input: torch.Tensor) -> torch.Tensor:
        """Return the frozen teacher's logits `[B, K]` for images `[B, C, H, W]` as the loader gives them.

        Raises:
            RuntimeError: If there is no teacher.
        """
        raise RuntimeError(f'{type(self).__name__} trains without a teacher.')

    def prompt_logits(self, input: torch.Tensor) -> torch.Tensor:
        """Return the prompt path's logits `[B, K]` for images `[B, C, H, W]` as the loader gives them.

        Raises:
            RuntimeError: If there is no prompt path.
        """
        raise RuntimeError(f'{type(self).__name__} trains without a prompt path.')

    def eval_outputs(self, input: torch.Tensor, teacher_logits: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Run what is evaluated.

        Args:
            input: Images `[B, C, H, W]` as the loader gives them.
            teacher_logits: Logits `[B, K]` of the frozen teacher if they are known already.

        Returns:
            Logits `[B, K]`: `student`, `student_ema` where there is an average, `prompt_path` where there is one, and
            `teacher` where they are given or needed in every step.
        """
        outputs = {'student': self.get_student()(input)}
        if self.has_ema():
            outputs['student_ema'] = self.get_student(ema=True)(input)
        return outputs if teacher_logits is None else {**outputs, 'teacher': teacher_logits}

    def extra_param_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups that the student's optimizer trains along with the student."""
        return []

    def prompt_param_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the prompt path's optimizer, with timm's `lr_scale` where it is not 1."""
        return []

    def set_progress(self, epoch: int, update: int, total: int) -> None:
        """Take note of where training is, for what changes in its course.

        Args:
            epoch: Epochs completed.
            update: Updates completed.
            total: Updates of the whole training.
        """

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, teacher_logits: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Run the student on a batch, and compute its loss.

        Args:
            input: Images `[B, C, H, W]` as the student takes them.
            target: Class indices `[B]` or probabilities `[B, K]`.
            teacher_logits: Logits `[B, K]` of the frozen teacher if they are known already.

        Returns:
            `loss` (train on this), `output` (the student's logits), `teacher_output` and `prompt_output` where these
            were needed, and whatever else is of interest, as scalars.
        """
        raise NotImplementedError


def check_kd_loss(kd_loss: Any) -> None:
    """Refuse what is not a function, as the name of a loss.

    Raises:
        TypeError: If it is neither a function nor None.
    """
    if kd_loss is not None and not callable(kd_loss):
        raise TypeError(
            'kd_loss must be a function (student_logits, teacher_logits, target, temperature) -> loss, such as '
            f'timm_dfpt.losses.dkd_loss, got {kd_loss!r}.'
        )
