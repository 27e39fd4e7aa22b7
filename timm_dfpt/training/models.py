"""From the options of a run to its models: the student, and the teacher with or without a second path."""
from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from timm.data import resolve_model_data_config
from torch import nn

from ..backbone.input_size import input_size_of, set_input_size
from ..hub.errors import HubError
from ..hub.files import read_specs
from ..hub.timm_models import ModelSource, check_takes, load_weights_file
from ..job.options import TrainConfig
from ..job.path_options import path_options
from ..tasks.methods import METHODS
from ..teacher.blocks import PromptConfig
from ..teacher.statistics import own_layers
from ..teacher.teacher import DualForwardPathTeacher
from ..teacher.wrapping import wrap
from ..utils.messages import shorten
from .teacher_heads import Choice, TeacherHeads
from .teacher_precision import compute_heads_in_float32

__all__ = [
    'SharedTeachers', 'create_student', 'create_teacher', 'explain_no_statistics', 'load_prompt_path',
    'teacher_classes', 'wrap_teacher',
]  # fmt: skip

_NORM_LAYERS: dict[str, Literal['batchnorm2d', 'layernorm2d'] | None] = {
    'batch': 'batchnorm2d', 'layer': 'layernorm2d', 'none': None
}  # fmt: skip


class SharedTeachers:
    """The teachers of a run: those with the same options are one.

    Args:
        heads: Gives them heads for the classes of the data.
        arms: Options of all learners. A prompt path that one of them starts from may bring a head along, which then is
            that of its teacher for all.
    """

    def __init__(self, heads: TeacherHeads, arms: Mapping[str, TrainConfig]) -> None:
        self._heads = heads
        self._paths = {_source(arm): arm.prompt_path for arm in arms.values() if arm.prompt_path}
        self._teachers: dict[str, tuple[nn.Module, Choice]] = {}

    def get(self, name: str, config: TrainConfig) -> tuple[nn.Module | None, TrainConfig]:
        """Return the teacher that the options of a learner name, and these with the head that it has.

        Args:
            name: Name of the learner.
            config: Its options.

        Raises:
            ValueError: If the teacher cannot be loaded, or not have such a head.
        """
        method = METHODS[config.method]
        if not method.needs_teacher:
            return None, config
        if config.prompt_path and config.teacher_head in ('fit', 'new'):
            raise ValueError(
                f'teacher_head={config.teacher_head}: --prompt-path has the head that it was tuned with. Leave '
                '--teacher-head out, or start a new prompt path without --prompt-path.'
            )
        key = json.dumps([_source(config), config.teacher_head, config.teacher_head_balanced])
        if not method.variant and config.teacher_head == 'auto' and self._teachers.get(key, (None, 'own'))[1] == 'new':
            # The prompt path has a head of its own, and this method has no prompt path.
            key += ' fit'
        if not method.needs_classes and key not in self._teachers:
            key += ' whatever its classes'
        elif config.unlabelled and config.adapt_statistics and not method.variant and method.needs_classes:
            # Its statistics will change, and no original path may see that.
            key += ' with statistics of these images'
        if key not in self._teachers:
            self._teachers[key] = self._create(name, config)
        teacher, choice = self._teachers[key]
        if not method.needs_classes:
            return teacher, config
        if config.teacher_dtype != 'float32' and teacher.num_classes:
            compute_heads_in_float32(teacher)
        return teacher, dataclasses.replace(config, teacher_head='own' if choice == 'reordered' else choice)

    def _create(self, name: str, config: TrainConfig) -> tuple[nn.Module, Choice]:
        teacher: Any = None
        if config.teacher is not None:
            # Blocks, heads and students stay in float32: only what is frozen is converted.
            dtype = getattr(torch, config.teacher_dtype)
            if not METHODS[config.method].needs_classes:
                return load_teacher(config).to(dtype), 'own'
            teacher = create_teacher(config, len(self._heads.class_names)).to(dtype)
        path = self._paths.get(_source(config)) if config.teacher_head in ('auto', 'own') else None
        if path is not None:
            # The prompt path knows its teacher, and the head that it was tuned with.
            tuned = load_prompt_path(path, teacher)
            classes, teacher = tuned.prompt_path.num_classes, tuned.unwrap()
            _check_input_size(config, input_size_of(teacher))
            if METHODS[config.method].variant and teacher.num_classes != classes == len(self._heads.class_names):
                return self._heads.give(name, dataclasses.replace(config, teacher_head='new'), teacher)
        return self._heads.give(name, config, teacher)


def _source(config: TrainConfig) -> str:
    """Return what is equal for learners of one teacher, whatever head it gets."""
    named = [config.teacher or config.prompt_path, config.teacher_checkpoint, config.teacher_kwargs]
    return json.dumps([*named, config.teacher_dtype, config.teacher_input_size], default=str)


def teacher_classes(config: TrainConfig) -> list[str]:
    """Return the names of the classes that the teacher knows, `LABEL_0` and so on where it has none; see `unlabelled`.

    Raises:
        ValueError: If the teacher cannot be found.
    """
    if config.teacher is None:
        path = load_prompt_path(str(config.prompt_path))
        cfg, count = getattr(path.model, 'pretrained_cfg', {}), path.prompt_path.num_classes
    else:
        cfg = ModelSource(config.teacher, 'teacher').pretrained_cfg()
        count = config.teacher_kwargs.get('num_classes', cfg.get('num_classes', 0))
    names = cfg.get('label_names') or ()
    return list(names) if len(names) == count else [f'LABEL_{i}' for i in range(count)]


def create_student(config: TrainConfig, class_names: Sequence[str], input_config: Mapping[str, Any]) -> nn.Module:
    """Create the student for these classes and inputs, its `pretrained_cfg` saying what it is trained on.

    Raises:
        ValueError: If the model is unknown or cannot be built so; the message says why.
    """
    source = ModelSource(str(config.student), 'student')
    cfg, size = source.pretrained_cfg(), tuple(input_config['input_size'])
    kwargs: dict[str, Any] = {'num_classes': len(class_names), 'in_chans': size[0]}
    if cfg.get('fixed_input_size') and tuple(cfg['input_size'][1:]) != size[1:]:
        kwargs['img_size'] = size[1:]
    kwargs |= config.student_kwargs
    if config.drop:
        kwargs['drop_rate'] = config.drop
    if config.drop_path is not None:
        kwargs['drop_path_rate'] = config.drop_path
    student: Any = source.create_student(config.student_pretrained, config.head_init_scale, **kwargs)
    check_takes(student, size, _label('student', config), len(class_names) or None)
    recorded = {key: input_config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}
    student.pretrained_cfg = {
        **student.pretrained_cfg,
        **recorded,
        'num_classes': len(class_names),
        'label_names': list(class_names),
    }
    return student


def create_teacher(config: TrainConfig, num_classes: int) -> nn.Module:
    """Load the teacher with its weights and its own classifier, if it has one.

    Args:
        config: The options.
        num_classes: Number of classes of the data, for a file of weights that does not say how many it has.

    Raises:
        ValueError: If the teacher is unknown or its weights cannot be loaded.
    """
    if config.unlabelled and not num_classes:
        raise ValueError(
            f'teacher {config.teacher!r} has no classes, and without labels a head cannot be fitted: leave '
            '--unlabelled out, or choose a method that distills features (--method feature).'
        )
    teacher: Any = load_teacher(config, num_classes)
    if 'num_classes' in config.teacher_kwargs and not teacher.num_classes:
        raise ValueError(
            'teacher_kwargs: num_classes=0 would remove the head of the teacher: leave it out, and choose the head '
            'with --teacher-head.'
        )
    if teacher.num_classes:
        size = tuple(resolve_model_data_config(teacher)['input_size'])
        check_takes(teacher, size, _label('teacher', config), teacher.num_classes)
    return teacher


def load_teacher(config: TrainConfig, num_classes: int | None = None) -> nn.Module:
    """Load the teacher with its weights, for images of the size that it is to see.

    Args:
        config: The options.
        num_classes: Number of classes of weights in a file of their own that does not say it.

    Raises:
        ValueError: If the teacher is unknown, or its weights cannot be loaded.
    """
    source = ModelSource(str(config.teacher), 'teacher')
    if config.teacher_checkpoint is None:
        teacher = source.create_teacher(**config.teacher_kwargs)
    else:
        classes = _classes_in_file(config.teacher_checkpoint, source) or num_classes
        known = config.teacher_kwargs.get('num_classes', classes)
        if known != classes:
            raise ValueError(f'teacher_kwargs: num_classes={known}, but the weights have {classes}: leave it out.')
        # Without pretrained weights a head of the right size says nothing: the file must bring every tensor.
        given = {} if known is None else {'num_classes': known}
        teacher = source.create(False, **{**config.teacher_kwargs, **given})
        load_weights_file(teacher, config.teacher_checkpoint, 'teacher_checkpoint')
    if config.teacher_size:
        try:
            # What is resampled must not depend on whether it was converted before, as where it is loaded again.
            set_input_size(teacher.to(getattr(torch, config.teacher_dtype)), config.teacher_size)
        except ValueError as error:
            raise ValueError(f'teacher_input_size={config.teacher_input_size}: {error}') from error
    return teacher


def _classes_in_file(path: str, source: ModelSource) -> int | None:
    """Return the number of classes in a file of weights; `None` if it is no such file, or has no classifier."""
    names = source.pretrained_cfg().get('classifier') or ()
    if not path.endswith('.safetensors') or not Path(path).is_file():
        return None
    try:
        found = read_specs(Path(path))
    except ValueError:
        # Loading it says what is wrong.
        return None
    for name in [names] if isinstance(names, str) else names:
        if f'{name}.weight' in found:
            return found[f'{name}.weight'][0][0]
    return None


def _label(option: str, config: TrainConfig) -> str:
    kwargs = getattr(config, f'{option}_kwargs')
    given = f' with {option}_kwargs={shorten(kwargs)}' if kwargs else ''
    return f'{option}={getattr(config, option)!r}{given}'


def load_prompt_path(path: str, model: nn.Module | None = None) -> DualForwardPathTeacher:
    """Load a tuned prompt path, around `model` or the teacher that it names.

    Raises:
        ValueError: If it is missing, damaged, or of another teacher.
    """
    try:
        return DualForwardPathTeacher.from_pretrained(path, model=model)
    except (OSError, ValueError) as error:
        here = ' One that you have is loaded from its folder.' if isinstance(error, HubError) else ''
        raise ValueError(f'prompt_path={path!r} cannot be loaded: {error}{here}') from error


def _check_input_size(config: TrainConfig, size: tuple[int, int] | None) -> None:
    """Refuse a prompt path that was tuned at another input size of the teacher than the options say."""
    if size != config.teacher_size:
        own = '' if size is None else f'give --teacher-input-size {size[0]} {size[1]}'
        raise ValueError(
            f'prompt_path={config.prompt_path!r} was tuned with the teacher at {size or "its own input size"}, not at '
            f'{config.teacher_size or "its own"}: {own or "leave --teacher-input-size out"}.'
        )


def explain_no_statistics(config: TrainConfig) -> str:
    """Say why a prompt path of a teacher without BatchNorm is refused where there are no labels."""
    return (
        f'unlabelled: {config.teacher!r} has no BatchNorm, whose statistics are all that a prompt path can learn '
        'without labels: it would only repeat the teacher. Choose a plain distillation method, such as --method kd.'
    )


def wrap_teacher(config: TrainConfig, model: nn.Module, num_classes: int) -> DualForwardPathTeacher:
    """Give the teacher its second path, new or from `prompt_path`."""
    variant = METHODS[config.method].variant
    assert variant is not None
    if config.prompt_path:
        teacher = load_prompt_path(config.prompt_path, model)
        if teacher.model is not model:
            _check_input_size(config, input_size_of(teacher.model))
        if teacher.variant != variant:
            raise ValueError(
                f'prompt_path {config.prompt_path!r} has the variant {teacher.variant!r}: use --method '
                f'{teacher.variant}.'
            )
        return teacher
    stages: Any = config.prompt_stages or None
    path = path_options(config)
    if stages and len(stages) == 1 and stages[0].isdigit():
        stages = int(stages[0])
    try:
        prompt = PromptConfig(
            rd_ratio=config.prompt_reduction,
            partial_ratio=config.prompt_partial_ratio,
            kernel_sizes=tuple(config.prompt_kernel_sizes),
            norm_layer=_NORM_LAYERS[config.prompt_norm],
            act_layer=config.prompt_act,
            fusion=path.fusion,
            block=path.block,
            new_head=config.prompt_head,
            norms=path.norms,
            fusion_rank=config.prompt_fusion_rank,
            head_rank=config.prompt_head_rank,
        )
        if config.unlabelled and config.tuned_epochs() == 0:
            if not own_layers(model):
                raise ValueError(explain_no_statistics(config))
            # What is not tuned does nothing, and is neither run nor saved.
            prompt = dataclasses.replace(
                prompt, block=False, fusion='none', fusion_rank=None, new_head=False, head_rank=None
            )
        new = num_classes if config.teacher_head == 'new' else None
        teacher = wrap(model, stages=stages, num_classes=new, prompt=prompt, variant=variant)
        if path.head_init_scale != 1:
            teacher.prompt_path.scale_head(path.head_init_scale)
        return teacher
    except ValueError as error:
        # What only the blocks and the model can check, under the names of the options.
        names = {
            'PromptConfig.kernel_sizes': 'prompt_kernel_sizes', 'PromptConfig.act_layer': 'prompt_act',
            'stages': 'prompt_stages', 'norms': 'prompt_norms', 'block': 'prompt_block', 'fusion': 'prompt_fusion',
            'new_head': 'prompt_head', 'variant': 'method', 'fusion_rank': 'prompt_fusion_rank',
            'head_rank': 'prompt_head_rank', 'PromptConfig.fusion_rank': 'prompt_fusion_rank',
            'PromptConfig.head_rank': 'prompt_head_rank',
        }  # fmt: skip
        options = r'^[\w.]+|\b(stages|norms|block|fusion|new_head|variant|fusion_rank|head_rank)(?==)'
        message = re.sub(options, lambda found: names.get(found[0], found[0]), str(error))
        raise ValueError(message) from error
