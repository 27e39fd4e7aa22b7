"""One student in training: its task, its optimizers and schedules; a step: forward, backward, clip, update."""
from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..backbone.modes import forget_caches
from ..job.devices import ShardedRoot, clip_shards, is_sharding, local_part, whole_weights
from ..job.optim import create_optimizer, create_scheduler, shortened
from ..job.options import TrainConfig
from ..tasks.base import StudentTask, TeacherLogits
from ..tasks.evaluation import Measure, measure_features, measure_logits
from ..tasks.features import FeatureTask

__all__ = ['Learner']

# What a task returns besides scalars.
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
        updates_per_epoch: Optimizer updates per epoch.
    """

    def __init__(
        self, name: str, config: TrainConfig, task: StudentTask, accelerator: Accelerator, updates_per_epoch: int
    ) -> None:
        self.name, self.config, self.task, self.accelerator = name, config, task, accelerator
        task.to(accelerator.device)
        if config.channels_last:
            task.to(memory_format=torch.channels_last)
        if config.model_ema:
            task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
        optimizers = [_student_optimizer(config, task)]
        groups = task.prompt_param_groups()
        if groups:
            optimizers.append(_prompt_optimizer(config, groups))
        if config.compile:
            task.compile(mode=None if config.compile_mode == 'default' else config.compile_mode)
        schedules = [config.schedule, shortened(config.schedule, task.prompt_epochs, updates_per_epoch)]
        self.schedulers = [
            create_scheduler(optimizer, updates_per_epoch, **schedule)
            for optimizer, schedule in zip(optimizers, schedules, strict=False)
        ]
        self.total_updates = config.epochs * updates_per_epoch
        self._sharded = is_sharding(accelerator)
        if self._sharded:
            task.trainable_module = ShardedRoot(task.trainable_module)
        # Together, since sharding replaces the parameters that an optimizer knows.
        task.trainable_module, *self.optimizers = accelerator.prepare(task.trainable_module, *optimizers)
        """Those that make updates: the student's, and the prompt path's until it is frozen."""
        self.precision: dict[str, Any] | None = None
        """How far its teacher in half precision is from that in float32, see `compare_precision`."""
        self.overflowed = False
        """Whether the gradient scaler left out an optimizer in the last update, since its gradient was not finite."""
        self.published = 'student_ema' if config.model_ema else 'student'
        """What is saved at the end, as evaluations call it; see `choose_published`."""
        self.epoch: int | None = None
        """The epoch whose weights these are, if they are those of the best one; see `BestEpochs`."""
        self._whole = contextlib.ExitStack()

    def choose_published(self, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Choose what is saved, the student or its moving average, by their metrics on the validation data."""
        if self.average is not None:
            # The average where both are equal: it was asked for.
            self.published = max(('student_ema', 'student'), key=lambda name: self.rank(metrics[name]))

    def rank(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """Return what orders students by their metrics on the validation data: the larger, the better."""
        if self.config.unlabelled:
            # Not by labels that there may be after all: they must not change what is saved.
            return (metrics['agreement' if self.task.compares_logits else 'similarity'],)
        return metrics['top1'], -metrics['loss']

    @property
    def module(self) -> nn.Module:
        """What is trained, in the wrappers of distributed training."""
        module = self.task.get_trainable_module()
        assert module is not None
        return module

    @property
    def average(self) -> nn.Module | None:
        """The student's moving average, if there is one."""
        return self.task.get_trainable_module(ema=True)

    @property
    def student(self) -> nn.Module:
        """The student itself, without the wrappers of distributed training or compilation."""
        return self.task.get_student()

    @property
    def published_student(self) -> nn.Module:
        """What is saved at the end: the student or its moving average, see `choose_published`."""
        return self.task.get_student(ema=self.published == 'student_ema')

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen model this student learns from."""
        return self.task.get_teacher()

    @property
    def frozen_models(self) -> list[nn.Module]:
        """What is used in a step and not trained: the teacher, and a prompt path that is frozen."""
        teacher = self.teacher if self.task.needs_teacher_logits else None
        return [model for model in (teacher, self.task.get_frozen_path()) if model is not None]

    @property
    def freezes(self) -> bool:
        """Whether the prompt path is frozen, or will be before the end."""
        epochs = self.task.prompt_epochs
        return self.task.get_frozen_path() is not None or (epochs is not None and epochs < self.config.epochs)

    def train(self) -> None:
        """Put what is trained, and nothing else, into training mode."""
        self._whole.close()
        self.module.train()

    def eval(self) -> None:
        """Put everything into evaluation; weights that are sharded are whole until `train` is called."""
        self._whole.enter_context(whole_weights(self.module))
        self.module.eval()
        if self.task.has_ema():
            # It always is in evaluation, and timm's attention may have kept biases of an average that has moved on.
            forget_caches(self.task.get_trainable_module(ema=True).modules())

    def set_progress(self, epoch: int, update: int) -> None:
        """Set learning rates, and what else changes in the course of training, for the update after `update` of them.

        Args:
            epoch: Epochs completed.
            update: Updates completed.
        """
        self.task.set_progress(epoch, update, self.total_updates)
        if len(self.optimizers) > 1 and self.task.get_frozen_path() is not None:
            # Checkpoints go on having the optimizer, but nothing needs what it remembers.
            self.optimizers[1].state.clear()
            del self.optimizers[1:], self.schedulers[1:]
            self.task.trainable_module = _wrap_anew(self.accelerator, self.module)
        for scheduler in self.schedulers:
            if scheduler is not None:
                scheduler.step_update(update)

    def step(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        seed: int,
        known: TeacherLogits | None = None,
        weight: float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """Do one step: forward, backward, and (when enough gradients are added up) an update.

        Call it in `accelerator.accumulate`.

        Args:
            input: Images `[B, C, H, W]`.
            target: Class indices `[B]` or probabilities `[B, K]`.
            seed: Seed of dropout and the like: a learner that is resumed, or trained alone, draws the same numbers.
            known: Teachers' logits for this batch; read, and written where they are computed.
            weight: Weight of the loss in the update: how many times fewer micro-batches than usual it is made from.

        Returns:
            The scalars of the task's result, with the norm of each optimizer's gradient where there is an update.
        """
        torch.manual_seed(seed)
        result = self._forward(input, target, {} if known is None else known)
        self.accelerator.backward(result['loss'] if weight == 1 else weight * result['loss'])
        terms = {key: value.detach().reshape(()) for key, value in result.items() if key not in _OUTPUTS}
        if self.config.compile_mode == 'reduce-overhead':
            # What a CUDA graph returns is overwritten when it is replayed, and these are read much later.
            terms = dict(zip(terms, torch.stack([value.float() for value in terms.values()]).unbind(), strict=True))
        if not self.accelerator.sync_gradients:
            return terms
        norms = self._clip_gradients()
        self._update()
        self._share_statistics()
        return {**terms, **norms}

    def _forward(self, input: torch.Tensor, target: torch.Tensor, known: TeacherLogits) -> dict[str, torch.Tensor]:
        models = {'teacher': self.teacher, 'prompt': self.task.get_frozen_path()}
        frozen = {name: model for name, model in models.items() if model is not None}
        with self.accelerator.autocast():
            logits = {f'{name}_logits': known[model] for name, model in frozen.items() if model in known}
            result = self.task(input, target, **logits)
        for name, model in frozen.items():
            if f'{name}_output' in result:
                known[model] = result[f'{name}_output']
        return result

    def _clip_gradients(self) -> dict[str, torch.Tensor]:
        """Clip the gradients of each optimizer, and return their norms before."""
        norms, scaler = {}, self.accelerator.scaler
        for name, optimizer in zip(_GRAD_NORMS, self.optimizers, strict=False):
            parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
            if scaler is not None:
                # One by one: accelerate would unscale all optimizers for each of them.
                self.accelerator.unscale_gradients(optimizer)
            if self._sharded:
                norms[name] = clip_shards(self.accelerator, parameters, self.config.clip_grad)
                continue
            norms[name] = nn.utils.get_total_norm([p.grad for p in parameters])
            if self.config.clip_grad:
                nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad, norms[name])
        # A gradient scaler searches for the largest scale by overflowing now and then, and deals with it itself.
        return norms if scaler is None else {}

    def _update(self) -> None:
        scaler = self.accelerator.scaler
        if scaler is None:
            for optimizer in self.optimizers:
                optimizer.step()
        else:
            # accelerate changes the scale after each optimizer: the next would divide by another than was multiplied.
            for optimizer in self.optimizers:
                scaler.step(getattr(optimizer, 'optimizer', optimizer))
            scale = scaler.get_scale()
            scaler.update()
            self.overflowed = scaler.get_scale() < scale
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _share_statistics(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        # Else every process would evaluate, and average into its EMA, a student with batch statistics of its own.
        # What is frozen stays as it is to the bit, which a mean of equal numbers need not be.
        path = self.task.get_frozen_path()
        frozen = {id(buffer) for buffer in path.buffers()} if path is not None else set()
        buffers = [each for each in self.module.buffers() if each.is_floating_point() and id(each) not in frozen]
        if buffers:
            means: Any = self.accelerator.reduce(torch.cat([buffer.flatten() for buffer in buffers]), 'mean')
            for buffer, mean in zip(buffers, means.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(mean.view_as(buffer))

    def update_average(self, update: int) -> None:
        """Update the moving average, if there is one, after the update with this number."""
        if self.task.has_ema():
            with whole_weights(self.module):
                self.task.update_ema(step=update)

    def find_non_finite(self) -> str | None:
        """Return the name of a weight or buffer that is NaN or infinite; `None` if there is none."""
        module = unwrap_model(self.module)
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        tensors = {name: local_part(value.detach()) for name, value in named.items() if value.is_floating_point()}
        tensors = {name: value for name, value in tensors.items() if value.numel()}
        # A single number from the device, unless there is something to be found.
        if not tensors or nn.utils.get_total_norm(list(tensors.values()), math.inf).isfinite():
            return None
        return next((name for name, value in tensors.items() if not value.isfinite().all()), None)

    @property
    def measure(self) -> Measure:
        """What measures outputs: by the labels, or without them by what the student learns from."""
        if not self.config.unlabelled:
            return measure_logits
        return functools.partial(measure_logits, by_teacher=True) if self.task.compares_logits else measure_features

    def outputs(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what is evaluated in the course of training, for images `[B, C, H, W]`."""
        return self.outputs_with_teacher(input, {}) if self.config.unlabelled else self.task.eval_outputs(input)

    def outputs_with_teacher(self, input: torch.Tensor, known: TeacherLogits) -> dict[str, torch.Tensor]:
        """Return what the task evaluates, and the teacher's logits whatever the method, if it has the same classes.

        A student that learns features is evaluated alone, or without labels by the features.

        Args:
            input: Images `[B, C, H, W]`.
            known: Teachers' logits for this batch; read, and written where they are computed.
        """
        if isinstance(self.task, FeatureTask) and self.config.unlabelled:
            return self.task.eval_features(input)
        if self.teacher is None or not self.task.shows_teacher:
            return self.task.eval_outputs(input)
        outputs = self.task.eval_outputs(input, known.get(self.teacher))
        if 'teacher' not in outputs:
            outputs['teacher'] = self.task.teacher_logits(input)
        known[self.teacher] = outputs['teacher']
        return outputs


def _wrap_anew(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Return another DistributedDataParallel in the place of one that waits for gradients of what is frozen since."""
    if not isinstance(module, DistributedDataParallel):
        return module
    options: dict[str, Any] = {'device_ids': module.device_ids, 'output_device': module.output_device}
    if accelerator.ddp_handler is not None:
        options |= accelerator.ddp_handler.to_kwargs()
    return DistributedDataParallel(module.module, **options)


def _student_optimizer(config: TrainConfig, task: StudentTask) -> torch.optim.Optimizer:
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
    for group in task.extra_param_groups():
        optimizer.add_param_group(group)
    return optimizer


def _prompt_optimizer(config: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    groups = [{**group, 'lr': config.prompt_lr * group.get('lr_scale', 1.0)} for group in groups]
    for group in groups:
        # timm's schedules would apply it once more.
        group.pop('lr_scale', None)
    settings = {'lr': config.prompt_lr, 'weight_decay': config.prompt_weight_decay}
    return create_optimizer(config.prompt_opt, groups, config.opt_fused, **settings)
