"""The options of a training run: their types, choices and ranges, and which of them go together."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..data.checks import checked, default_of
from ..data.images import parse_color
from ..hub.config import check_arg_names
from ..hub.privacy import public
from ..hub.sources import canonical, resolve_path
from ..tasks.methods import DEFAULT_LOSS, DEFAULT_METHOD, KD_LOSSES, METHODS
from ..utils.messages import shorten
from .optim import SCHEDULE_OPTIONS, SCHEDULES, check_optimizer, check_schedule, check_used

__all__ = ['PATH_OPTIONS', 'TrainConfig', 'public_options', 'resolve_paths']

# What the student of a method with a prompt path learns from; of no use to others, as is all that is called prompt_*.
_DUAL_STUDENT_WEIGHTS = ('student_task_weight', 'student_teacher_weight', 'student_prompt_weight')
# How images are changed in training, but for mixup and cutmix, which are of batches.
_AUGMENTATIONS = (
    'train_crop_mode', 'crop_padding', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'aa', 'reprob'
)  # fmt: skip
PATH_OPTIONS = ('dataset', 'teacher', 'teacher_checkpoint', 'student', 'prompt_path', 'output')
_Interpolation = Literal['', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos']


def _opt(default: Any, help: str, group: str, **more: Any) -> Any:
    """Describe an option.

    Args:
        default: Its default.
        help: What it is.
        group: Its group in the help.
        **more: Limits and `choices`, see `checked`; `unset`: what an empty default stands for; `recipe_only`.
    """
    metadata = {'help': help, 'group': group, **more}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class TrainConfig:
    """Every option of `train/distill.py`, named as in timm's `train.py` where timm has it.

    Raises:
        ValueError: If a value is out of range or contradicts another; the message names the option and the remedy.
    """

    # --- method
    method: str = _opt(DEFAULT_METHOD, 'what the student is trained with', 'method', choices=METHODS)
    temperature: float = _opt(4.0, 'softmax temperature T of every distillation term', 'method', above=0)
    kd_loss: str = _opt(
        DEFAULT_LOSS, 'distillation loss of the four terms of dfpt and dfpt+', 'method', choices=KD_LOSSES
    )
    task_loss_weight: float = _opt(1.0, 'weight of the labels in a plain distillation method', 'method', low=0)
    distill_loss_weight: float = _opt(2.0, 'weight of the teacher in a plain method (c + d)', 'method', low=0)
    distill_warmup_epochs: int = _opt(
        0, 'epochs over which the weight of the teacher grows to its full size in a plain method', 'method', low=0
    )
    kd_loss_kwargs: dict[str, Any] = _opt({}, 'key=value arguments of the loss, such as beta=2 of dkd', 'method')
    student_task_weight: float = _opt(1.0, 'dfpt: weight of the labels for the student', 'method', low=0)
    prompt_task_weight: float = _opt(1.0, 'dfpt: weight of the labels for the prompt path', 'method', low=0)
    prompt_teacher_weight: float = _opt(1.0, 'dfpt: a, prompt path learns from teacher', 'method', low=0)
    prompt_student_weight: float = _opt(0.25, 'dfpt: b, prompt path learns from student', 'method', low=0)
    student_teacher_weight: float = _opt(1.0, 'dfpt: c, student learns from teacher', 'method', low=0)
    student_prompt_weight: float = _opt(1.0, 'dfpt: d, student learns from prompt path', 'method', low=0)
    student_prompt_weight_end: float | None = _opt(
        None, 'dfpt: final value of d, linear from --student-prompt-weight', 'method', low=0, unset='constant'
    )
    baselines: list[str] = _opt([], 'methods to train alongside, on the same batches', 'method', choices=METHODS)
    method_options: dict[str, Any] = _opt(
        {}, 'options that apply to one method: {dkd: {temperature: 4}} (in recipes only)', 'method', recipe_only=True
    )
    # --- models
    teacher: str | None = _opt(None, 'timm name, hf-hub:user/name or local-dir:folder of the teacher', 'models')
    teacher_checkpoint: str | None = _opt(None, 'safetensors file with weights for --teacher', 'models')
    teacher_kwargs: dict[str, Any] = _opt({}, 'key=value arguments of the teacher architecture', 'models')
    teacher_dtype: Literal['float32', 'bfloat16'] = _opt('float32', 'dtype of the frozen weights', 'models')
    cache_teacher: bool = _opt(False, 'compute the teacher logits once; needs --aug-cycle or --no-aug', 'models')
    teacher_cache_dir: str = _opt('output/teacher-cache', 'where these logits are kept, for later runs too', 'models')
    student: str | None = _opt(None, 'timm name, hf-hub:user/name or local-dir:folder of the student', 'models')
    student_pretrained: bool = _opt(False, 'start the student from its pretrained weights', 'models')
    student_kwargs: dict[str, Any] = _opt({}, 'key=value arguments of the student architecture', 'models')
    drop: float = _opt(0.0, 'dropout rate of the student', 'models', low=0, below=1)
    drop_path: float | None = _opt(
        None, 'stochastic depth rate of the student', 'models', low=0, below=1, unset="the model's own"
    )
    # --- prompt path
    prompt_path: str | None = _opt(None, 'start from a published prompt path: Hub id or folder', 'prompt path')
    freeze_prompt_path: bool = _opt(False, 'use --prompt-path as it is instead of tuning it on', 'prompt path')
    prompt_stages: list[str] = _opt([], 'number of stages, or the modules that end one', 'prompt path')
    prompt_reduction: float = _opt(2.0, 'r1: blocks work on channels / r1', 'prompt path', above=0, high=1024)
    prompt_partial_ratio: float = _opt(
        0.5, 'r2: share of channels a partial convolution convolves', 'prompt path', above=0, high=1
    )
    prompt_kernel_sizes: list[int] = _opt([1, 3, 5], 'kernel sizes of the partial convolutions', 'prompt path', low=1)
    prompt_norm: Literal['batch', 'layer', 'none'] = _opt('batch', 'norm layer of the blocks', 'prompt path')
    prompt_act: str = _opt('relu', 'activation of the blocks', 'prompt path')
    prompt_fusion: Literal['conv', 'depthwise'] = _opt('conv', 'fusion: conv (1x1, paper) or depthwise', 'prompt path')
    prompt_block: bool = _opt(True, 'use prompt blocks', 'prompt path')
    prompt_head: bool = _opt(True, 'give the prompt path a trainable head of its own', 'prompt path')
    prompt_train_bn: bool = _opt(False, 'dfpt+: train BatchNorm of the backbone copy', 'prompt path')
    prompt_opt: str = _opt('adamw', 'optimizer of the prompt path (timm)', 'prompt path')
    prompt_lr: float = _opt(1e-3, 'learning rate of the prompt path', 'prompt path', low=0)
    prompt_weight_decay: float = _opt(0.01, 'weight decay of the prompt path', 'prompt path', low=0)
    prompt_backbone_lr_scale: float = _opt(0.3, 'dfpt+: lr of the backbone copy, x prompt_lr', 'prompt path', low=0)
    # --- data
    dataset: str | None = _opt(None, 'Hub id, folder of class folders, or parquet', 'data')
    dataset_config: str | None = _opt(None, 'configuration name of the dataset', 'data')
    dataset_revision: str | None = _opt(None, 'revision of the dataset on the Hub', 'data')
    train_split: str | None = _opt(None, 'name of the training split', 'data', unset='found')
    val_split: str | None = _opt(None, 'name of the validation split', 'data', unset='found')
    test_split: str | None = _opt(None, 'name of the test split', 'data', unset='found')
    input_key: str | None = _opt(None, 'image column', 'data', unset='found')
    target_key: str | None = _opt(None, 'label column', 'data', unset='found')
    val_fraction: float = _opt(
        0.1, 'share of the training data to validate on if there is no validation split', 'data', above=0, below=1
    )
    input_size: list[int] = _opt([], 'C H W of the images', 'data', low=1, unset="the student's")
    mean: list[float] = _opt([], 'mean of the images per channel', 'data', low=0, high=1, unset="the student's")
    std: list[float] = _opt([], 'their standard deviation', 'data', above=0, high=1, unset="the student's")
    interpolation: _Interpolation = _opt('', 'resize interpolation', 'data', unset="the student's")
    crop_pct: float | None = _opt(
        None, 'share of the image that is evaluated', 'data', above=0, high=1, unset="the student's"
    )
    batch_size: int | None = _opt(
        None, 'batch size over all processes', 'data', low=1, unset='128, or less for 10 steps per epoch'
    )
    validation_batch_size: int | None = _opt(
        None, 'batch size of the evaluation over all processes', 'data', low=1, unset='batch_size'
    )
    workers: int = _opt(0, 'loader processes', 'data', low=0, high=256)
    cache_images: Literal['auto', 'on', 'off'] = _opt('auto', 'decode a small dataset once into memory', 'data')
    on_bad_image: Literal['stop', 'skip'] = _opt(
        'stop', 'what to do with an unreadable image; to skip them, all are decoded once before training', 'data'
    )
    background: str | None = _opt(
        None, "color behind transparent images, such as white or '255,255,255'", 'data', unset='alpha is dropped'
    )
    # --- augmentation
    no_aug: bool = _opt(False, 'no augmentation', 'augmentation')
    train_crop_mode: Literal['rrc', 'rkrc', 'rkrr'] | None = _opt(
        None, 'timm training crop', 'augmentation', unset='rrc, without crop_padding'
    )
    crop_padding: int = _opt(0, 'pad by N pixels and crop back, as on CIFAR (instead of rrc)', 'augmentation', low=0)
    scale: list[float] = _opt([], 'random resize scale', 'augmentation', above=0, high=1, unset="timm's")
    ratio: list[float] = _opt([], 'random resize aspect ratio', 'augmentation', above=0, unset="timm's")
    hflip: float = _opt(0.5, 'horizontal flip probability', 'augmentation', low=0, high=1)
    vflip: float = _opt(0.0, 'vertical flip probability', 'augmentation', low=0, high=1)
    color_jitter: float | None = _opt(None, 'color jitter factor', 'augmentation', low=0)
    aa: str | None = _opt(None, "AutoAugment policy, such as 'rand-m9-mstd0.5'", 'augmentation')
    reprob: float = _opt(0.0, 'random erase probability', 'augmentation', low=0, high=1)
    aug_cycle: int = _opt(0, 'repeat the augmentation of the first N epochs (0: never)', 'augmentation', low=0)
    mixup: float = _opt(0.0, 'mixup alpha, on when > 0', 'augmentation', low=0)
    cutmix: float = _opt(0.0, 'cutmix alpha, on when > 0', 'augmentation', low=0)
    mixup_prob: float = _opt(1.0, 'probability of mixup or cutmix per batch', 'augmentation', low=0, high=1)
    smoothing: float = _opt(0.0, 'label smoothing', 'augmentation', low=0, below=1)
    # --- optimisation
    epochs: int = _opt(240, 'passes over the training data', 'optimisation', low=1)
    opt: str = _opt('sgd', "optimizer (timm): sgd has Nesterov's momentum, momentum has the plain one", 'optimisation')
    lr: float = _opt(0.05, 'learning rate of the student', 'optimisation', above=0)
    momentum: float = _opt(0.9, 'momentum of the student', 'optimisation', low=0, below=1)
    weight_decay: float = _opt(5e-4, 'weight decay of the student', 'optimisation', low=0)
    opt_fused: bool = _opt(False, "torch's fused optimizers: faster on a CPU, other rounding", 'optimisation')
    clip_grad: float | None = _opt(None, 'clip the gradient norm of each optimizer', 'optimisation', above=0)
    grad_accum_steps: int = _opt(1, 'steps whose gradients are added up before an update', 'optimisation', low=1)
    sched: str = _opt('cosine', 'learning rate schedule (timm)', 'optimisation', choices=tuple(SCHEDULES))
    warmup_epochs: int = _opt(0, 'epochs of linear warm-up; time scale of sched=rsqrt', 'optimisation', low=0)
    warmup_lr: float = _opt(1e-5, 'learning rate at the start of the warm-up', 'optimisation', low=0)
    min_lr: float = _opt(0.0, 'learning rate at the end', 'optimisation', low=0)
    decay_epochs: float | None = _opt(
        None, 'epochs between decays (sched=step), or of the decay at the end (wsd, rsqrt); below 1 a share of the run',
        'optimisation', above=0, unset='0.3, or 0.2',
    )  # fmt: skip
    decay_milestones: list[int] = _opt([150, 180, 210], 'epochs at which sched=multistep decays', 'optimisation', low=1)
    decay_rate: float = _opt(0.1, 'factor of a decay (step, multistep), or power (poly)', 'optimisation', above=0)
    model_ema: bool = _opt(False, 'keep a moving average of the student, publish the better one', 'optimisation')
    model_ema_warmup: bool = _opt(True, 'let the decay of that average grow with the updates', 'optimisation')
    model_ema_decay: float = _opt(0.9998, 'its decay, or what that grows to', 'optimisation', low=0, below=1)
    # --- run
    seed: int = _opt(42, 'random seed', 'run', low=0, high=2**31 - 1)
    output: str | None = _opt(None, 'run folder', 'run', unset='output/<dataset>-<student>-<method>-s<seed>')
    resume: bool = _opt(False, 'continue the run in --output from its last checkpoint, if there is one', 'run')
    checkpoint_steps: int = _opt(0, 'also checkpoint every N updates (0: at the end of each epoch only)', 'run', low=0)
    checkpoint_hist: int = _opt(2, 'checkpoints to keep', 'run', low=1)
    val_interval: int = _opt(1, 'validate every N epochs; the last epoch is always validated', 'run', low=1)
    export_epochs: list[int] = _opt([], 'also save the student of these epochs, as student-epoch<n>', 'run', low=1)
    log_interval: int = _opt(50, 'log every N steps', 'run', low=1)
    log_with: Literal['tensorboard', 'wandb', 'trackio'] | None = _opt(None, 'tracker of accelerate', 'run')
    mixed_precision: Literal['no', 'bf16', 'fp16'] = _opt('no', 'autocast', 'run')
    channels_last: bool = _opt(False, 'channels_last memory format', 'run')
    compile: bool = _opt(False, 'torch.compile student and both paths', 'run')
    cpu: bool = _opt(False, 'train on the CPU even where there is a GPU', 'run')
    # --- publishing
    push_to_hub: str | None = _opt(None, 'publish the student under user/name at the end', 'publishing')
    push_prompt_path: str | None = _opt(None, 'publish the prompt path under user/name at the end', 'publishing')
    private: bool = _opt(False, 'publish privately', 'publishing')
    license: str | None = _opt(None, 'license of what is published', 'publishing')

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
        """Check what one option allows another."""
        limits = {
            'warmup_epochs': (self.warmup_epochs <= self.epochs, f'at most epochs={self.epochs}'),
            'min_lr': (self.min_lr <= self.lr, f'at most lr={self.lr:g}'),
            'export_epochs': (max(self.export_epochs, default=0) <= self.epochs, f'at most epochs={self.epochs}'),
            'input_size': (len(self.input_size) in (0, 3), 'C H W, such as 3 224 224'),
        }
        for name, (fits, allowed) in limits.items():
            if not fits:
                raise ValueError(f'{name} must be {allowed}, got {shorten(getattr(self, name))}.')
        check_schedule(**self.schedule)
        how, prompt_decay = (self.opt_fused, self.cpu), self.prompt_weight_decay
        check_optimizer('opt', self.opt, *how, lr=self.lr, weight_decay=self.weight_decay, momentum=self.momentum)
        check_optimizer('prompt_opt', self.prompt_opt, *how, lr=self.prompt_lr, weight_decay=prompt_decay)

    @property
    def schedule(self) -> dict[str, Any]:
        """The options of the learning rate schedule, as `create_scheduler` takes them."""
        return {name: getattr(self, name) for name in SCHEDULE_OPTIONS}

    def _check_combinations(self) -> None:
        if self.student is None:
            raise ValueError('student is not given: name a timm model, e.g. --student resnet18.')
        if self.dataset is None:
            raise ValueError('dataset is not given: name a Hub id, a folder of class folders or parquet.')
        method = METHODS[self.method]
        if not method.needs_teacher:
            if self.teacher is not None:
                raise ValueError(
                    f'method={self.method} trains without a teacher: leave --teacher out, or choose a method.'
                )
            if self.baselines:
                raise ValueError(f'baselines need a teacher: choose another method than {self.method}.')
        elif self.teacher is None and self.prompt_path is None:
            raise ValueError(f'method={self.method} needs a teacher: name one with --teacher.')
        if self.teacher_checkpoint and self.teacher is None:
            raise ValueError(
                f'teacher_checkpoint={self.teacher_checkpoint!r} has the weights of --teacher, which is not given: '
                f'name it, or leave --teacher-checkpoint out (method={self.method}).'
            )
        self._check_weights()
        self._check_kwargs()
        if not method.variant and (self.prompt_path or self.push_prompt_path or self.freeze_prompt_path):
            raise ValueError(f'prompt_path options need method dfpt or dfpt+, got method={self.method}.')
        if self.method in self.baselines or len(set(self.baselines)) != len(self.baselines):
            raise ValueError(f'baselines={self.baselines} names a method twice (method={self.method}).')
        if self.freeze_prompt_path and not self.prompt_path:
            raise ValueError('freeze_prompt_path needs a tuned one to start from: name it with --prompt-path.')
        used = (self.method, *self.baselines, *([self.kd_loss] if method.variant else []))
        hard = [name for name in used if METHODS[name].needs_hard_labels]
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
        if self.train_crop_mode and self.crop_padding:
            raise ValueError('train_crop_mode and crop_padding contradict each other: give one of them.')
        if self.no_aug:
            _refuse_augmentation({name: getattr(self, name) for name in _AUGMENTATIONS if self._differs(name)})

    def _differs(self, name: str) -> bool:
        """Say whether an option is another than by default."""
        return bool(getattr(self, name) != default_of(self.__dataclass_fields__[name]))

    def _check_weights(self) -> None:
        """Refuse a student that has nothing to learn from."""
        method = METHODS[self.method]
        if not method.needs_teacher:
            return
        dual = method.variant is not None
        names = _DUAL_STUDENT_WEIGHTS if dual else ('task_loss_weight', 'distill_loss_weight')
        grows = dual and self.student_prompt_weight_end
        if not any(getattr(self, name) for name in names) and not grows:
            raise ValueError(f'{", ".join(names)} are all 0: the student has nothing to learn from. Raise one of them.')

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
            raise ValueError(f'cache_teacher needs a teacher: choose another method than {self.method}.')
        if self.mixup or self.cutmix:
            raise ValueError('cache_teacher knows single images, which mixup and cutmix blend: set both to 0.')
        if not (self.no_aug or self.aug_cycle):
            raise ValueError(
                'cache_teacher needs images that come again, but each epoch is augmented anew. Let the augmentation '
                'repeat after N epochs with --aug-cycle N, or switch it off with --no-aug.'
            )

    def check_given(self, given: Mapping[str, Any], methods: Sequence[str] = ()) -> None:
        """Refuse what is given on the command line and would have no effect.

        A recipe may say more than one of its methods has use for.

        Args:
            given: The options that were given.
            methods: What is trained; by default `method` and the baselines.

        Raises:
            ValueError: If one of them has no effect.
        """
        if self.no_aug:
            _refuse_augmentation({name: given[name] for name in _AUGMENTATIONS if name in given})
        for name in filter(self._differs, given):
            check_used(name, getattr(self, name), self.opt, self.sched, self.warmup_epochs)
        methods = methods or (self.method, *self.baselines)
        if any(name in METHODS and METHODS[name].variant for name in methods):
            return
        for name in given:
            dual_only = name == 'kd_loss' or name.startswith(('prompt_', *_DUAL_STUDENT_WEIGHTS))
            if dual_only and self._differs(name):
                raise ValueError(
                    f'{name}={getattr(self, name)!r} has no effect with method={", ".join(methods)}: it is an option '
                    'of dfpt and dfpt+. Leave it out, or choose --method dfpt.'
                )

    def for_method(self, method: str, **changes: Any) -> TrainConfig:
        """Return these options for another method: with that method's own, and without what it has no use for.

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
            dropped |= {'teacher': None, 'teacher_checkpoint': None, 'cache_teacher': False}
        if not known.variant:
            dropped |= {'prompt_path': None, 'push_prompt_path': None, 'freeze_prompt_path': False}
        own = self.method_options.get(method, {})
        return dataclasses.replace(self, **{'method': method, **dropped, **own, **changes})


def _refuse_augmentation(options: Mapping[str, Any]) -> None:
    """Refuse options of augmentation beside `no_aug`, but for those that are off."""
    for name, value in options.items():
        if value:
            raise ValueError(f'no_aug and {name}={value} contradict each other: give one of them.')


def public_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options as they may be published: only the last part of local paths is kept."""
    options: dict[str, Any] = public(dataclasses.asdict(config), local=True)
    return {**options, 'output': None}


def resolve_paths(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return options in which relative paths, those with dots, count from the working directory instead of `folder`."""
    resolved = dict(values)
    for key in PATH_OPTIONS:
        value = values.get(key)
        if not isinstance(value, str):
            continue
        # There a folder needs its prefix: without the dots it would be the name of an architecture.
        resolved[key] = resolve_path(value, folder, bare=key not in ('teacher', 'student'), missing=key == 'output')
    return resolved
