"""The options of a training run, checked: which of them go together, and which have an effect."""
from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..data.checks import checked, default_of
from ..data.images import parse_color
from ..hub.config import check_arg_names
from ..hub.licenses import License
from ..hub.privacy import public
from ..hub.sources import canonical, resolve_path
from ..losses import DFPTWeights
from ..tasks.methods import METHODS
from ..utils.messages import shorten
from .effects import refuse_unused
from .optim import SCHEDULE_OPTIONS, check_optimizer, check_schedule, check_used
from .option_table import Options

__all__ = ['PATH_OPTIONS', 'TrainConfig', 'public_options', 'resolve_paths']

# What the student of a method with a prompt path learns from; not used by others, as is all that is called prompt_*.
_DUAL_STUDENT_WEIGHTS = ('student_task_weight', 'student_teacher_weight', 'student_prompt_weight')
# How images are changed in training, except mixup and cutmix, which work on batches.
_AUGMENTATIONS = (
    'train_crop_mode', 'crop_padding', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'aa', 'reprob'
)  # fmt: skip
# What applies to a prompt path that is not tuned.
_NOT_TUNED = ('prompt_path', 'prompt_epochs', 'prompt_norms', 'prompt_stages')
PATH_OPTIONS = ('dataset', 'teacher', 'teacher_checkpoint', 'student', 'prompt_path', 'output')


@dataclasses.dataclass
class TrainConfig(Options):
    """The options of `train/distill.py`, checked: each by itself, and those that have to go together.

    Raises:
        ValueError: If a value is out of range or contradicts another; the message names the option and the remedy.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, checked(TrainConfig, field, getattr(self, field.name)))
        for key in ('teacher', 'student', 'prompt_path', 'dataset'):
            setattr(self, key, canonical(key, getattr(self, key)))
        # As in a recipe, so that the saved options mean the same wherever they are read.
        vars(self).update(resolve_paths({key: getattr(self, key) for key in PATH_OPTIONS}, Path()))
        if self.background is not None:
            # One way of writing it, for resuming and for the code of model cards.
            self.background = '#{:02x}{:02x}{:02x}'.format(*parse_color(self.background))
        self._check_limits()
        self._check_combinations()

    def _check_limits(self) -> None:
        """Check options that limit each other."""
        limits = {
            'warmup_epochs': (self.warmup_epochs <= self.epochs, f'at most epochs={self.epochs}'),
            'min_lr': (self.min_lr <= self.lr, f'at most lr={self.lr:g}'),
            'export_epochs': (max(self.export_epochs, default=0) <= self.epochs, f'at most epochs={self.epochs}'),
            'input_size': (len(self.input_size) in (0, 3), 'C H W, such as 3 224 224'),
            'teacher_input_size': (len(self.teacher_input_size) <= 2, 'a side or H W, such as 224 or 224 320'),
        }
        for name, (fits, allowed) in limits.items():
            if not fits:
                raise ValueError(f'{name} must be {allowed}, got {shorten(getattr(self, name))}.')
        self.tuned_epochs()
        check_schedule(**self.schedule)
        how, prompt_decay = (self.opt_fused, self.cpu), self.prompt_weight_decay
        check_optimizer('opt', self.opt, *how, lr=self.lr, weight_decay=self.weight_decay, momentum=self.momentum)
        check_optimizer('prompt_opt', self.prompt_opt, *how, lr=self.prompt_lr, weight_decay=prompt_decay)

    def tuned_epochs(self, own_classes: bool = True) -> int:
        """Return the number of epochs in which the prompt path is tuned: `prompt_epochs`, or what that is by default.

        Args:
            own_classes: Whether the teacher's classes are those of the data, and its head was made for them.

        Raises:
            ValueError: If it is not a number, or out of range.
        """
        if self.freeze_prompt_path:
            return 0
        weights = self.dfpt_weights
        adapts = not own_classes or not (weights['prompt_teacher'] or weights['student_teacher'])
        # Without labels the path is what its statistics make of it.
        text = self.prompt_epochs or ('0' if self.unlabelled else '25%' if adapts else 'all')
        if text == 'all':
            return self.epochs
        found = re.fullmatch(r'([0-9]+)|([0-9]+(?:\.[0-9]+)?)%', text)
        # Exact: 7% of 100 epochs are 7 of them. A part of an epoch is rounded up.
        count = math.ceil(Fraction(found[1] or Fraction(found[2]) * self.epochs / 100)) if found else -1
        if not 0 <= count <= self.epochs:
            raise ValueError(
                f'prompt_epochs must be a number of epochs up to epochs={self.epochs}, a share of them such as 25%, or '
                f'all, got {shorten(text)}.'
            )
        return count

    @property
    def teacher_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the teacher sees, `None` for its default."""
        size = self.teacher_input_size
        return (size[0], size[-1]) if size else None

    @property
    def dfpt_weights(self) -> dict[str, float]:
        """The weights of DFPT-KD's terms, by the names of `DFPTWeights`: a and c are 0 with a new head."""
        default = 0.0 if self.teacher_head == 'new' else 1.0
        given = {field.name: getattr(self, f'{field.name}_weight') for field in dataclasses.fields(DFPTWeights)}
        return {name: default if value is None else value for name, value in given.items()}

    @property
    def schedule(self) -> dict[str, Any]:
        """The options of the learning rate schedule, as `create_scheduler` takes them."""
        return {name: getattr(self, name) for name in SCHEDULE_OPTIONS}

    def _check_combinations(self) -> None:
        if self.student is None:
            raise ValueError('student is not given: name a timm model, such as --student resnet18.')
        if self.dataset is None:
            raise ValueError(
                'dataset is not given: name a folder of class folders, a parquet file or a dataset on the Hub with '
                '--dataset.'
            )
        method = METHODS[self.method]
        if not method.needs_teacher:
            if self.teacher is not None:
                raise ValueError(
                    f'method={self.method} trains without a teacher: leave --teacher out, or choose a --method that '
                    'has one.'
                )
            if self.teacher_input_size:
                raise ValueError(
                    f'teacher_input_size={self.teacher_input_size} needs a teacher: leave it out, since '
                    f'method={self.method} trains without one.'
                )
            if self.baselines:
                raise ValueError(
                    f'baselines={self.baselines} need a teacher: choose a --method that has one, not {self.method}.'
                )
        elif self.teacher is None and self.prompt_path is None:
            raise ValueError(f'method={self.method} needs a teacher: name one with --teacher.')
        self._check_teacher_head()
        if method.variant and self.prompt_head_init_scale not in (None, 1) and not self.prompt_path:
            self._check_prompt_head_init_scale()
        if self.teacher_checkpoint and self.teacher is None:
            raise ValueError(
                f'teacher_checkpoint={self.teacher_checkpoint!r} has the weights of --teacher, which is not given: '
                f'name it, or leave --teacher-checkpoint out (method={self.method}).'
            )
        License.given(vars(self))
        self._check_weights()
        self._check_kwargs()
        if not method.variant and (self.prompt_path or self.push_prompt_path or self.freeze_prompt_path):
            raise ValueError(
                f'prompt_path options need a prompt path, which method={self.method} does not have: leave them out, '
                'or choose --method dfpt.'
            )
        if self.method in self.baselines or len(set(self.baselines)) != len(self.baselines):
            raise ValueError(f'baselines={self.baselines} names a method twice (method={self.method}): name each once.')
        if self.freeze_prompt_path and self.prompt_epochs not in (None, '0'):
            raise ValueError(
                f'freeze_prompt_path and prompt_epochs={self.prompt_epochs} contradict each other: give one of them.'
            )
        adapted = self.unlabelled and self.adapt_statistics
        if method.variant and self.tuned_epochs() == 0 and not (self.prompt_path or adapted):
            if self.unlabelled:
                raise ValueError(
                    'adapt_statistics=False: without labels a new prompt path learns only BatchNorm statistics. Leave '
                    'it out, or name a tuned path with --prompt-path.'
                )
            option = 'freeze_prompt_path' if self.freeze_prompt_path else f'prompt_epochs={self.prompt_epochs}'
            raise ValueError(f'{option} needs a tuned prompt path to start from: name it with --prompt-path.')
        used = (self.method, *self.baselines, *([self.kd_loss] if method.variant else []))
        hard = [name for name in used if METHODS[name].needs_hard_labels]
        if self.unlabelled:
            self._check_unlabelled([name for name in used if not METHODS[name].needs_teacher] or hard)
        if (self.mixup or self.cutmix) and hard:
            raise ValueError(f'{hard[0]} needs class indices and cannot be used with mixup or cutmix: set both to 0.')
        for name, options in self.method_options.items():
            known = [field.name for field in dataclasses.fields(self)]
            if name not in METHODS or not isinstance(options, dict) or not set(options) <= set(known):
                raise ValueError(
                    f'method_options: {shorten(name)}={shorten(options)} must be a method of {", ".join(METHODS)} with '
                    'a mapping of options, such as {dkd: {temperature: 4.0}}.'
                )
        if self.cache_teacher:
            self._check_cache()
        if self.include_preprocessing and not self.export:
            raise ValueError(
                'include_preprocessing=True has no effect without exported files: leave it out, or give --export onnx.'
            )
        if self.compile_mode != 'default' and not self.compile:
            raise ValueError(f'compile_mode={self.compile_mode} is of compiled steps: add --compile, or leave it out.')
        if self.train_crop_mode and self.crop_padding:
            raise ValueError('train_crop_mode and crop_padding contradict each other: give one of them.')
        if self.no_aug:
            _refuse_augmentation({name: getattr(self, name) for name in _AUGMENTATIONS if self.differs(name)})

    def differs(self, name: str) -> bool:
        """Say whether an option differs from its default."""
        return bool(getattr(self, name) != default_of(self.__dataclass_fields__[name]))

    def _check_teacher_head(self) -> None:
        method, head = METHODS[self.method], self.teacher_head
        if head != 'auto' and not method.needs_teacher:
            raise ValueError(
                f'teacher_head={head} has no effect with method={self.method}, which trains without a teacher: leave '
                'it out.'
            )
        if self.unlabelled and head in ('fit', 'new'):
            raise ValueError(
                f'teacher_head={head}: a new head learns from labels, and there are none: leave it or --unlabelled out.'
            )
        if self.teacher_head_balanced and head in ('own', 'new'):
            raise ValueError(
                f'teacher_head_balanced=True has no effect with teacher_head={head}, which fits no head: leave it out.'
            )
        if head != 'new':
            return
        if not method.variant:
            raise ValueError(
                f'teacher_head=new is a head for the prompt path alone, which method={self.method} does not have: its '
                'student would not learn from the teacher. Give the teacher a head with --teacher-head fit.'
            )
        if self.prompt_head_rank is not None:
            raise ValueError(
                f'prompt_head_rank={self.prompt_head_rank} corrects the head that the teacher has, and '
                'teacher_head=new gives the prompt path another: leave one of them out.'
            )
        for name in ('prompt_teacher_weight', 'student_teacher_weight'):
            if getattr(self, name):
                raise ValueError(
                    f'{name}={getattr(self, name):g}: with teacher_head=new the teacher has no logits for these '
                    'classes, so a and c are 0. Leave it out, or give the teacher a head with --teacher-head fit.'
                )

    def _check_prompt_head_init_scale(self) -> None:
        given = f'prompt_head_init_scale={self.prompt_head_init_scale:g}'
        if self.unlabelled:
            raise ValueError(f'{given}: a head that begins anew learns from labels, and there are none. Leave it at 1.')
        if not self.prompt_head or self.prompt_head_rank is not None:
            other = 'prompt_head=False' if not self.prompt_head else f'prompt_head_rank={self.prompt_head_rank}'
            raise ValueError(f'{given} is of a head of its own, and {other} keeps that of the teacher. Leave it at 1.')
        if self.teacher_head == 'new' and self.prompt_head_init_scale:
            raise ValueError(f'{given}: with teacher_head=new the head begins with zeros. Leave one of them out.')

    def _check_weights(self) -> None:
        """Refuse a student that has nothing to learn from."""
        method = METHODS[self.method]
        if not method.needs_teacher:
            return
        dual = method.variant is not None
        names = _DUAL_STUDENT_WEIGHTS if dual else ('task_loss_weight', 'distill_loss_weight')
        grows = dual and self.student_prompt_weight_end
        weights = {f'{name}_weight': value for name, value in self.dfpt_weights.items()}
        if not any(weights.get(name, getattr(self, name)) for name in names) and not grows:
            raise ValueError(f'{", ".join(names)} are all 0: the student has nothing to learn from. Raise one of them.')

    def _check_unlabelled(self, needing: Sequence[str]) -> None:
        if needing:
            raise ValueError(f'{needing[0]} learns from labels and cannot be used with --unlabelled: leave one out.')
        method = METHODS[self.method]
        given = self.dfpt_weights
        weights = (given['student_prompt'], given['student_teacher'], self.student_prompt_weight_end)
        if not (any(weights) if method.variant else self.distill_loss_weight):
            raise ValueError(
                'unlabelled: the student learns from the teacher only, and the weights of its terms are all 0: raise '
                'one of them.'
            )

        if not method.variant or self.prompt_path:
            return
        if self.prompt_norms == 'teacher':
            raise ValueError(
                'prompt_norms=teacher: without labels a new prompt path learns only its own BatchNorm statistics. '
                'Leave it out, or choose --method kd.'
            )
        if method.variant and not method.copies_backbone and self.teacher_dtype != 'float32':
            raise ValueError(
                f'teacher_dtype={self.teacher_dtype}: without labels the prompt path of dfpt has its own norm layers, '
                'which are in float32. Leave it out, or choose --method dfpt+ or kd.'
            )

    def _check_kwargs(self) -> None:
        sources = {
            'num_classes': 'the number of classes of the data: leave it out',
            'in_chans': 'the channels of input_size: leave it out, and give --input-size C H W',
        }
        for name in sources.keys() & self.student_kwargs:
            value = self.student_kwargs[name]
            raise ValueError(f'student_kwargs: {name}={shorten(value)} would be overridden by {sources[name]}.')
        for option in ('student_kwargs', 'teacher_kwargs'):
            check_arg_names(option, getattr(self, option))

    def _check_cache(self) -> None:
        if not METHODS[self.method].needs_teacher:
            raise ValueError(
                f'cache_teacher needs a teacher, which method={self.method} does not have: leave it out, or choose '
                'another --method.'
            )
        if not METHODS[self.method].needs_classes:
            raise ValueError(f'cache_teacher stores logits, but method={self.method} distills features: leave it out.')
        if self.mixup or self.cutmix:
            raise ValueError(
                'cache_teacher stores logits of single images, which mixup and cutmix blend: set both to 0.'
            )
        if not (self.no_aug or self.aug_cycle):
            raise ValueError(
                'cache_teacher needs the same images again, but each epoch has a new augmentation: repeat it after N '
                'epochs with --aug-cycle N, or switch it off with --no-aug.'
            )

    def check_given(self, given: Mapping[str, Any], methods: Sequence[str] = ()) -> None:
        """Refuse what is given on the command line and would have no effect.

        A recipe may have options that only some of its methods use.

        Args:
            given: The options that were given.
            methods: What is trained; by default `method` and the baselines.

        Raises:
            ValueError: If one of them has no effect.
        """
        if self.no_aug:
            _refuse_augmentation({name: given[name] for name in _AUGMENTATIONS if name in given})
        for name in filter(self.differs, given):
            check_used(name, getattr(self, name), self.opt, self.sched, self.warmup_epochs)
        labels = ('task_loss_weight', 'student_task_weight', 'prompt_task_weight', 'smoothing')
        for name in filter(self.differs, given):
            if (self.unlabelled and name in labels) or (name == 'adapt_statistics' and not self.unlabelled):
                raise ValueError(
                    f'{name}={getattr(self, name)!r} has no effect {"with" if self.unlabelled else "without"} '
                    '--unlabelled: leave it out.'
                )
        if self.unlabelled and not self.prompt_path and self.tuned_epochs() == 0:
            for name in filter(self.differs, given):
                if name.startswith('prompt_') and name not in _NOT_TUNED and getattr(self, name) not in (False, 'none'):
                    raise ValueError(
                        f'{name}={getattr(self, name)!r} has no effect with --unlabelled, where the prompt path is '
                        'not tuned: leave it out, or give --prompt-epochs.'
                    )
        methods = methods or (self.method, *self.baselines)
        if any(name in METHODS and METHODS[name].variant for name in methods):
            refuse_unused(self, [*filter(self.differs, given)], methods)
            return
        for name in given:
            dual_only = name == 'kd_loss' or name.startswith(('prompt_', *_DUAL_STUDENT_WEIGHTS))
            if dual_only and self.differs(name):
                raise ValueError(
                    f'{name}={getattr(self, name)!r} has no effect with method={", ".join(methods)}: it is an option '
                    'of dfpt and dfpt+. Leave it out, or choose --method dfpt.'
                )
        refuse_unused(self, [*filter(self.differs, given)], methods)

    def for_method(self, method: str, **changes: Any) -> TrainConfig:
        """Return these options for another method: with that method's own, and without what it does not use.

        Args:
            method: One of `timm_dfpt.tasks.methods.METHODS`.
            **changes: Further options to change; they win over the method's own.

        Raises:
            ValueError: If the options do not fit the method.
        """
        dropped: dict[str, Any] = {'baselines': []}
        if method != self.method:
            # They are arguments of one loss, which others do not know.
            dropped['kd_loss_kwargs'] = {}
        # Another name than those of the table is refused by the checks of the result.
        known = METHODS.get(method, METHODS[self.method])
        if not known.needs_teacher:
            dropped |= {'teacher': None, 'teacher_checkpoint': None, 'teacher_input_size': [], 'cache_teacher': False}
            dropped |= {'teacher_head': 'auto', 'teacher_head_balanced': False}
        if not known.variant:
            dropped |= {'prompt_path': None, 'push_prompt_path': None, 'freeze_prompt_path': False}
        own = self.method_options.get(method, {})
        return dataclasses.replace(self, **{'method': method, **dropped, **own, **changes})


def _refuse_augmentation(options: Mapping[str, Any]) -> None:
    """Refuse options of augmentation that contradict `no_aug`: those that are not off."""
    for name, value in options.items():
        if value:
            raise ValueError(f'no_aug and {name}={value} contradict each other: give one of them.')


def public_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options as they may be published: only the last part of local paths is kept."""
    options: dict[str, Any] = public(dataclasses.asdict(config), local=True)
    return {**options, 'output': None}


def resolve_paths(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return options whose relative paths, those with dots, start at the working directory instead of `folder`."""
    resolved = dict(values)
    for key in PATH_OPTIONS:
        value = values.get(key)
        if not isinstance(value, str):
            continue
        # There a folder needs its prefix: without the dots it would be the name of an architecture.
        resolved[key] = resolve_path(value, folder, bare=key not in ('teacher', 'student'), missing=key == 'output')
    return resolved
