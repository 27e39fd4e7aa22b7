"""DFPT-KD as a timm training task: a batch in, named losses out."""
from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.utils import unwrap_model
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from ..backbone.modes import look_through
from ..losses import DFPTWeights, KDLoss, dfpt_losses
from ..losses.checks import check_temperature
from ..teacher.teacher import DualForwardPathTeacher
from ..teacher.wrapping import wrap
from .base import StudentModule, StudentTask, check_kd_loss
from .inputs import adapt_inputs
from .pair import check_classes, check_student

__all__ = ['DFPTDistillationTask', 'DFPTTrainableModule']

_logger = logging.getLogger(__name__)


class DFPTTrainableModule(StudentModule):
    """Everything DFPT-KD trains, in one module with one forward: the student and the prompt path.

    The frozen teacher takes part in the forward but is not a submodule, so DistributedDataParallel neither broadcasts
    it nor waits for gradients of it.

    Args:
        student_model: The student.
        teacher: The teacher whose prompt path is trained.

    Attributes:
        frozen: Whether the prompt path has no parameter to be trained.
    """

    def __init__(self, student_model: nn.Module, teacher: DualForwardPathTeacher) -> None:
        super().__init__(student_model)
        self.prompt_path = teacher.prompt_path
        self._teacher = (teacher,)
        self.frozen = False
        self.look_for_gradients()

    def look_for_gradients(self) -> None:
        """Find out whether the prompt path is trained; put it into evaluation otherwise."""
        self.frozen = not any(p.requires_grad for p in self.prompt_path.parameters())
        if self.frozen:
            self.prompt_path.eval()

    def train(self, mode: bool = True) -> DFPTTrainableModule:
        """Set the mode of student and prompt path; a prompt path without trainable parameters stays in evaluation."""
        super().train(mode)
        self.look_for_gradients()
        return self

    def forward(
        self,
        student_input: torch.Tensor,
        teacher_input: torch.Tensor,
        teacher_logits: torch.Tensor | None = None,
        prompt_logits: torch.Tensor | None = None,
        original: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run all three paths on one batch.

        Args:
            student_input: Images `[B, C, H, W]` for the student.
            teacher_input: The same images as the teacher takes them.
            teacher_logits: Logits `[B, K]` of the original path if they are known already.
            prompt_logits: Logits `[B, K]` of the prompt path, if it is frozen and they are known already.
            original: Whether the original path is asked for.

        Returns:
            Logits of student, prompt path and original path, `[B, K]` each; `None` for the last if not asked for.
        """
        teacher = self._teacher[0]
        original = original and teacher_logits is None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if prompt_logits is None and original:
                teacher_logits, prompt_logits = teacher(teacher_input)
            elif prompt_logits is None:
                prompt_logits = teacher.prompt(teacher_input)
            elif original:
                teacher_logits = teacher.original(teacher_input)
        return self.student(student_input), prompt_logits, teacher_logits


class DFPTDistillationTask(StudentTask):
    """Dual-forward path teacher distillation (DFPT-KD, DFPT-KD+; arXiv 2506.18244).

    Student and prompt path are trained together with one backward; see `timm_dfpt.losses.dfpt_losses` for the formula.

    Args:
        student_model: Student model to train.
        teacher_model: A `DualForwardPathTeacher`, a model to wrap (`variant='dfpt'`), or the name of a pretrained timm
            model.
        criterion: Loss on the labels (default: CrossEntropyLoss).
        temperature: Softmax temperature of the distillation terms.
        weights: Weights of the six terms.
        student_prompt_weight_end: Value that the weight d (`weights.student_prompt`) reaches linearly at the end.
        kd_loss: Another distillation loss than the paper's, `(learner_logits, source_logits, target, temperature) ->
            scalar`, such as `timm_dfpt.losses.dkd_loss`.
        prompt_epochs: Epochs after which `set_progress` freezes the prompt path; `None` for never, 0 for at once.
        backbone_lr_scale: DFPT-KD+: learning rate of the backbone copy in relation to the rest of the prompt path.
        input_config: What the loader gives: `input_size` `(C, H, W)`, `mean`, `std`. By default what the student's
            `pretrained_cfg` says.
        teacher_input_config: What the teacher was trained with; by default what its `pretrained_cfg` says.
        device: Device for task tensors/buffers.
        dtype: Dtype for task tensors/buffers.
        verbose: Enable info logging.

    Raises:
        TypeError: If `kd_loss` is not a function.
        ValueError: If the student shares weights with the teacher or has nothing to train, if numbers of classes or
            channels do not fit, or an argument is out of range.

    Example:
        >>> teacher = timm_dfpt.wrap(timm.create_model('resnet50', pretrained=True))
        >>> task = DFPTDistillationTask(student, teacher, temperature=4.0)
        >>> result = task(input, target)
        >>> result['loss'].backward()
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module,
        criterion: nn.Module | None = None,
        *,
        temperature: float = 4.0,
        weights: DFPTWeights | None = None,
        student_prompt_weight_end: float | None = None,
        kd_loss: KDLoss | None = None,
        prompt_epochs: int | None = None,
        backbone_lr_scale: float = 0.3,
        input_config: Mapping[str, Any] | None = None,
        teacher_input_config: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        check_kd_loss(kd_loss)
        check_temperature(temperature)
        model = timm.create_model(teacher_model, pretrained=True) if isinstance(teacher_model, str) else teacher_model
        model = look_through(model)
        check_student(student_model, model)
        teacher = model if isinstance(model, DualForwardPathTeacher) else wrap(model)
        weights = weights or DFPTWeights()
        check_classes(student_model, teacher, original=_count_original(weights))
        self.teacher = teacher.to(self.device)
        self.trainable_module: nn.Module = DFPTTrainableModule(student_model, teacher)
        self.adapter = adapt_inputs(student_model, teacher.model, input_config, teacher_input_config).to(self.device)
        self.criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
        self.temperature = temperature
        self.weights = self.first_weights = weights
        self.student_prompt_weight_end = student_prompt_weight_end
        self.kd_loss = kd_loss
        self.backbone_lr_scale = backbone_lr_scale
        self.prompt_epochs = prompt_epochs
        if prompt_epochs == 0:
            self.freeze_prompt_path()
        if verbose:
            _logger.info(f'DFPTDistillationTask: {self.weights}, temperature={temperature}')

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> DFPTDistillationTask:
        """Wrap student and prompt path in DistributedDataParallel; the frozen teacher stays outside."""
        ddp = torch.nn.parallel.DistributedDataParallel
        self.trainable_module = ddp(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def setup_ema(
        self, decay: float = 0.9999, use_warmup: bool = False, device: torch.device | None = None, **kwargs: Any
    ) -> nn.Module:
        """Keep an exponential moving average of the student, the only thing that is evaluated and published."""
        self.trainable_module_ema = ModelEmaV3(
            self._trainable().student, decay=decay, use_warmup=use_warmup, device=device, **kwargs
        )
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        """Update the student's average."""
        if self.has_ema():
            self.trainable_module_ema.update(self._trainable().student, step=step)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the student (or its average), which is what validation and checkpoints see."""
        if module is not None:
            return unwrap_model(module).student
        if ema:
            return super().get_eval_model(ema=True)
        return getattr(self, 'eval_model', self._trainable().student)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the prompt path's weights, which are not part of the student's `state_dict`."""
        return {} if ema else {'prompt_path': self._trainable().prompt_path.state_dict()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Load the prompt path's weights; without any, as in the checkpoint of a plain student, it stays as it is."""
        if ema:
            return
        if state and 'prompt_path' in state:
            self._trainable().prompt_path.load_state_dict(state['prompt_path'], strict=strict)
        elif self.verbose:
            _logger.info('The checkpoint has no prompt path; that of the task is left unchanged.')

    def get_teacher(self) -> nn.Module:
        """Return the original path: the frozen model itself."""
        return self.teacher.model

    def freeze_prompt_path(self) -> None:
        """Stop training the prompt path: evaluation mode, no gradient, and none of its terms in the loss.

        Optimizers must leave its parameters out from then on, and DistributedDataParallel must be wrapped around anew.
        """
        path = self._trainable().prompt_path
        path.requires_grad_(False)
        for param in path.parameters():
            param.grad = None
        self._trainable().look_for_gradients()

    def get_frozen_path(self) -> nn.Module | None:
        """Return the prompt path if it is frozen."""
        module = self._trainable()
        return module.prompt_path if module.frozen else None

    @property
    def needs_teacher_logits(self) -> bool:
        """Whether the student (c) learns from the original path, or the prompt path (a) as long as it is trained."""
        weights = self.weights
        return bool(weights.student_teacher or (weights.prompt_teacher and not self._trainable().frozen))

    @property
    def shows_teacher(self) -> bool:
        """Whether the original path's classes are the student's, as far as it is known."""
        return _count_original(self.weights) or self.teacher.same_classes

    def get_dual_teacher(self) -> DualForwardPathTeacher:
        """Return the teacher with both of its paths."""
        return self.teacher

    def teacher_logits(self, input: torch.Tensor) -> torch.Tensor:
        """Return the original path's logits `[B, K]`; see `StudentTask.teacher_logits`."""
        return self.teacher.original(self.adapter(input))

    def prompt_logits(self, input: torch.Tensor) -> torch.Tensor:
        """Return the prompt path's logits `[B, K]`; see `StudentTask.prompt_logits`."""
        return self.teacher.prompt(self.adapter(input))

    def eval_outputs(self, input: torch.Tensor, teacher_logits: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Run what is evaluated: the student, the prompt path, and the original path where it is needed or known."""
        outputs = super().eval_outputs(input)
        if teacher_logits is None and _count_original(self.weights):
            teacher_logits, prompt_logits = self.teacher(self.adapter(input))
        else:
            prompt_logits = self.prompt_logits(input)
        outputs['prompt_path'] = prompt_logits
        return outputs if teacher_logits is None else {**outputs, 'teacher': teacher_logits}

    def prompt_param_groups(self) -> list[dict[str, Any]]:
        """Return the groups of `parameter_groups` with their learning rates; see `StudentTask.prompt_param_groups`."""
        groups = self.teacher.parameter_groups()
        for group in groups:
            name = group.pop('name')
            if name == 'backbone' or (name == 'norms' and not self.teacher.prompt_path.shares_backbone):
                group['lr_scale'] = self.backbone_lr_scale
            if name == 'norms':
                # Decay draws towards zero what starts at the teacher's values.
                group['weight_decay'] = 0.0
        return groups

    def set_progress(self, epoch: int, update: int, total: int) -> None:
        """Freeze the prompt path after its epochs, and set the weight d where it changes."""
        if self.prompt_epochs is not None and epoch >= self.prompt_epochs and not self._trainable().frozen:
            self.freeze_prompt_path()
        if self.student_prompt_weight_end is not None:
            start = self.first_weights.student_prompt
            now = start + (self.student_prompt_weight_end - start) * (update / max(1, total - 1))
            self.weights = dataclasses.replace(self.first_weights, student_prompt=now)

    def forward(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        teacher_logits: torch.Tensor | None = None,
        prompt_logits: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run student and both paths, the original one where something learns from it, and compute the loss terms.

        Args:
            input: Images `[B, C, H, W]` as the student takes them.
            target: Class indices `[B]` or probabilities `[B, K]`.
            teacher_logits: Logits `[B, K]` of the original path if they are known already (a cache).
            prompt_logits: Logits `[B, K]` of the prompt path, if it is frozen and they are known already.

        Returns:
            `loss` (train on this), `output` (student logits), `prompt_output`, `teacher_output`, the unweighted terms
            of `dfpt_losses`, and `agree_student_prompt`, `agree_student_teacher`, `agree_prompt_teacher`: the share of
            the batch on which two of them name the same class. Those of the original path are missing where nothing
            learns from it, and those that the prompt path learns from where it is frozen.
        """
        original, frozen = self.needs_teacher_logits, self._trainable().frozen
        if not original:
            # What is shown must not depend on whether they are in a cache.
            teacher_logits = None
        if not frozen:
            prompt_logits = None
        known = prompt_logits is not None and (teacher_logits is not None or not original)
        teacher_input = input if known else self.adapter(input)
        student, prompt, teacher = self.trainable_module(input, teacher_input, teacher_logits, prompt_logits, original)
        losses = dfpt_losses(
            student,
            prompt,
            teacher,
            target,
            temperature=self.temperature,
            weights=self.weights,
            criterion=self.criterion,
            kd_fn=self.kd_loss,
            prompt_learns=not frozen,
        )
        outputs = {'output': student, 'prompt_output': prompt}
        agreements = {'agree_student_prompt': _agreement(student, prompt)}
        if teacher is not None:
            outputs['teacher_output'] = teacher
            agreements['agree_student_teacher'] = _agreement(student, teacher)
            agreements['agree_prompt_teacher'] = _agreement(prompt, teacher)
        return {**losses, **outputs, **agreements}

    def _trainable(self) -> DFPTTrainableModule:
        module = unwrap_model(self.trainable_module)
        assert isinstance(module, DFPTTrainableModule)
        return module


def _count_original(weights: DFPTWeights) -> bool:
    """Say whether student or prompt path learn from the original path at any time."""
    return bool(weights.prompt_teacher or weights.student_teacher)


def _agreement(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.detach().argmax(dim=1) == b.detach().argmax(dim=1)).float().mean()
