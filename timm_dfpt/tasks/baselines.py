"""What DFPT-KD is compared with, as timm tasks: the labels alone, logit losses, and a learned temperature (CTKD)."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import unwrap_model
from torch import nn

from ..backbone.modes import keep_frozen, look_through
from ..losses import KDLoss, kd_loss
from ..losses.checks import upcast
from ..teacher.prompt_path import match_dtype
from ..teacher.teacher import DualForwardPathTeacher
from .base import StudentModule, StudentTask, check_kd_loss
from .inputs import adapt_inputs
from .pair import check_classes, check_learns, check_student

__all__ = ['CTKDTask', 'GlobalTemperature', 'LogitLossTask', 'SupervisedTask']


class SupervisedTask(StudentTask, ClassificationTask):
    """timm's `ClassificationTask`: a student that learns from the labels alone.

    Args:
        model: Student model to train.
        *args: Further arguments of timm's task.
        **kwargs: Further arguments of timm's task.

    Raises:
        ValueError: If the student has nothing to train.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_learns(model)
        super().__init__(model, *args, **kwargs)

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, teacher_logits: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Run the student; see `StudentTask.forward`."""
        return ClassificationTask.forward(self, input, target)


class LogitLossTask(StudentTask, LogitDistillationTask):
    """timm's `LogitDistillationTask` with any loss between the logits of student and teacher.

    With the default loss it computes what timm's task does, to the last bit in full precision.

    Args:
        student_model: Student model to train.
        teacher_model: Teacher model; frozen here.
        criterion: Loss on the labels.
        kd_loss: Loss `(student_logits, teacher_logits, target, temperature) -> scalar`; plain KD by default.
        distill_warmup_epochs: Epochs over which the weight of the teacher grows to its full size.
        input_config: What the loader gives: `input_size` `(C, H, W)`, `mean`, `std`. By default what the student's
            `pretrained_cfg` says.
        teacher_input_config: What the teacher was trained with; by default what its `pretrained_cfg` says.
        **kwargs: Further arguments of timm's task.

    Raises:
        TypeError: If `kd_loss` is not a function, or the teacher has two paths.
        ValueError: If the student shares weights with the teacher or has nothing to train, or numbers of classes or
            channels do not fit.
    """

    distill_loss_weight: float

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module,
        criterion: nn.Module | None = None,
        *,
        kd_loss: KDLoss | None = None,
        distill_warmup_epochs: int = 0,
        input_config: Mapping[str, Any] | None = None,
        teacher_input_config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_kd_loss(kd_loss)
        if isinstance(look_through(teacher_model), DualForwardPathTeacher):
            raise TypeError(f'{type(self).__name__} takes a plain model as its teacher: give teacher.unwrap().')
        check_student(student_model, teacher_model)
        super().__init__(student_model, teacher_model, criterion, **kwargs)
        teacher = self.teacher.model
        check_classes(student_model, teacher)
        self._frozen_modules = list(teacher.modules())
        keep_frozen(self._frozen_modules)
        self.adapter = adapt_inputs(student_model, teacher, input_config, teacher_input_config).to(self.device)
        self.kd_loss = kd_loss
        self.full_distill_loss_weight = self.distill_loss_weight
        self.distill_warmup_epochs = distill_warmup_epochs

    def get_teacher(self) -> nn.Module:
        """Return the frozen teacher."""
        teacher: nn.Module = unwrap_model(self.teacher.model)
        return teacher

    def teacher_logits(self, input: torch.Tensor) -> torch.Tensor:
        """Return the teacher's logits `[B, K]`, without gradient; see `StudentTask.teacher_logits`."""
        # .train() may have been called on the teacher itself.
        keep_frozen(self._frozen_modules)
        with torch.no_grad():
            return self.teacher(match_dtype(self.adapter(input), self.teacher.model))

    def set_progress(self, epoch: int, update: int, total: int) -> None:
        """Set the weight of the teacher, where it grows."""
        if self.distill_warmup_epochs:
            grown = min(1.0, (epoch + 1) / self.distill_warmup_epochs)
            self.distill_loss_weight = self.full_distill_loss_weight * grown

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, teacher_logits: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Run student and teacher; see `StudentTask.forward`.

        Returns:
            `loss`, its parts `task_loss` and `kd_loss` without their weights, `output` and `teacher_output`.
        """
        # Before the student, so that the teacher runs while none of its activations are held.
        known = self._known_or_computed(input, teacher_logits)
        return self._result(self.trainable_module(input), target, known, self.temperature)

    def _known_or_computed(self, input: torch.Tensor, teacher_logits: torch.Tensor | None) -> torch.Tensor:
        return self.teacher_logits(input) if teacher_logits is None else teacher_logits

    def _result(
        self, logits: torch.Tensor, target: torch.Tensor, teacher_logits: torch.Tensor, temperature: Any
    ) -> dict[str, torch.Tensor]:
        # Before the loss on the labels: in which order gradients are added up decides their last bits.
        if self.kd_loss is None:
            distillation = kd_loss(logits, upcast(teacher_logits), temperature)
        else:
            distillation = self.kd_loss(logits, upcast(teacher_logits), target, temperature)
        task_loss = self.criterion(logits, target)
        return {
            'loss': self.task_loss_weight * task_loss + self.distill_loss_weight * distillation,
            'output': logits,
            'teacher_output': teacher_logits,
            'task_loss': task_loss,
            'kd_loss': distillation,
        }


class GlobalTemperature(nn.Module):
    """One learned temperature for all samples, trained to make distillation harder: `T = 1 + 20 sigmoid(raw)`.

    The same optimizer that lowers the distillation loss through the student raises it through the temperature, because
    the gradient of `raw` is reversed. A curriculum lets the reversed gradient grow from 0 to its full size along a half
    cosine of `curriculum_epochs`. Source: Li et al., "Curriculum Temperature for Knowledge Distillation" (CTKD), AAAI
    2023, arXiv 2211.16231; the values are those of the authors' CIFAR-100 script.
    """

    low, span, curriculum_epochs = 1.0, 20.0, 10

    def __init__(self) -> None:
        super().__init__()
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

    def forward(self, strength: torch.Tensor) -> torch.Tensor:
        """Return the temperature as a scalar tensor whose gradient is reversed.

        Args:
            strength: Factor of the reversed gradient as a scalar tensor, see `strength`.
        """
        raw = _ReverseGradient.apply(self.raw, strength)
        return (self.low + self.span * torch.sigmoid(raw)).squeeze(0)


class _ReverseGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by `-strength` (Ganin and Lempitsky, arXiv 1409.7495)."""

    @staticmethod
    def forward(value: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (strength,) = ctx.saved_tensors
        return -strength * grad_outputs[0], None


class _StudentWithTemperature(StudentModule):
    def __init__(self, student: nn.Module, temperature: GlobalTemperature) -> None:
        super().__init__(student)
        self.temperature = temperature

    def forward(self, x: torch.Tensor, strength: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.student(x), self.temperature(strength)


class CTKDTask(LogitLossTask):
    """Curriculum temperature (CTKD, arXiv 2211.16231): plain KD at a temperature learned against the student.

    Args:
        student_model: Student model to train.
        teacher_model: Teacher model; frozen here.
        criterion: Loss on the labels.
        **kwargs: Further arguments of `LogitLossTask`; `temperature` is not used.
    """

    strength: torch.Tensor

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module,
        criterion: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student_model, teacher_model, criterion, **kwargs)
        temperature = GlobalTemperature().to(self.device)
        self.trainable_module = _StudentWithTemperature(student_model, temperature)
        self.epoch = 0
        # A tensor, since a compiler makes other code for other numbers.
        self.register_buffer('strength', torch.tensor(temperature.strength(0), device=self.device), persistent=False)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the student without its temperature."""
        found = super().get_eval_model(module, ema)
        return getattr(unwrap_model(found), 'student', found) if found is not None else None

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the temperature, which is not part of the student's `state_dict`."""
        return {} if ema else {'temperature': unwrap_model(self.trainable_module).temperature.state_dict()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Load the temperature; without one, as in the checkpoint of a plain student, it stays as it is."""
        if not ema and state and 'temperature' in state:
            unwrap_model(self.trainable_module).temperature.load_state_dict(state['temperature'], strict=strict)

    def extra_param_groups(self) -> list[dict[str, Any]]:
        """Return the temperature, which is not decayed."""
        temperature = unwrap_model(self.trainable_module).temperature
        return [{'params': list(temperature.parameters()), 'weight_decay': 0.0}]

    def set_progress(self, epoch: int, update: int, total: int) -> None:
        """Set how strongly the temperature learns against the student."""
        super().set_progress(epoch, update, total)
        if epoch != self.epoch:
            self.epoch = epoch
            self.strength.fill_(unwrap_model(self.trainable_module).temperature.strength(epoch))

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, teacher_logits: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Run student and teacher; the result of `LogitLossTask.forward`, and the `temperature`."""
        known = self._known_or_computed(input, teacher_logits)
        logits, temperature = self.trainable_module(input, self.strength)
        result = self._result(logits, target, known, temperature)
        return {**result, 'temperature': temperature.detach()}
