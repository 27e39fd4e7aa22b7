"""The rivals of DFPT-KD as timm training tasks: other logit losses, and a learned temperature."""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from timm.task import LogitDistillationTask
from timm.utils import unwrap_model
from torch import nn

from ..losses import KD_LOSSES, kd_loss
from ..losses.checks import upcast
from ..teacher.prompt_path import match_dtype
from .inputs import InputAdapter, input_config_of
from .temperature import GlobalTemperature

__all__ = ['AdaptedTeacher', 'CTKDTask', 'LogitLossTask']


class AdaptedTeacher(nn.Module):
    """A frozen teacher behind the input contract, for tasks that call it with what the student sees.

    Args:
        model: The teacher.
        input_config: What the loader gives: `input_size` `(C, H, W)`, `mean`, `std`.
        teacher_input_config: What the teacher was trained with; by default what its `pretrained_cfg` says.
    """

    def __init__(
        self,
        model: nn.Module,
        input_config: Mapping[str, Any],
        teacher_input_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.adapter = InputAdapter(input_config, teacher_input_config or input_config_of(model))
        # timm re-normalises from the student's to these values; the adapter does all of it, so they are the same.
        self.pretrained_cfg = {'mean': tuple(input_config['mean']), 'std': tuple(input_config['std'])}
        self._shared: tuple[dict[int, torch.Tensor], int] | None = None

    @contextlib.contextmanager
    def sharing(self, logits: dict[int, torch.Tensor], key: int) -> Iterator[None]:
        """Within the context take the batch's logits from `logits[key]`, or put them there after computing them."""
        self._shared = (logits, key)
        try:
            yield
        finally:
            self._shared = None

    def train(self, mode: bool = True) -> AdaptedTeacher:
        """Stay in evaluation, whatever `mode` says."""
        return super().train(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits `[B, K]` for images `[B, C, H, W]` as the loader gives them."""
        shared, key = self._shared or ({}, 0)
        if key not in shared:
            with torch.no_grad():
                shared[key] = self.model(match_dtype(self.adapter(x), self.model))
        # timm's loss computes in the precision of what it gets.
        return upcast(shared[key])


class LogitLossTask(LogitDistillationTask):
    """timm's `LogitDistillationTask` with another loss between student and teacher.

    Args:
        student_model: Student model to train.
        teacher_model: Teacher model.
        criterion: Loss on the labels.
        loss: Name in `timm_dfpt.losses.KD_LOSSES`.
        loss_kwargs: Further arguments of the loss.
        **kwargs: Further arguments of timm's task.
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: nn.Module,
        criterion: nn.Module | None = None,
        loss: str = 'kd',
        loss_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student_model, teacher_model, criterion, **kwargs)
        self.kd_fn = functools.partial(KD_LOSSES[loss], **(loss_kwargs or {}))
        # Compared once: timm compares at every step, for which a device is waited for.
        pairs = ((self.student_mean, self.teacher.mean_kd), (self.student_std, self.teacher.std_kd))
        self._renormalize = not all(torch.equal(ours, theirs) for ours, theirs in pairs)

    def _teacher_logits(self, input: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            if self._renormalize:
                input = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            return self.teacher(input)

    def _result(
        self, logits: torch.Tensor, target: torch.Tensor, distillation: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        task_loss = self.criterion(logits, target)
        return {
            'loss': self.task_loss_weight * task_loss + self.distill_loss_weight * distillation,
            'output': logits,
            'task_loss': task_loss,
            'kd_loss': distillation,
        }

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run student and teacher on `input` `[B, C, H, W]`; see timm's task for the result."""
        logits = self.trainable_module(input)
        return self._result(
            logits, target, self.kd_fn(logits, self._teacher_logits(input), target, self.temperature)
        )


class _StudentWithTemperature(nn.Module):
    def __init__(self, student: nn.Module, temperature: GlobalTemperature) -> None:
        super().__init__()
        self.student = student
        self.temperature = temperature

    def forward(self, x: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.student(x), self.temperature(epoch)


class CTKDTask(LogitLossTask):
    """Curriculum temperature (CTKD, arXiv 2211.16231): plain KD at a temperature learned against the student.

    Args:
        student_model: Student model to train.
        teacher_model: Teacher model.
        criterion: Loss on the labels.
        **kwargs: Further arguments of timm's task; `temperature` is not used.
    """

    def __init__(
        self, student_model: nn.Module, teacher_model: nn.Module, criterion: nn.Module | None = None, **kwargs: Any
    ) -> None:
        super().__init__(student_model, teacher_model, criterion, **kwargs)
        self.trainable_module = _StudentWithTemperature(student_model, GlobalTemperature().to(self.device))
        self.epoch = 0

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the student without its temperature."""
        found = super().get_eval_model(module, ema)
        return getattr(unwrap_model(found), 'student', found) if found is not None else None

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run student and teacher on `input` `[B, C, H, W]`; the result also has the `temperature`."""
        logits, temperature = self.trainable_module(input, self.epoch)
        result = self._result(logits, target, kd_loss(logits, self._teacher_logits(input), temperature))
        return {**result, 'temperature': temperature.detach()}
