"""The options of a training run, and which of them go together; `arguments.py` tells where they come from."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.optim import list_optimizers

from .fields import checked, default_of, nearest

__all__ = ['METHODS', 'TrainConfig', 'public_options', 'resolve_paths']

METHODS = (
    'supervised', 'kd', 'dkd', 'dist', 'logit-std', 'ttm', 'wttm', 'ctkd', 'dfpt', 'dfpt+',
)  # fmt: skip
_DUAL = ('dfpt', 'dfpt+')
# What the student of a dual method learns from; of no use to others, as is all that is called prompt_*.
_DUAL_STUDENT_WEIGHTS = ('student_task_weight', 'student_teacher_weight', 'student_prompt_weight')
_NOT_NEGATIVE = ('warmup_epochs', 'distill_warmup_epochs', 'workers')
# How images are changed in training, but for mixup and cutmix, which are of batches.
_AUGMENTATIONS = (
    'train_crop_mode', 'crop_padding', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'aa', 'reprob'
)  # fmt: skip
_PATH_KEYS = ('dataset', 'teacher', 'teacher_checkpoint', 'student', 'prompt_path', 'output')
# timm's, but for plateau: what a learning rate is must follow from the number of the update alone.
_SCHEDULES = ('cosine', 'tanh', 'step', 'constant', 'multistep', 'poly', 'wsd', 'rsqrt', 'none')
_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_LOCAL_PREFIX = 'local-dir:'


def _opt(default: Any, help: str, group: str, **extra: Any) -> Any:
    metadata = {'help': help, 'group': group, **extra}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class TrainConfig:
    """Every option of `train/distill.py`, named as in timm's `train.py` where timm has the thing.

    Raises:
        ValueError: A value is out of range or contradicts another; the message names the option and the remedy.
    """

    # --- method
    method: str = _opt('dfpt', 'what the student is trained with', 'method', choices=METHODS)
    temperature: float = _opt(4.0, 'softmax temperature T of every distillation term', 'method')
    kd_loss: str = _opt(
        'kd', 'distillation loss of the four terms of dfpt and dfpt+', 'method',
        choices=('kd', 'dkd', 'dist', 'logit-std', 'ttm', 'wttm'),
    )  # fmt: skip
    task_loss_weight: float = _opt(1.0, 'weight of the labels in a plain distillation method', 'method')
    distill_loss_weight: float = _opt(2.0, 'weight of the teacher in a plain distillation method (c + d)', 'method')
    distill_warmup_epochs: int = _opt(
        0, 'epochs over which the weight of the teacher grows to its full size in a plain distillation method', 'method'
    )
    kd_loss_kwargs: dict[str, Any] = _opt({}, 'key=value arguments of the loss, as beta=2 of dkd', 'method')
    student_task_weight: float = _opt(1.0, 'dfpt: weight of the labels for the student', 'method')
    prompt_task_weight: float = _opt(1.0, 'dfpt: weight of the labels for the prompt path', 'method')
    prompt_teacher_weight: float = _opt(1.0, 'dfpt: a, what the prompt path learns from the teacher', 'method')
    prompt_student_weight: float = _opt(0.25, 'dfpt: b, what the prompt path learns from the student', 'method')
    student_teacher_weight: float = _opt(1.0, 'dfpt: c, what the student learns from the teacher', 'method')
    student_prompt_weight: float = _opt(1.0, 'dfpt: d, what the student learns from the prompt path', 'method')
    student_prompt_weight_end: float | None = _opt(
        None, 'dfpt: final value of d, linear from student_prompt_weight (default: constant)', 'method'
    )
    baselines: list[str] = _opt([], 'methods to train beside it, on the same batches', 'method', choices=METHODS)
    method_options: dict[str, Any] = _opt(
        {}, 'options that count for one method: {dkd: {temperature: 4}} (in recipes only)', 'method', recipe_only=True
    )
    # --- models
    teacher: str | None = _opt(None, 'timm name, hf-hub:user/name or local-dir:folder of the teacher', 'models')
    teacher_checkpoint: str | None = _opt(None, 'safetensors file with weights for --teacher', 'models')
    teacher_kwargs: dict[str, Any] = _opt({}, 'key=value arguments of the teacher architecture', 'models')
    teacher_dtype: str = _opt('float32', 'dtype of the frozen weights', 'models', choices=('float32', 'bfloat16'))
    cache_teacher: bool = _opt(False, 'compute the teacher logits once; needs aug_cycle or no_aug', 'models')
    teacher_cache_dir: str = _opt('output/teacher-cache', 'where these logits are kept, for later runs too', 'models')
    student: str | None = _opt(None, 'timm name, hf-hub:user/name or local-dir:folder of the student', 'models')
    student_pretrained: bool = _opt(False, 'start the student from its pretrained weights', 'models')
    student_kwargs: dict[str, Any] = _opt({}, 'key=value arguments of the student architecture', 'models')
    drop: float = _opt(0.0, 'dropout rate of the student', 'models')
    drop_path: float | None = _opt(None, 'stochastic depth rate of the student (default: its own)', 'models')
    # --- prompt path
    prompt_path: str | None = _opt(None, 'start from a published prompt path: Hub id or folder', 'prompt path')
    freeze_prompt_path: bool = _opt(False, 'use --prompt-path as it is instead of tuning it on', 'prompt path')
    prompt_stages: list[str] = _opt([], 'number of stages, or the modules that end one', 'prompt path')
    prompt_reduction: float = _opt(2.0, 'r1: blocks work on channels / r1', 'prompt path')
    prompt_partial_ratio: float = _opt(0.5, 'r2: share of channels a partial convolution convolves', 'prompt path')
    prompt_kernel_sizes: list[int] = _opt([1, 3, 5], 'kernel sizes of the partial convolutions', 'prompt path')
    prompt_arrangement: str = _opt('parallel', 'parallel (scales side by side) or sequential (in a row)', 'prompt path')
    prompt_norm: str = _opt('batch', 'norm layer of the blocks: batch, layer or none', 'prompt path')
    prompt_act: str = _opt('relu', 'activation of the blocks', 'prompt path')
    prompt_fusion: str = _opt('conv', 'fusion: conv (1x1, paper), depthwise or none', 'prompt path')
    prompt_block: bool = _opt(True, 'have prompt blocks at all', 'prompt path')
    prompt_head: bool = _opt(True, 'give the prompt path a trainable head of its own', 'prompt path')
    prompt_after_last: bool = _opt(False, 'also put a block after the last stage', 'prompt path')
    prompt_train_bn: bool = _opt(False, 'dfpt+: batch statistics in the backbone copy', 'prompt path')
    prompt_opt: str = _opt('adamw', 'optimizer of the prompt path', 'prompt path')
    prompt_lr: float = _opt(1e-3, 'learning rate of the prompt path', 'prompt path')
    prompt_weight_decay: float = _opt(0.01, 'weight decay of the prompt path', 'prompt path')
    prompt_backbone_lr_scale: float = _opt(0.3, 'dfpt+: learning rate of the backbone copy, x prompt_lr', 'prompt path')
    # --- data
    dataset: str | None = _opt(None, 'Hub id, folder of class folders, or parquet', 'data')
    dataset_config: str | None = _opt(None, 'configuration name of the data set', 'data')
    dataset_revision: str | None = _opt(None, 'revision of the data set on the Hub', 'data')
    train_split: str | None = _opt(None, 'name of the training split (found if not given)', 'data')
    val_split: str | None = _opt(None, 'name of the validation split (found if not given)', 'data')
    test_split: str | None = _opt(None, 'name of the test split (found if not given)', 'data')
    input_key: str | None = _opt(None, 'image column (found if not given)', 'data')
    target_key: str | None = _opt(None, 'label column (found if not given)', 'data')
    val_fraction: float = _opt(0.1, 'share of the training data to validate on when there is no such split', 'data')
    input_size: list[int] = _opt([], 'C H W of the images (default: of the student)', 'data')
    mean: list[float] = _opt([], 'mean of the images a channel (default: of the student)', 'data')
    std: list[float] = _opt([], 'standard deviation of the images a channel (default: of the student)', 'data')
    interpolation: str = _opt(
        '', 'resize interpolation (default: of the student)', 'data', choices=('', *_INTERPOLATIONS)
    )
    crop_pct: float | None = _opt(None, 'share of the image that is evaluated (default: of the student)', 'data')
    batch_size: int = _opt(128, 'images a step, over all processes', 'data')
    validation_batch_size: int | None = _opt(None, 'images an evaluation step (default: batch_size)', 'data')
    workers: int = _opt(0, 'loader processes', 'data')
    cache_images: str = _opt('auto', 'decode a small data set once into memory', 'data', choices=('auto', 'on', 'off'))
    on_bad_image: str = _opt(
        'stop', 'what to do with an unreadable image; to skip them, all are decoded once before training', 'data',
        choices=('stop', 'skip'),
    )  # fmt: skip
    # --- augmentation
    no_aug: bool = _opt(False, 'no augmentation', 'augmentation')
    train_crop_mode: str | None = _opt(None, 'timm training crop: rrc, rkrc or rkrr', 'augmentation')
    crop_padding: int = _opt(0, 'pad by so many pixels and crop back, as on CIFAR (instead of rrc)', 'augmentation')
    scale: list[float] = _opt([], 'random resize scale (default: of timm)', 'augmentation')
    ratio: list[float] = _opt([], 'random resize aspect ratio (default: of timm)', 'augmentation')
    hflip: float = _opt(0.5, 'horizontal flip probability', 'augmentation')
    vflip: float = _opt(0.0, 'vertical flip probability', 'augmentation')
    color_jitter: float | None = _opt(None, 'colour jitter factor', 'augmentation')
    aa: str | None = _opt(None, "AutoAugment policy, such as 'rand-m9-mstd0.5'", 'augmentation')
    reprob: float = _opt(0.0, 'random erase probability', 'augmentation')
    aug_cycle: int = _opt(0, 'repeat the augmentation of the first N epochs (0: never)', 'augmentation')
    mixup: float = _opt(0.0, 'mixup alpha, on when > 0', 'augmentation')
    cutmix: float = _opt(0.0, 'cutmix alpha, on when > 0', 'augmentation')
    mixup_prob: float = _opt(1.0, 'probability of mixup or cutmix a batch', 'augmentation')
    smoothing: float = _opt(0.0, 'label smoothing', 'augmentation')
    # --- optimisation
    epochs: int = _opt(240, 'passes over the training data', 'optimisation')
    opt: str = _opt('sgd', 'optimizer of the student', 'optimisation')
    lr: float = _opt(0.05, 'learning rate of the student', 'optimisation')
    momentum: float = _opt(0.9, 'momentum of the student', 'optimisation')
    weight_decay: float = _opt(5e-4, 'weight decay of the student', 'optimisation')
    opt_fused: bool = _opt(False, "torch's fused optimizers: faster on a CPU, other rounding", 'optimisation')
    clip_grad: float | None = _opt(None, 'clip the gradient norm of each optimizer', 'optimisation')
    grad_accum_steps: int = _opt(1, 'steps whose gradients are added up before an update', 'optimisation')
    sched: str = _opt('cosine', 'learning rate schedule (timm)', 'optimisation', choices=_SCHEDULES)
    warmup_epochs: int = _opt(0, 'epochs of linear warm-up', 'optimisation')
    warmup_lr: float = _opt(1e-5, 'learning rate at the start of the warm-up', 'optimisation')
    min_lr: float = _opt(0.0, 'learning rate at the end', 'optimisation')
    decay_milestones: list[int] = _opt([150, 180, 210], 'epochs at which sched=multistep decays', 'optimisation')
    decay_rate: float = _opt(0.1, 'factor of a decay', 'optimisation')
    model_ema: bool = _opt(False, 'keep an exponential moving average of the student, and publish it', 'optimisation')
    model_ema_decay: float = _opt(0.9998, 'decay of that average', 'optimisation')
    # --- run
    seed: int = _opt(42, 'random seed', 'run')
    output: str | None = _opt(None, 'run folder (default: output/<data set>-<student>-<method>-s<seed>)', 'run')
    resume: bool = _opt(False, 'continue the run in --output from its last checkpoint, if there is one', 'run')
    checkpoint_steps: int = _opt(0, 'checkpoint every so many updates, too (0: at the end of each epoch only)', 'run')
    checkpoint_hist: int = _opt(2, 'checkpoints to keep', 'run')
    val_interval: int = _opt(1, 'epochs between two validations; the last epoch is always validated', 'run')
    export_epochs: list[int] = _opt([], 'also save the student of these epochs, as student-epoch<n>', 'run')
    log_interval: int = _opt(50, 'steps between two looks at the loss', 'run')
    on_nonfinite: str = _opt('stop', 'what to do when a loss is NaN or Inf', 'run', choices=('stop', 'skip'))
    log_with: str | None = _opt(None, 'tracker of accelerate', 'run', choices=('tensorboard', 'wandb', 'trackio'))
    mixed_precision: str = _opt('no', 'autocast', 'run', choices=('no', 'bf16', 'fp16'))
    channels_last: bool = _opt(False, 'channels_last memory format', 'run')
    compile: bool = _opt(False, 'torch.compile student and both paths', 'run')
    cpu: bool = _opt(False, 'train on the CPU even where there is a GPU', 'run')
    # --- publishing
    push_to_hub: str | None = _opt(None, 'publish the student under user/name at the end', 'publishing')
    push_prompt_path: str | None = _opt(None, 'publish the prompt path under user/name at the end', 'publishing')
    private: bool = _opt(False, 'publish privately', 'publishing')
    license: str | None = _opt(None, 'licence of what is published', 'publishing')

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checked(TrainConfig, field, getattr(self, field.name))
            setattr(self, field.name, value)
        # As in a recipe, so that the saved options mean the same wherever they are read.
        vars(self).update(resolve_paths({key: getattr(self, key) for key in _PATH_KEYS}, Path()))
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        def check(name: str, fits: bool, allowed: str) -> None:
            if not fits:
                raise ValueError(f'{name} must be {allowed}, got {getattr(self, name)!r}.')

        for name in ('temperature', 'lr'):
            check(name, getattr(self, name) > 0, 'greater than 0')
        check('clip_grad', self.clip_grad is None or self.clip_grad > 0, 'greater than 0')
        check('prompt_lr', self.prompt_lr >= 0, '0 or greater')
        size = self.validation_batch_size
        check('validation_batch_size', size is None or size >= 1, 'at least 1')
        for name in ('batch_size', 'epochs', 'val_interval', 'grad_accum_steps', 'log_interval', 'checkpoint_hist'):
            check(name, getattr(self, name) >= 1, 'at least 1')
        for field in dataclasses.fields(self):
            if field.name.endswith(('_weight', '_decay')) or field.name in _NOT_NEGATIVE:
                check(field.name, getattr(self, field.name) >= 0, '0 or greater')
        check('student_prompt_weight_end', (self.student_prompt_weight_end or 0) >= 0, '0 or greater')
        for name in ('hflip', 'vflip', 'reprob', 'smoothing', 'mixup_prob', 'drop', 'model_ema_decay'):
            check(name, 0 <= getattr(self, name) <= 1, 'between 0 and 1')
        check('val_fraction', 0 < self.val_fraction < 1, 'between 0 and 1, both excluded')
        for name in ('smoothing', 'drop'):
            check(name, getattr(self, name) < 1, 'less than 1')
        check('drop_path', 0 <= (self.drop_path or 0) < 1, '0 or greater and less than 1')
        check('momentum', 0 <= self.momentum < 1, '0 or greater and less than 1')
        check('crop_pct', self.crop_pct is None or 0 < self.crop_pct <= 1, 'greater than 0 and at most 1')
        check('std', all(value > 0 for value in self.std), 'greater than 0 in every channel')
        check('warmup_epochs', self.warmup_epochs <= self.epochs, f'at most epochs={self.epochs}')
        check('min_lr', 0 <= self.min_lr <= self.lr, f'between 0 and lr={self.lr:g}')
        check('mixup', self.mixup >= 0, '0 or greater')
        check('cutmix', self.cutmix >= 0, '0 or greater')
        check('crop_padding', self.crop_padding >= 0, '0 or greater')
        check('aug_cycle', self.aug_cycle >= 0, '0 or greater')
        check('checkpoint_steps', self.checkpoint_steps >= 0, '0 or greater')
        check('seed', 0 <= self.seed < 2**31, 'between 0 and 2^31 - 1')
        inside = all(1 <= epoch <= self.epochs for epoch in self.export_epochs)
        check('export_epochs', inside, f'epochs of the run, 1 to {self.epochs}')
        sized = len(self.input_size) in (0, 3) and all(side > 0 for side in self.input_size)
        check('input_size', sized, 'C H W, e.g. 3 224 224')
        optimizers = list_optimizers()
        for name in ('opt', 'prompt_opt'):
            value = getattr(self, name)
            # timm's own error names neither the option nor the optimizer that was meant.
            if value.lower().removeprefix('lookahead_') not in optimizers:
                hint = nearest(value, optimizers) or ' See timm.optim.list_optimizers().'
                raise ValueError(f'{name} must be an optimizer of timm, got {value!r}.{hint}')

    def _check_combinations(self) -> None:
        if self.student is None:
            raise ValueError('student is not given: name a timm model, e.g. --student resnet18.')
        if self.dataset is None:
            raise ValueError('dataset is not given: name a Hub id, a folder of class folders or parquet.')
        if self.method == 'supervised':
            if self.teacher is not None:
                raise ValueError('method=supervised trains without a teacher: leave --teacher out, or choose a method.')
            if self.baselines:
                raise ValueError('baselines need a teacher beside them: choose another method than supervised.')
        elif self.teacher is None and self.prompt_path is None:
            raise ValueError(f'method={self.method} needs a teacher: name one with --teacher.')
        if self.teacher_checkpoint and self.teacher is None:
            raise ValueError(
                f'teacher_checkpoint={self.teacher_checkpoint!r} has the weights of --teacher, which is not given: '
                f'name it, or leave --teacher-checkpoint out (method={self.method}).'
            )
        self._check_weights()
        self._check_student_kwargs()
        dual = self.method in _DUAL
        if not dual and (self.prompt_path or self.push_prompt_path or self.freeze_prompt_path):
            raise ValueError(f'prompt_path options need method dfpt or dfpt+, got method={self.method}.')
        if self.method in self.baselines or len(set(self.baselines)) != len(self.baselines):
            raise ValueError(f'baselines={self.baselines} names a method twice (method={self.method}).')
        untrained = not (self.prompt_block or self.prompt_head or self.prompt_path) and self.prompt_fusion == 'none'
        if self.method == 'dfpt' and untrained:
            raise ValueError(
                'prompt_block and prompt_head are off and prompt_fusion is none: the prompt path has nothing to train. '
                'Turn one of them on, or use --method kd.'
            )
        if self.freeze_prompt_path and not self.prompt_path:
            raise ValueError('freeze_prompt_path needs a tuned one to start from: name it with --prompt-path.')
        if (self.mixup or self.cutmix) and 'dkd' in (self.method, *self.baselines, self.kd_loss if dual else None):
            raise ValueError('dkd needs class indices and cannot be used with mixup or cutmix: set both to 0.')
        for method, options in self.method_options.items():
            known = [field.name for field in dataclasses.fields(self)]
            if method not in METHODS or not isinstance(options, dict) or not set(options) <= set(known):
                raise ValueError(
                    f'method_options: {method}={options!r} must be a method of {", ".join(METHODS)} with a mapping of '
                    'options, such as {dkd: {temperature: 4.0}}.'
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
        if self.method == 'supervised':
            return
        dual = self.method in _DUAL
        names = _DUAL_STUDENT_WEIGHTS if dual else ('task_loss_weight', 'distill_loss_weight')
        grows = dual and self.student_prompt_weight_end
        if not any(getattr(self, name) for name in names) and not grows:
            raise ValueError(f'{", ".join(names)} are all 0: the student has nothing to learn from. Raise one of them.')

    def _check_student_kwargs(self) -> None:
        if 'num_classes' in self.student_kwargs:
            raise ValueError(
                f'student_kwargs: num_classes={self.student_kwargs["num_classes"]} would be overridden by the number '
                'of classes of the data: leave it out.'
            )
        if 'in_chans' in self.student_kwargs:
            raise ValueError(
                f'student_kwargs: in_chans={self.student_kwargs["in_chans"]} would be overridden by the channels of '
                'input_size: leave it out, and give --input-size C H W.'
            )

    def _check_cache(self) -> None:
        if self.method == 'supervised':
            raise ValueError('cache_teacher needs a teacher: choose another method than supervised.')
        if self.mixup or self.cutmix:
            raise ValueError('cache_teacher knows single images, which mixup and cutmix blend: set both to 0.')
        if not (self.no_aug or self.aug_cycle):
            raise ValueError(
                'cache_teacher needs images that come again, but each epoch is augmented anew. Let the augmentation '
                'repeat after N epochs with --aug-cycle N, or switch it off with --no-aug.'
            )

    def check_given(self, given: Mapping[str, Any]) -> None:
        """Refuse what is given on the command line and would have no effect.

        A recipe may say more than one of its methods has use for.

        Args:
            given: The options that were given.

        Raises:
            ValueError: One of them has no effect.
        """
        if self.no_aug:
            _refuse_augmentation({name: given[name] for name in _AUGMENTATIONS if name in given})
        methods = (self.method, *self.baselines)
        if set(methods) & set(_DUAL):
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
            method: One of `METHODS`.
            **changes: Further options to change; they win over the method's own.

        Raises:
            ValueError: The options do not fit the method.
        """
        dropped: dict[str, Any] = {'baselines': []}
        if method != self.method:
            # They are arguments of one loss, which others do not know.
            dropped['kd_loss_kwargs'] = {}
        if method == 'supervised':
            dropped |= {'teacher': None, 'teacher_checkpoint': None, 'cache_teacher': False}
        if method not in _DUAL:
            dropped |= {'prompt_path': None, 'push_prompt_path': None, 'freeze_prompt_path': False}
        own = self.method_options.get(method, {})
        return dataclasses.replace(self, **{'method': method, **dropped, **own, **changes})


def _refuse_augmentation(options: Mapping[str, Any]) -> None:
    """Refuse options of augmentation beside `no_aug`, but for those that are off."""
    for name, value in options.items():
        if value:
            raise ValueError(f'no_aug and {name}={value} contradict each other: give one of them.')


def resolve_paths(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return options in which relative paths, those with dots, count from the working directory instead of `folder`."""
    resolved = dict(values)
    for key in _PATH_KEYS:
        value = values.get(key)
        if not isinstance(value, str):
            continue
        prefix = _LOCAL_PREFIX if value.startswith(_LOCAL_PREFIX) else ''
        relative = value.removeprefix(prefix)
        if relative.startswith(('./', '../')):
            # What is not there keeps its full name: without the dots it could be the name of something on the Hub.
            found = folder / relative
            resolved[key] = prefix + (_from_here(found) if found.exists() or key == 'output' else str(found.resolve()))
    return resolved


def _from_here(path: Path) -> str:
    # Relative where that is shorter: what is recorded of a run should not tell where somebody's home is.
    full = path.resolve()
    return str(full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else full)


def public_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options as they may be published: of local paths only the last part is told."""
    options = dataclasses.asdict(config)
    for key in _PATH_KEYS:
        value = options[key]
        if isinstance(value, str):
            prefix = _LOCAL_PREFIX if value.startswith(_LOCAL_PREFIX) else ''
            path = Path(value.removeprefix(prefix))
            options[key] = prefix + path.name if prefix or path.exists() else value
    options['output'] = None
    return options
