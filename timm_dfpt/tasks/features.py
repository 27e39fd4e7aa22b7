"""Feature distillation: the student learns the teacher's pooled features, so that classes do not matter."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.task import FeatureDistillationTask
from timm.utils import unwrap_model
from torch import nn

from ..backbone.modes import evaluating, keep_frozen, look_through
from ..backbone.types import name_of
from ..losses.checks import upcast
from ..teacher.prompt_path import match_dtype
from ..teacher.teacher import DualForwardPathTeacher
from .base import StudentModule, StudentTask
from .inputs import adapt_inputs, input_config_of
from .pair import check_student

__all__ = ['FeatureTask', 'pooled_features']


def pooled_features(model: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """Return what enters the classifier of a timm model, `[B, D]`, for images `[B, C, H, W]`."""
    plain: Any = model
    features: torch.Tensor = plain.forward_head(plain.forward_features(input), pre_logits=True)
    return features


class _StudentWithProjection(StudentModule):
    def __init__(self, student: nn.Module, projection: nn.Module | None) -> None:
        super().__init__(student)
        self.projection = projection

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return features if self.projection is None else self.projection(features)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        student: Any = self.student
        features = student.forward_features(x)
        return student.forward_head(features), self.project(student.forward_head(features, pre_logits=True))


class FeatureTask(StudentTask, FeatureDistillationTask):
    """timm's `FeatureDistillationTask`: the pooled features of student and teacher, compared by their squared error.

    Where the numbers of features differ, a linear layer that is trained along projects the student's; it is not part of
    the student that is saved. The teacher's classes are not used, and it need not have any. It computes what timm's
    task does, to the last bit in full precision.

    Args:
        student_model: Student model to train; without classes (`num_classes=0`) it learns from the teacher alone.
        teacher_model: Teacher model; frozen here.
        criterion: Loss on the labels.
        distill_warmup_epochs: Epochs over which the weight of the teacher grows to its full size.
        input_config: What the loader gives: `input_size` `(C, H, W)`, `mean`, `std`. By default what the student's
            `pretrained_cfg` says.
        teacher_input_config: What the teacher was trained with; by default what its `pretrained_cfg` says.
        **kwargs: Further arguments of timm's task.

    Raises:
        TypeError: If the teacher has two paths.
        ValueError: If the student shares weights with the teacher or has nothing to train, one of them has no pooled
            features `[B, D]`, or numbers of channels do not fit.
    """

    compares_logits = False

    distill_loss_weight: float

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: nn.Module,
        criterion: nn.Module | None = None,
        *,
        distill_warmup_epochs: int = 0,
        input_config: Mapping[str, Any] | None = None,
        teacher_input_config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(look_through(teacher_model), DualForwardPathTeacher):
            raise TypeError(f'{type(self).__name__} takes a plain model as its teacher: give teacher.unwrap().')
        check_student(student_model, teacher_model)
        adapter = adapt_inputs(student_model, teacher_model, input_config, teacher_input_config)
        size = (input_config or input_config_of(student_model))['input_size']
        widths = {
            'student_feature_dim': _width('student', student_model, size),
            'teacher_feature_dim': _width('teacher', teacher_model, size, adapter),
        }
        super().__init__(student_model, teacher_model, criterion, **{**widths, **kwargs})
        timms: Any = self.trainable_module
        self.trainable_module: nn.Module = _StudentWithProjection(student_model, timms.projection)
        self._frozen_modules = list(self.teacher.model.modules())
        keep_frozen(self._frozen_modules)
        self.adapter = adapter.to(self.device)
        self.full_distill_loss_weight = self.distill_loss_weight
        self.distill_warmup_epochs = distill_warmup_epochs

    def get_teacher(self) -> nn.Module:
        """Return the frozen teacher."""
        teacher: nn.Module = unwrap_model(self.teacher.model)
        return teacher

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the student without its projection."""
        found = super().get_eval_model(module, ema)
        return getattr(unwrap_model(found), 'student', found) if found is not None else None

    def extra_param_groups(self) -> list[dict[str, Any]]:
        """Return the projection, if there is one."""
        projection = unwrap_model(self.trainable_module).projection
        return [] if projection is None else [{'params': list(projection.parameters())}]

    def set_progress(self, epoch: int, update: int, total: int) -> None:
        """Set the weight of the teacher, where it grows."""
        if self.distill_warmup_epochs:
            grown = min(1.0, (epoch + 1) / self.distill_warmup_epochs)
            self.distill_loss_weight = self.full_distill_loss_weight * grown

    @property
    def shows_teacher(self) -> bool:
        """Whether the teacher's logits are measured: its classes do not matter."""
        return False

    def teacher_features(self, input: torch.Tensor) -> torch.Tensor:
        """Return the teacher's pooled features `[B, D]`, without gradient, for images as the loader gives them."""
        keep_frozen(self._frozen_modules)
        with torch.no_grad():
            return self.teacher(match_dtype(self.adapter(input), self.teacher.model), return_features=True)

    def eval_features(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the features that are compared, `[B, D]`, for images `[B, C, H, W]` as the loader gives them.

        Returns:
            `student`, `student_ema` where there is an average, and `teacher`.
        """
        features = {}
        for name, ema in (('student', False), ('student_ema', True)):
            if not ema or self.has_ema():
                trained = unwrap_model(self.get_trainable_module(ema=ema))
                features[name] = trained.project(pooled_features(unwrap_model(trained.student), input))
        return {**features, 'teacher': upcast(self.teacher_features(input))}

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, teacher_logits: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Run student and teacher; see `StudentTask.forward`. Logits of the teacher are not used.

        Returns:
            `loss`, its parts `task_loss` and `kd_loss` without their weights, and `output`.
        """
        wanted = upcast(self.teacher_features(input))
        logits, features = self.trainable_module(input)
        task_loss = self.criterion(logits, target)
        distillation = F.mse_loss(features, wanted)
        return {
            'loss': self.task_loss_weight * task_loss + self.distill_loss_weight * distillation,
            'output': logits,
            'task_loss': task_loss,
            'kd_loss': distillation,
        }


def _width(role: str, model: nn.Module, size: Any, adapter: nn.Module | None = None) -> int:
    """Return the number of pooled features of a model for images of `size` `(C, H, W)` as the loader gives them."""
    plain: Any = look_through(model)
    weight = next(plain.parameters(), torch.empty(0))
    try:
        with torch.no_grad(), evaluating(plain):
            image = torch.zeros(1, *size) if adapter is None else adapter(torch.zeros(1, *size))
            features = pooled_features(plain, image.to(weight.device, weight.dtype))
    except Exception as error:
        why = ' '.join(str(error).split()).rstrip('.') or type(error).__name__
        raise ValueError(
            f'The {role} {name_of(plain)} does not return pooled features for images of input_size={tuple(size)}: '
            f'{why}. Feature distillation needs a model of timm with forward_features and forward_head: choose '
            'another, or another size.'
        ) from error
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        found = f'a tensor {list(features.shape)}' if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(
            f'The {role} {name_of(plain)} returns {found} before its classifier, not pooled features [B, D]: choose '
            'another model, or another global_pool.'
        )
    return features.shape[1]
