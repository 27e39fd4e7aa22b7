"""From the options of a run to its student, its teacher and its task."""
from __future__ import annotations

import dataclasses
import functools
import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from timm.data import Mixup, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from ..hub.timm_models import ModelSource
from ..losses import DFPTWeights, KDLoss
from ..tasks.base import StudentTask
from ..tasks.methods import DEFAULT_LOSS, KD_LOSSES, METHODS
from ..teacher.blocks import PromptConfig
from ..teacher.teacher import DualForwardPathTeacher
from ..teacher.wrapping import wrap
from .options import TrainConfig

__all__ = [
    'create_criterion', 'create_mixup', 'create_student', 'create_task', 'create_teacher', 'load_prompt_path',
    'resolve_input_config', 'wrap_teacher',
]  # fmt: skip

_logger = logging.getLogger(__name__)

_NORM_LAYERS: dict[str, Literal['batchnorm2d', 'layernorm2d'] | None] = {
    'batch': 'batchnorm2d', 'layer': 'layernorm2d', 'none': None
}  # fmt: skip


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


def create_student(
    config: TrainConfig, num_classes: int, class_names: Sequence[str], input_config: Mapping[str, Any]
) -> nn.Module:
    """Create the student for these classes and inputs, its `pretrained_cfg` saying what it is trained on.

    Raises:
        ValueError: The model is unknown or cannot be built so; the message says why.
    """
    source = ModelSource(str(config.student), 'student')
    cfg, size = source.pretrained_cfg(), tuple(input_config['input_size'])
    kwargs: dict[str, Any] = {'num_classes': num_classes, 'in_chans': size[0]}
    if cfg.get('fixed_input_size') and tuple(cfg['input_size'][1:]) != size[1:]:
        kwargs['img_size'] = size[1:]
    kwargs |= config.student_kwargs
    if config.drop:
        kwargs['drop_rate'] = config.drop
    if config.drop_path is not None:
        kwargs['drop_path_rate'] = config.drop_path
    student: Any = source.create(config.student_pretrained, **kwargs)
    _check_takes(config, student, size)
    recorded = {key: input_config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}
    student.pretrained_cfg = {
        **student.pretrained_cfg,
        **recorded,
        'num_classes': num_classes,
        'label_names': list(class_names),
    }
    return student


def create_teacher(config: TrainConfig, class_names: Sequence[str]) -> nn.Module:
    """Load the teacher with its weights, and hold its classes against those of the data.

    Raises:
        ValueError: The teacher is unknown, its weights cannot be loaded, or its classes are others.
    """
    source = ModelSource(str(config.teacher), 'teacher')
    teacher: Any
    if config.teacher_checkpoint is None:
        teacher = source.create(True, **config.teacher_kwargs)
    else:
        # Without pretrained weights a head of the right size says nothing: the file must bring every tensor.
        teacher = source.create(False, **{**config.teacher_kwargs, 'num_classes': len(class_names)})
        load_checkpoint(teacher, config.teacher_checkpoint)
    if teacher.num_classes != len(class_names):
        raise ValueError(
            f'teacher {config.teacher!r} knows {teacher.num_classes} classes, the data have {len(class_names)}. '
            'Fine-tune it on these data first (--method supervised --student TEACHER --student-pretrained) and give '
            'the result as --teacher local-dir:RUN/student.'
        )
    _check_class_order(config.teacher, teacher.pretrained_cfg.get('label_names') or [], class_names)
    return teacher


def _check_class_order(teacher: str | None, known: Sequence[str], class_names: Sequence[str]) -> None:
    """Refuse a teacher that has other names for the classes, or the same in another order."""
    # Those of the data are NFC; a decomposed é of the teacher's is the same letter.
    known = [unicodedata.normalize('NFC', name) for name in known]
    if not known or known == list(class_names):
        return
    if len(known) != len(class_names):
        raise ValueError(
            f'teacher {teacher!r} has {len(known)} names for {len(class_names)} classes: repair label_names in its '
            'config.json.'
        )
    where = next(i for i, (a, b) in enumerate(zip(known, class_names, strict=True)) if a != b)
    if _are_numbers(known) != _are_numbers(class_names):
        _logger.warning(
            f'Either the teacher {teacher!r} or the data have numbers for names of the classes (class {where} is '
            f'{known[where]!r} for the teacher and {class_names[where]!r} in the data): that their order is the same '
            'is taken on trust.'
        )
        return
    raise ValueError(
        f'teacher {teacher!r} and the data name their classes differently: class {where} is {known[where]!r} for the '
        f'teacher and {class_names[where]!r} in the data. Use the data (or the class order) that the teacher was '
        'trained on.'
    )


def _are_numbers(names: Sequence[str]) -> bool:
    # What integer labels are called, here and in a student that was trained on them, and what `save_student` writes
    # where it is given none: no names of their own.
    return all(name.removeprefix('LABEL_').removeprefix('-').isdecimal() for name in names)


def load_checkpoint(model: nn.Module, path: str) -> None:
    """Load a safetensors file into `model`, strictly.

    Raises:
        ValueError: The file is missing, no safetensors, or does not fit the model.
    """
    if not path.endswith('.safetensors') or not Path(path).is_file():
        raise ValueError(
            f'teacher_checkpoint must be an existing .safetensors file, got {path!r}. Pickled checkpoints are never '
            'loaded; convert them once with torch.load(weights_only=True) and safetensors.torch.save_file.'
        )
    try:
        model.load_state_dict(load_file(path), strict=True)
    except Exception as error:
        raise ValueError(f'teacher_checkpoint {path!r} does not fit {type(model).__name__}: {error}') from error


def load_prompt_path(path: str, model: nn.Module | None = None) -> DualForwardPathTeacher:
    """Load a tuned prompt path, around `model` or the teacher that it names.

    Raises:
        ValueError: It is not there, damaged, or of another teacher.
    """
    try:
        return DualForwardPathTeacher.from_pretrained(path, model=model)
    except (OSError, ValueError) as error:
        raise ValueError(f'prompt_path={path!r} cannot be loaded: {error}') from error


def wrap_teacher(config: TrainConfig, model: nn.Module) -> DualForwardPathTeacher:
    """Give the teacher its second path, new or from `prompt_path`."""
    variant = METHODS[config.method].variant
    assert variant is not None
    if config.prompt_path:
        teacher = load_prompt_path(config.prompt_path, model)
        if teacher.variant != variant:
            raise ValueError(
                f'prompt_path {config.prompt_path!r} is of the variant {teacher.variant!r}: use --method '
                f'{teacher.variant}.'
            )
        if config.freeze_prompt_path:
            teacher.prompt_path.requires_grad_(False)
        return teacher
    stages: Any = config.prompt_stages or None
    if stages and len(stages) == 1 and stages[0].isdigit():
        stages = int(stages[0])
    try:
        prompt = PromptConfig(
            rd_ratio=config.prompt_reduction,
            partial_ratio=config.prompt_partial_ratio,
            kernel_sizes=tuple(config.prompt_kernel_sizes),
            norm_layer=_NORM_LAYERS[config.prompt_norm],
            act_layer=config.prompt_act,
            fusion=config.prompt_fusion,
            block=config.prompt_block,
            new_head=config.prompt_head,
        )
        return wrap(model, stages=stages, prompt=prompt, variant=variant, train_bn=config.prompt_train_bn)
    except ValueError as error:
        # What only the blocks and the model can check, under the names of the options.
        names = {
            'PromptConfig.kernel_sizes': 'prompt_kernel_sizes', 'PromptConfig.act_layer': 'prompt_act',
            'stages': 'prompt_stages',
        }  # fmt: skip
        message = re.sub(r'^[\w.]+|\bstages(?==)', lambda found: names.get(found[0], found[0]), str(error))
        raise ValueError(message) from error


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
    """Return timm's loss on the labels."""
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
    common |= {'temperature': config.temperature, 'input_config': input_config}
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
    names = [field.name for field in dataclasses.fields(DFPTWeights)]
    return method.task(
        student,
        teacher,
        weights=DFPTWeights(**{name: getattr(config, f'{name}_weight') for name in names}),
        student_prompt_weight_end=config.student_prompt_weight_end,
        backbone_lr_scale=config.prompt_backbone_lr_scale,
        **common,
    )


def _kd_loss(config: TrainConfig) -> KDLoss | None:
    """Return the distillation loss with its arguments; `None` for plain KD, and for a task that has its own.

    Raises:
        ValueError: If the loss does not know one of the arguments.
    """
    name = config.kd_loss if METHODS[config.method].variant else config.method
    kwargs = config.kd_loss_kwargs
    if kwargs and (name not in KD_LOSSES or name == DEFAULT_LOSS):
        raise ValueError(f'kd_loss_kwargs={kwargs}: the loss of method={config.method} takes none.')
    if name not in KD_LOSSES or name == DEFAULT_LOSS:
        return None
    loss = functools.partial(KD_LOSSES[name], **kwargs)
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    try:
        loss(logits, logits, torch.tensor([0, 1]), config.temperature)
    except (TypeError, ValueError) as error:
        raise ValueError(f'kd_loss_kwargs={kwargs} do not fit {name}: {error}') from error
    return loss


def _check_takes(config: TrainConfig, student: nn.Module, size: Sequence[int]) -> None:
    """Run the student on an empty image of the size of this run, before anything is written."""
    student.eval()
    try:
        with torch.no_grad():
            student(torch.zeros(1, *size))
    except Exception as error:
        raise ValueError(
            f'student={config.student!r} cannot take images of input_size={size}: {str(error) or type(error).__name__}.'
            ' Give another --input-size, or the arguments of the architecture that fit it.'
        ) from error
    student.train()
