"""From the options of a run to what is trained on what: data and loaders, tasks and learners."""
from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import Mixup, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from ..data.augment import AugmentConfig
from ..data.datasets import DataSplits, load_splits
from ..data.loader import create_loader, default_batch_size
from ..hub.timm_models import ModelSource
from ..job.devices import on_main
from ..job.options import TrainConfig
from ..job.path_options import FITTED_HEAD_SCALE
from ..losses import DFPTWeights, KDLoss
from ..tasks.base import NoLabels, StudentTask
from ..tasks.methods import DEFAULT_LOSS, KD_LOSSES, METHODS
from ..teacher.head_record import fitted_head_of
from ..teacher.teacher import DualForwardPathTeacher
from .learner import Learner
from .models import SharedTeachers, create_student, teacher_classes, wrap_teacher
from .teacher_heads import TeacherHeads

__all__ = [
    'augmentation_of', 'create_criterion', 'create_learners', 'create_loaders', 'create_mixup', 'create_task',
    'evaluation_loaders', 'load_data', 'resolve_input_config', 'with_batch_size',
]  # fmt: skip

_logger = logging.getLogger(__name__)

# From docs/PERFORMANCE_TABLES.md, "Where a path begins".
_SMALL_HEAD_UPDATES = 150


def create_learners(
    arms: Mapping[str, TrainConfig],
    class_names: Sequence[str],
    input_config: Mapping[str, Any],
    accelerator: Accelerator,
    steps_per_epoch: int,
    heads: TeacherHeads,
    adapt: Callable[[StudentTask, TrainConfig], None] | None = None,
) -> list[Learner]:
    """Create students, their tasks and optimizers; those with the same teacher share it.

    Args:
        arms: Options by name of the learner.
        class_names: The classes.
        input_config: What the loader gives.
        accelerator: Devices and processes.
        steps_per_epoch: Batches per epoch.
        heads: Gives teachers heads for the classes.
        adapt: Changes what a student learns from, before it is trained; called with its task and options.

    Raises:
        ValueError: If an option does not fit the data or the models.
    """
    teachers = SharedTeachers(heads, arms)
    learners = []
    for name, config in arms.items():
        teacher, config = teachers.get(name, config)
        # Seeded for each part, so that every method starts from the same student whatever was built before it.
        set_seed(config.seed)
        if teacher is not None and METHODS[config.method].variant:
            teacher = wrap_teacher(config, teacher, len(class_names))
        set_seed(config.seed)
        # What learns features alone needs no classes.
        known = METHODS[config.method].needs_classes or not config.unlabelled
        student = create_student(config, class_names if known else (), input_config)
        task = create_task(config, student, teacher, input_config, accelerator)
        if adapt is not None:
            adapt(task, config)
        updates_per_epoch = -(-steps_per_epoch // config.grad_accum_steps)
        if accelerator.is_main_process:
            _warn_of_few_updates(config, task, updates_per_epoch)
        learner = Learner(name, config, task, accelerator, updates_per_epoch)
        if config.batch_size == accelerator.num_processes:
            _refuse_batch_norm(learner)
        learners.append(learner)
    return learners


def _warn_of_few_updates(config: TrainConfig, task: StudentTask, updates_per_epoch: int) -> None:
    """Say that a prompt path whose head begins small is not tuned for long enough."""
    scale = config.prompt_head_init_scale
    if METHODS[config.method].variant is None or config.prompt_path or scale is None or scale >= FITTED_HEAD_SCALE:
        return
    updates = updates_per_epoch * (config.epochs if task.prompt_epochs is None else task.prompt_epochs)
    if updates < _SMALL_HEAD_UPDATES:
        _logger.warning(
            f'prompt_head_init_scale={scale:g}: a prompt path whose head begins so small needs about '
            f'{_SMALL_HEAD_UPDATES} updates, and is tuned for {updates}. Give --prompt-head-init-scale '
            f'{FITTED_HEAD_SCALE}, or tune it for longer (--prompt-epochs, --epochs).'
        )


def _refuse_batch_norm(learner: Learner) -> None:
    """Refuse BatchNorm in training: of one image per process it has no statistics."""
    learner.train()
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in learner.module.modules()):
        raise ValueError(
            f'batch_size={learner.config.batch_size} is one image per process, and BatchNorm needs at least 2: choose '
            'a --batch-size of at least 2 images per process.'
        )


def load_data(config: TrainConfig, accelerator: Accelerator) -> DataSplits:
    """Load and check the dataset; without labels the classes are those of the teacher.

    Every process lists the images itself, in one order; the main process reads them.

    Raises:
        ValueError: If it is not fit for training, or an option does not fit it.
    """
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
        check_images=config.check_images,
        once=lambda act: on_main(accelerator, act),
        background=config.background,
        teacher_classes=teacher_classes(config) if config.unlabelled else None,
    )


def augmentation_of(config: TrainConfig) -> AugmentConfig:
    """Return how the images are augmented in training, as the options say."""
    return AugmentConfig(
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
        jpeg_draft=config.jpeg_draft,
    )


def create_loaders(
    config: TrainConfig, data: DataSplits, input_config: Mapping[str, Any], accelerator: Accelerator
) -> dict[str, Any]:
    """Create loaders of `train`, `val`, and `test` where there are test images, prepared by `accelerator`."""
    batch_size = config.batch_size
    assert batch_size is not None
    train = create_loader(
        data.train,
        batch_size=batch_size,
        is_training=True,
        augmentation=augmentation_of(config),
        aug_cycle=config.aug_cycle,
        passes=config.epochs,
        cache_images=config.cache_images,
        **_loader_options(config, input_config, accelerator),
    )
    passes = config.epochs // config.val_interval + 2
    return {'train': accelerator.prepare(train), **evaluation_loaders(config, data, input_config, accelerator, passes)}


def evaluation_loaders(
    config: TrainConfig, data: DataSplits, input_config: Mapping[str, Any], accelerator: Accelerator, passes: int = 1
) -> dict[str, Any]:
    """Create the loaders of `create_loaders` except `train`, whose images are evaluated `passes` times on `val`."""
    options = {
        'batch_size': config.validation_batch_size or config.batch_size,
        'is_training': False,
        **_loader_options(config, input_config, accelerator),
    }
    loaders = {'val': create_loader(data.val, passes=passes, **options)}
    if data.test:
        loaders['test'] = create_loader(data.test, passes=1, **options)
    return {name: accelerator.prepare(loader) for name, loader in loaders.items()}


def _loader_options(
    config: TrainConfig, input_config: Mapping[str, Any], accelerator: Accelerator
) -> dict[str, Any]:
    return {
        'data_config': input_config,
        'seed': config.seed,
        'workers': config.workers,
        'pin_memory': accelerator.device.type == 'cuda',
    }


def resolve_input_config(config: TrainConfig) -> dict[str, Any]:
    """Return timm's data config of the run: what the options say, and for the rest what the student's does.

    Returns:
        `input_size` `(C, H, W)`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`.
    """
    pretrained_cfg = ModelSource(str(config.student), 'student').pretrained_cfg()
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')
        if (value := getattr(config, key)) not in ([], '', None)
    }
    statistics = {key: given.pop(key) for key in ('mean', 'std') if key in given}
    resolved = {**resolve_data_config(given, pretrained_cfg=pretrained_cfg), **statistics}
    channels = resolved['input_size'][0]
    for key in ('mean', 'std'):
        values = tuple(resolved[key])
        if len(values) not in (1, channels):
            if key in statistics:
                raise ValueError(f'{key}={values} must have {channels} values, one per channel of input_size.')
            # ImageNet's three values for a grey image: their average keeps the range.
            values = (sum(values) / len(values),)
        resolved[key] = values * channels if len(values) == 1 else values
    return resolved


def with_batch_size(config: TrainConfig, images: int, accelerator: Accelerator) -> TrainConfig:
    """Choose a batch size for the number of images if none is given, and print what an epoch is."""
    processes = accelerator.num_processes
    size = config.batch_size or default_batch_size(images, processes)
    if (config.mixup or config.cutmix) and size // processes % 2:
        raise ValueError(
            f'batch_size={size} is {size // processes} images per process, of which mixup and cutmix make pairs: '
            'choose an even number, or set both to 0.'
        )
    if config.batch_size is None and size < 128:
        # With SGD at the usual rate pretrained students in batches of 8 ended at chance under a teacher. It is not
        # scaled unasked, as by timm's --lr-base-scale: students from scratch learned much less in the same epochs then.
        remedy = f'; if the loss does not fall, try --lr {config.lr * size / 128:.2g}, or --opt adamw --lr 0.001'
        accelerator.print(
            f'small dataset: batch size {size} instead of 128, as --batch-size was not given; the learning rate stays '
            f'{config.lr:g}{remedy if config.opt == "sgd" else ""}'
        )
    accelerator.print(
        f'{images // size:,} steps of {size} images per epoch; {images % size} images are left out of each epoch'
    )
    return dataclasses.replace(config, batch_size=size)


def create_mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    """Return timm's mixup and cutmix if the options ask for one of them."""
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(
        config.mixup,
        config.cutmix,
        prob=config.mixup_prob,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def create_criterion(config: TrainConfig) -> nn.Module:
    """Return timm's loss on the labels, or what it is without any."""
    if config.unlabelled:
        return NoLabels()
    if config.mixup or config.cutmix:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(config.smoothing) if config.smoothing else nn.CrossEntropyLoss()


def create_task(
    config: TrainConfig,
    student: nn.Module,
    teacher: nn.Module | DualForwardPathTeacher | None,
    input_config: Mapping[str, Any],
    accelerator: Accelerator,
) -> StudentTask:
    """Create the timm task that `method` stands for.

    Args:
        config: The options.
        student: The student.
        teacher: The teacher, if the method needs one; wrapped (`wrap_teacher`) where it has a prompt path.
        input_config: What the loader gives.
        accelerator: Says where to train.
    """
    method = METHODS[config.method]
    common: dict[str, Any] = {'criterion': create_criterion(config), 'device': accelerator.device, 'verbose': False}
    if not method.needs_teacher:
        return method.task(student, **common)
    common['input_config'] = input_config
    if method.task.compares_logits:
        common['temperature'] = config.temperature
    kd_loss = _kd_loss(config)
    if kd_loss is not None:
        common['kd_loss'] = kd_loss
    if method.variant is None:
        return method.task(
            student,
            teacher,
            distill_loss_weight=config.distill_loss_weight,
            task_loss_weight=config.task_loss_weight,
            distill_warmup_epochs=config.distill_warmup_epochs,
            **common,
        )
    assert isinstance(teacher, DualForwardPathTeacher)
    head = fitted_head_of(teacher.model)
    return method.task(
        student,
        teacher,
        weights=_dfpt_weights(config),
        student_prompt_weight_end=config.student_prompt_weight_end,
        prompt_epochs=config.tuned_epochs(own_classes=head is None or head.how != 'fitted'),
        backbone_lr_scale=config.prompt_backbone_lr_scale,
        **common,
    )


def _dfpt_weights(config: TrainConfig) -> DFPTWeights:
    """Return the weights of the terms; without labels that of the teacher goes to the path of other statistics."""
    weights = DFPTWeights(**config.dfpt_weights)
    if not config.unlabelled:
        return weights
    weights = dataclasses.replace(weights, student_task=0.0, prompt_task=0.0)
    if config.differs('student_teacher_weight'):
        return weights
    heard = weights.student_prompt + weights.student_teacher
    return dataclasses.replace(weights, prompt_teacher=0.0, student_teacher=0.0, student_prompt=heard)


def _kd_loss(config: TrainConfig) -> KDLoss | None:
    """Return the distillation loss with its arguments; `None` for plain KD, and for a task that has its own.

    Raises:
        ValueError: If the loss does not know one of the arguments.
    """
    name = config.kd_loss if METHODS[config.method].variant else config.method
    kwargs = config.kd_loss_kwargs
    if kwargs and (name not in KD_LOSSES or name == DEFAULT_LOSS):
        raise ValueError(
            f'kd_loss_kwargs={kwargs}: the loss of method={config.method} takes no arguments: leave it out.'
        )
    if name not in KD_LOSSES or name == DEFAULT_LOSS:
        return None
    loss = functools.partial(KD_LOSSES[name], **kwargs)
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    try:
        loss(logits, logits, torch.tensor([0, 1]), config.temperature)
    except (TypeError, ValueError) as error:
        raise ValueError(f'kd_loss_kwargs={kwargs} do not fit {name}: {error}') from error
    return loss
