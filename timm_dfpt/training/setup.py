"""What a run needs beside what it trains: devices, data, and teachers that are loaded once."""
from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import nn

from ..data.augment import AugmentConfig
from ..data.datasets import DataSplits, load_splits
from ..data.fingerprint import dataset_fingerprint, describe_data
from ..data.loader import create_loader, default_batch_size
from ..hub.config import check_data_config, check_label_names
from ..tasks.evaluation import evaluate_together
from ..tasks.methods import METHODS
from ..version import __version__
from .build import (
    create_student,
    create_task,
    create_teacher,
    load_prompt_path,
    resolve_input_config,
    wrap_teacher,
)
from .checkpoint import describe_teachers
from .learner import Learner
from .optim import describe_decay
from .options import TrainConfig
from .sharding import refuse_deepspeed, set_up_sharding
from .teacher_cache import TeacherCache, cache_key, check_exact

__all__ = ['RunSetup']

_logger = logging.getLogger(__name__)


class RunSetup:
    """The machine, the data and the teachers of a run.

    Args:
        config: The options.
        project_dir: Where a tracker (`log_with`) writes to.

    Raises:
        ValueError: An option does not fit the data or the models.
    """

    def __init__(self, config: TrainConfig, project_dir: str) -> None:
        if config.log_with is not None and config.log_with not in map(str, get_available_trackers()):
            # accelerate would train on and log nowhere.
            raise ValueError(f'log_with={config.log_with} needs a package: pip install {config.log_with}.')
        # accelerate warns about the pinned memory of machines without an accelerator.
        warnings.filterwarnings('ignore', message='.*pin_memory.*')
        refuse_deepspeed()
        self.accelerator = Accelerator(
            cpu=config.cpu,
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.grad_accum_steps,
            log_with=config.log_with,
            project_dir=project_dir if config.log_with else None,
            dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
            # Learners share their batch statistics after each update, evaluation and EMA included.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        set_up_sharding(self.accelerator, config)
        if config.mixed_precision == 'fp16' and self.accelerator.device.type == 'cpu':
            # accelerate would compute in float32 and say nothing.
            raise ValueError('mixed_precision=fp16 needs a GPU, and this runs on the CPU: use bf16 or no.')
        if self.accelerator.num_processes == 1 and 'MASTER_PORT' in os.environ:
            # accelerate sets a port for several processes, and leaves it to MPI to start them where there is no GPU.
            _logger.warning(
                'This is the only process, though MASTER_PORT is set. Of `accelerate launch --cpu --num_processes N` '
                'one process comes: use --config_file train/accelerate/multi_cpu.yaml, or torchrun.'
            )
        set_seed(config.seed)
        self.input_config = resolve_input_config(config)
        self.data = _load_data(config)
        processes, images = self.accelerator.num_processes, len(self.data.train)
        self.batch_size = config.batch_size or default_batch_size(images, processes)
        chosen = config.batch_size is None and self.batch_size < 128
        self.config = config = dataclasses.replace(config, batch_size=self.batch_size)
        _check_batch_size(config, self.batch_size // processes)
        tested = f', {len(self.data.test):,} to test on' if self.data.test else ''
        self.accelerator.print(
            f'data: {config.dataset}: {self.data.num_classes} classes, {len(self.data.train):,} images to train on, '
            f'{len(self.data.val):,} to validate on ({self.data.val_from}){tested}'
        )
        if chosen:
            self.accelerator.print(
                f'few images: batch size {self.batch_size} instead of 128, as no --batch-size was given; the learning '
                f'rate stays {config.lr:g}'
            )
        self.accelerator.print(
            f'an epoch: {images // self.batch_size:,} steps of {self.batch_size} images; {images % self.batch_size} '
            'images are left out of each epoch'
        )
        self.loaders = _create_loaders(config, self.batch_size, self.data, self.input_config, self.accelerator)
        _check_export(self.input_config, self.data)
        self.eval_split = 'test' if 'test' in self.loaders else 'val'
        self._updates_per_epoch = -(-len(self.loaders['train']) // config.grad_accum_steps)
        decay = describe_decay(self._updates_per_epoch, config.lr, **config.schedule)
        if decay is not None and self.accelerator.is_main_process:
            _logger.warning(decay)
        self._teachers: dict[str, nn.Module] = {}

    def create_learner(self, name: str, config: TrainConfig) -> Learner:
        """Create a student, its task and its optimizers; learners with the same teacher share it.

        Args:
            name: What to call the learner.
            config: Its options.
        """
        config = dataclasses.replace(config, batch_size=self.batch_size)
        teacher = self._teacher(config)
        # Seeded for each part, so that every method starts from the same student whatever was built before it.
        set_seed(config.seed)
        if teacher is not None and METHODS[config.method].variant:
            teacher = wrap_teacher(config, teacher)
        set_seed(config.seed)
        student = create_student(config, self.data.num_classes, self.data.class_names, self.input_config)
        task = create_task(config, student, teacher, self.input_config, self.accelerator)
        learner = Learner(name, config, task, self.accelerator, self._updates_per_epoch)
        if self.batch_size == self.accelerator.num_processes:
            _refuse_batch_norm(config, learner)
        return learner

    def _teacher(self, config: TrainConfig) -> nn.Module | None:
        if not METHODS[config.method].needs_teacher:
            return None
        source = [config.teacher or config.prompt_path, config.teacher_checkpoint, config.teacher_kwargs]
        key = json.dumps([*source, config.teacher_dtype], default=str)
        if key not in self._teachers:
            if config.teacher is None:
                # The prompt path knows its teacher.
                self._teachers[key] = load_prompt_path(str(config.prompt_path)).unwrap()
            else:
                teacher = create_teacher(config, self.data.class_names)
                # Blocks, heads and students stay in float32: only what is frozen is converted.
                self._teachers[key] = teacher.to(getattr(torch, config.teacher_dtype))
        return self._teachers[key]

    def open_teacher_cache(self, learner: Learner) -> TeacherCache | None:
        """Open the logits that are kept of the learner's teacher, if the options ask for that.

        Raises:
            ValueError: They would not be those that the teacher gives in training.
        """
        config, device = self.config, self.accelerator.device
        if not config.cache_teacher:
            return None
        if self.accelerator.num_processes > 1:
            raise ValueError('cache_teacher works in one process only: leave it out, or start a single one.')
        if learner.teacher is None:
            raise ValueError(f'cache_teacher needs a teacher, and {learner.name} has none: name another method first.')
        size = tuple(self.input_config['input_size'])
        images = torch.randn(self.batch_size, *size, generator=torch.Generator().manual_seed(config.seed)).to(device)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.accelerator.autocast():
            check_exact(learner.task.teacher_logits, images)
        key = cache_key(config, learner.teacher, dataset_fingerprint(self.data.train), self.input_config, device)
        return TeacherCache(
            Path(config.teacher_cache_dir), key, len(self.data.train), self.data.num_classes, config.aug_cycle or 1
        )

    def origin(self, learners: Sequence[Learner]) -> dict[str, str]:
        """Describe data and teachers, for checkpoints; in the main process, the one that reads and writes them."""
        if not self.accelerator.is_main_process:
            return {}
        return describe_data(self.data) | describe_teachers({each.name: each.teacher for each in learners})

    def measure(self, learners: Sequence[Learner]) -> list[dict[str, dict[str, dict[str, float]]]]:
        """Evaluate learners at the end of their training, with one pass of each teacher for all that learn from it.

        Returns:
            For each learner metrics by split (`val`, and `test` where there is one) and model; see `evaluate`.
        """
        for learner in learners:
            learner.eval()
        results: list[dict[str, dict[str, dict[str, float]]]] = [{} for _ in learners]
        for split in dict.fromkeys(('val', self.eval_split)):
            forwards = [learner.outputs_with_teacher for learner in learners]
            measured = evaluate_together(forwards, self.loaders[split], self.accelerator)
            for result, metrics in zip(results, measured, strict=True):
                if 'student_ema' in metrics:
                    metrics['student_raw'] = metrics.pop('student')
                    metrics['student'] = metrics.pop('student_ema')
                result[split] = metrics
        return results

    def facts(self, command: str) -> dict[str, Any]:
        """Return what the run was, for `summary.json` and the records beside student and prompt path."""
        config, data = self.config, self.data
        sizes = {'train': len(data.train), 'val': len(data.val), 'test': len(data.test or ())}
        return {
            'method': config.method,
            'seed': config.seed,
            'command': command,
            'dataset': config.dataset,
            'dataset_sizes': sizes,
            'class_names': data.class_names,
            'epochs': config.epochs,
            'input_config': {k: list(v) if isinstance(v, tuple) else v for k, v in self.input_config.items()},
            'versions': {
                'timm_dfpt': __version__,
                'timm': timm.__version__,
                'torch': torch.__version__,
                'python': platform.python_version(),
            },
            'processes': self.accelerator.num_processes,
        }

    def example(self) -> torch.Tensor:
        """Return a batch `[B, C, H, W]` of the split that is evaluated last, to measure costs with."""
        return next(iter(self.loaders[self.eval_split]))[0]

    def close(self) -> None:
        """Finish the trackers; the processes stay together, since another run may follow in them."""
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.free_memory()


def _check_export(input_config: Mapping[str, Any], data: DataSplits) -> None:
    """Refuse what no student could be exported with, before it is trained."""
    check_data_config({key: list(value) if isinstance(value, tuple) else value for key, value in input_config.items()})
    check_label_names(data.class_names, data.num_classes)


def _check_batch_size(config: TrainConfig, share: int) -> None:
    if (config.mixup or config.cutmix) and share % 2:
        raise ValueError(
            f'batch_size={config.batch_size} is {share} images a process, of which mixup and cutmix make pairs: let '
            'that be an even number, or set both to 0.'
        )


def _refuse_batch_norm(config: TrainConfig, learner: Learner) -> None:
    """Refuse BatchNorm in training: of one image per process it has no statistics."""
    learner.train()
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in learner.module.modules()):
        raise ValueError(
            f'batch_size={config.batch_size} is one image per process, and BatchNorm needs more: choose a --batch-size '
            'of at least 2 images per process.'
        )


def _load_data(config: TrainConfig) -> DataSplits:
    return load_splits(
        str(config.dataset),
        dataset_config=config.dataset_config,
        dataset_revision=config.dataset_revision,
        train_split=config.train_split,
        val_split=config.val_split,
        test_split=config.test_split,
        input_key=config.input_key,
        target_key=config.target_key,
        val_fraction=config.val_fraction,
        seed=config.seed,
        on_bad_image=config.on_bad_image,
        background=config.background,
    )


def _create_loaders(
    config: TrainConfig,
    batch_size: int,
    data: DataSplits,
    input_config: Mapping[str, Any],
    accelerator: Accelerator,
) -> dict[str, Any]:
    augmentation = AugmentConfig(
        no_aug=config.no_aug,
        train_crop_mode=config.train_crop_mode,
        scale=tuple(config.scale) or None,
        ratio=tuple(config.ratio) or None,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter,
        aa=config.aa,
        reprob=config.reprob,
        crop_padding=config.crop_padding,
    )
    common: dict[str, Any] = {
        'data_config': input_config,
        'seed': config.seed,
        'workers': config.workers,
        'cache_images': config.cache_images,
        'pin_memory': accelerator.device.type == 'cuda',
    }
    evaluation = {
        **common,
        'batch_size': config.validation_batch_size or batch_size,
        'is_training': False,
        'cache_images': 'auto',
    }
    loaders = {
        'train': create_loader(
            data.train,
            batch_size=batch_size,
            is_training=True,
            augmentation=augmentation,
            aug_cycle=config.aug_cycle,
            **common,
        ),
        'val': create_loader(data.val, **evaluation),
    }
    if data.test:
        loaders['test'] = create_loader(data.test, **evaluation)
    return {name: accelerator.prepare(loader) for name, loader in loaders.items()}


