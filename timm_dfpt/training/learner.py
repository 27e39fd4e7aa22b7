"""One student in training: its task, its optimizers and schedules, and a step of them."""
from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from timm.task import LogitDistillationTask, TrainingTask
from timm.utils import unwrap_model
from torch import nn

from ..data.seeding import derive_seed
from ..losses import DFPTWeights
from ..tasks.baselines import AdaptedTeacher, CTKDTask
from ..tasks.dfpt import DFPTDistillationTask
from .optim import create_optimizer, create_scheduler
from .options import TrainConfig
from .sharding import ShardedRoot, clip_gradients, is_sharding, whole_weights

__all__ = ['Learner']

_logger = logging.getLogger(__name__)

_STEP_STREAM = 4
_OUTPUTS = ('output', 'prompt_output', 'teacher_output')
_GRAD_NORMS = ('grad_norm', 'prompt_grad_norm')


class Learner:
    """A student, the task that trains it and what updates it.

    Several learners can be trained side by side on the same batches: each has its own optimizer and its own random
    numbers, so that none changes what another becomes.

    Args:
        name: What to call it in tables and files.
        config: Its options.
        task: Its task.
        accelerator: Prepares modules and optimizers, and runs the backward.
        updates_per_epoch: Optimizer updates an epoch.
    """

    def __init__(
        self, name: str, config: TrainConfig, task: TrainingTask, accelerator: Accelerator, updates_per_epoch: int
    ) -> None:
        self.name, self.config, self.task, self.accelerator = name, config, task, accelerator
        task.to(accelerator.device)
        if config.channels_last:
            task.to(memory_format=torch.channels_last)
        if config.model_ema:
            task.setup_ema(decay=config.model_ema_decay)
        optimizers = [_student_optimizer(config, task)]
        if isinstance(task, DFPTDistillationTask) and not config.freeze_prompt_path:
            optimizers.append(_prompt_optimizer(config, task))
        if config.compile:
            task.compile()
        self.schedulers = [create_scheduler(each, updates_per_epoch, **config.schedule) for each in optimizers]
        self._total_updates = config.epochs * updates_per_epoch
        self._moving_weights = _moving_weights(config) if isinstance(task, DFPTDistillationTask) else {}
        if is_sharding(accelerator):
            task.trainable_module = ShardedRoot(task.trainable_module)
        # Together, since sharding replaces the parameters that an optimizer knows.
        task.trainable_module, *self.optimizers = accelerator.prepare(task.trainable_module, *optimizers)
        self.overflowed = False
        """Whether the gradient scaler left out an optimizer in the last update, since its gradient was not finite."""
        self._finite: list[torch.Tensor] = []
        self._buffers: list[torch.Tensor] = []
        self._whole = contextlib.ExitStack()

    @property
    def module(self) -> nn.Module:
        """What is trained, in the wrappers of distributed training."""
        return self.task.get_trainable_module()

    @property
    def average(self) -> nn.Module | None:
        """The student's moving average, if there is one."""
        return self.task.get_trainable_module(ema=True)

    @property
    def student(self) -> nn.Module:
        """The student itself, without the wrappers of distributed training or compilation."""
        module = self.accelerator.unwrap_model(self.task.get_eval_model(), keep_fp32_wrapper=False)
        return unwrap_model(module)

    @property
    def published_student(self) -> nn.Module:
        """What is saved at the end: the average where there is one."""
        return unwrap_model(self.task.get_eval_model(ema=True)) if self.task.has_ema() else self.student

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen model this student learns from."""
        if isinstance(self.task, DFPTDistillationTask):
            return self.task.teacher.model
        if isinstance(self.task, LogitDistillationTask):
            return self._adapted_teacher().model
        return None

    def _adapted_teacher(self) -> AdaptedTeacher:
        module = self.task.teacher.model
        assert isinstance(module, AdaptedTeacher)
        return module

    def train(self) -> None:
        """Put what is trained, and nothing else, into training mode."""
        self._whole.close()
        self.task.get_trainable_module().train()
        if self.config.freeze_prompt_path:
            self.task.teacher.prompt_path.eval()

    def set_update(self, updates: int, epoch: int) -> None:
        """Set the learning rates for the next update, after `updates` of them."""
        for scheduler in self.schedulers:
            if scheduler is not None:
                scheduler.step_update(updates)
        if isinstance(self.task, CTKDTask):
            self.task.epoch = epoch
        warmup = self.config.distill_warmup_epochs
        if warmup and isinstance(self.task, LogitDistillationTask):
            self.task.distill_loss_weight = self.config.distill_loss_weight * min(1.0, (epoch + 1) / warmup)
        if self._moving_weights:
            done = updates / max(1, self._total_updates - 1)
            moved = {name: start + (end - start) * done for name, (start, end) in self._moving_weights.items()}
            self.task.weights = dataclasses.replace(self.task.weights, **moved)

    def step(
        self, input: torch.Tensor, target: torch.Tensor, step: int, known: dict[int, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], bool]:
        """Do one step: forward, backward, and (when enough gradients are added up) an update.

        Call it in `accelerator.accumulate`.

        Args:
            input: Images `[B, C, H, W]`.
            target: Class indices `[B]` or probabilities `[B, K]`.
            step: Number of the step in the run, which seeds dropout and the like.
            known: Teachers' logits for this batch by `id` of the model; read, and written where they are computed.

        Returns:
            The scalars of the task's result, with the norm of each optimizer's gradient where there is an update; and
            whether the step counts: with `on_nonfinite='skip'` a step that is not finite leaves everything as it was.
        """
        guarded = self.config.on_nonfinite == 'skip'
        if guarded and not self._buffers:
            self._buffers = [buffer.clone() for buffer in self.module.buffers()]
        # Seeded a step and a learner: a run that is resumed, or has others beside it, draws the same numbers.
        torch.manual_seed(derive_seed(self.config.seed, _STEP_STREAM, step, self.accelerator.process_index))
        with self.accelerator.autocast():
            result = self._forward(input, target, known)
        self.accelerator.backward(result['loss'])
        terms = {key: value.detach().reshape(()) for key, value in result.items() if key not in _OUTPUTS}
        if guarded:
            self._finite += [torch.isfinite(value) for value in terms.values()]
        if not self.accelerator.sync_gradients:
            return terms, True
        norms = self._clip_gradients()
        kept = not guarded or self._all_finite(norms)
        if kept:
            self._update()
        else:
            self._forget()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self._buffers, self._finite = [], []
        self._share_statistics()
        return {**terms, **norms}, kept

    def _clip_gradients(self) -> dict[str, torch.Tensor]:
        norms, scaler = {}, self.accelerator.scaler
        for name, optimizer in zip(_GRAD_NORMS, self.optimizers, strict=False):
            parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
            if scaler is not None:
                # One by one: accelerate would unscale all optimizers for each of them.
                self.accelerator.unscale_gradients(optimizer)
            norms[name] = clip_gradients(self.accelerator, parameters, self.config.clip_grad)
        # A gradient scaler looks for the largest scale by overflowing now and then, and deals with it itself.
        return norms if scaler is None else {}

    def _all_finite(self, norms: Mapping[str, torch.Tensor]) -> bool:
        finite = torch.stack([*self._finite, *(torch.isfinite(norm) for norm in norms.values())]).all()
        if self.accelerator.num_processes > 1:
            # Weights stay the same everywhere only if all skip together.
            finite = self.accelerator.reduce((~finite).float()) == 0
        return bool(finite)

    def _share_statistics(self) -> None:
        # Else every process would evaluate, and average into its EMA, a student with batch statistics of its own.
        buffers = [buffer for buffer in self.module.buffers() if buffer.is_floating_point()]
        if self.accelerator.num_processes > 1 and buffers:
            means: Any = self.accelerator.reduce(torch.cat([buffer.flatten() for buffer in buffers]), 'mean')
            for buffer, mean in zip(buffers, means.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(mean.view_as(buffer))

    def _forget(self) -> None:
        # Batch statistics have seen the step already.
        for buffer, before in zip(self.module.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()

    def _update(self) -> None:
        scaler = self.accelerator.scaler
        if scaler is None:
            for optimizer in self.optimizers:
                optimizer.step()
            return
        # accelerate changes the scale after each optimizer, and the next would divide by another than was multiplied.
        for optimizer in self.optimizers:
            scaler.step(getattr(optimizer, 'optimizer', optimizer))
        scale = scaler.get_scale()
        scaler.update()
        self.overflowed = scaler.get_scale() < scale

    def _forward(
        self, input: torch.Tensor, target: torch.Tensor, known: dict[int, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        key = id(self.teacher)
        if isinstance(self.task, DFPTDistillationTask):
            result = self.task(input, target, teacher_logits=known.get(key))
            known[key] = result['teacher_output']
            return result
        if isinstance(self.task, LogitDistillationTask):
            teacher = self._adapted_teacher()
            with teacher.sharing(known, key):
                return self.task(input, target)
        return self.task(input, target)

    def teacher_logits(self, input: torch.Tensor) -> torch.Tensor:
        """Return the original path's logits `[B, K]` for images `[B, C, H, W]` as the loader gives them."""
        task: Any = self.task
        if isinstance(task, DFPTDistillationTask):
            return task.teacher.original(task.adapter(input))
        return task.teacher(input)

    def prompt_logits(self, input: torch.Tensor) -> torch.Tensor:
        """Return the prompt path's logits `[B, K]` for images `[B, C, H, W]` as the loader gives them."""
        task: Any = self.task
        return task.teacher.prompt(task.adapter(input))

    def outputs(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return logits `[B, K]` by name for evaluation: `student`, its average, and both paths of the teacher."""
        outputs = self._student_outputs(input)
        if isinstance(self.task, DFPTDistillationTask):
            paths = self.task.teacher(self.task.adapter(input))
            outputs |= {'prompt_path': paths.prompt, 'teacher': paths.original}
        return outputs

    def outputs_with_teacher(self, input: torch.Tensor, known: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what `outputs` does, and the teacher's logits whatever the method.

        Args:
            input: Images `[B, C, H, W]`.
            known: Teachers' logits for this batch by `id` of the model; read, and written where they are computed.
        """
        key = id(self.teacher)
        if key in known:
            outputs = self._student_outputs(input)
            if isinstance(self.task, DFPTDistillationTask):
                outputs['prompt_path'] = self.prompt_logits(input)
            return {**outputs, 'teacher': known[key]}
        outputs = self.outputs(input)
        if self.teacher is not None:
            if 'teacher' not in outputs:
                outputs['teacher'] = self.teacher_logits(input)
            known[key] = outputs['teacher']
        return outputs

    def _student_outputs(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = {'student': self.student(input)}
        if self.task.has_ema():
            outputs['student_ema'] = self.published_student(input)
        return outputs

    def eval(self) -> None:
        """Put everything into evaluation; weights that are sharded are whole until `train` is called."""
        self._whole.enter_context(whole_weights(self.module))
        self.task.get_trainable_module().eval()

    def update_average(self, step: int) -> None:
        """Update the moving average, if there is one, after the update with this number."""
        if self.task.has_ema():
            with whole_weights(self.module):
                self.task.update_ema(step=step)


def _moving_weights(config: TrainConfig) -> dict[str, tuple[float, float]]:
    """Return first and last value of the weights that change, by their names in `DFPTWeights`."""
    names = [field.name for field in dataclasses.fields(DFPTWeights)]
    ends = {name: getattr(config, f'{name}_weight_end', None) for name in names}
    return {name: (getattr(config, f'{name}_weight'), end) for name, end in ends.items() if end is not None}


def _student_optimizer(config: TrainConfig, task: TrainingTask) -> torch.optim.Optimizer:
    student: Any = task.get_eval_model()
    optimizer = create_optimizer(
        config.opt,
        student,
        config.opt_fused,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        filter_bias_and_bn=False,
    )
    if isinstance(task, CTKDTask):
        temperature = unwrap_model(task.trainable_module).temperature
        optimizer.add_param_group({'params': list(temperature.parameters()), 'lr': config.lr, 'weight_decay': 0.0})
    return optimizer


def _prompt_optimizer(config: TrainConfig, task: DFPTDistillationTask) -> torch.optim.Optimizer:
    groups = task.teacher.parameter_groups()
    for group in groups:
        scale = config.prompt_backbone_lr_scale if group['name'] == 'backbone' else 1.0
        group['lr'] = config.prompt_lr * scale
        del group['name']
    settings = {'lr': config.prompt_lr, 'weight_decay': config.prompt_weight_decay}
    return create_optimizer(config.prompt_opt, groups, config.opt_fused, **settings)
