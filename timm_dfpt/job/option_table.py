"""The options of a training run, one by one: names, defaults, types, choices and ranges."""
from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ..tasks.methods import DEFAULT_LOSS, DEFAULT_METHOD, KD_LOSSES, METHODS
from .optim import SCHEDULES

__all__ = ['Options']

_Interpolation = Literal['', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos']


def _opt(default: Any, help: str, group: str, **more: Any) -> Any:
    """Describe an option.

    Args:
        default: Its default.
        help: What it is.
        group: Its group in the help.
        **more: Limits and `choices`, see `checked`; `unset`: what an empty default stands for;
            `required`: where it has to be given; `recipe_only`.
    """
    metadata = {'help': help, 'group': group, **more}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Options:
    """Every option of `train/distill.py`, named as in timm's `train.py` where timm has it; see `TrainConfig`."""

    # --- method
    method: str = _opt(DEFAULT_METHOD, 'training method of the student', 'method', choices=METHODS)
    temperature: float = _opt(4.0, 'softmax temperature T of every distillation term', 'method', above=0)
    kd_loss: str = _opt(
        DEFAULT_LOSS, 'distillation loss of the four terms of dfpt and dfpt+', 'method', choices=KD_LOSSES
    )
    task_loss_weight: float = _opt(1.0, 'weight of the labels in a plain distillation method', 'method', low=0)
    distill_loss_weight: float = _opt(2.0, 'weight of the teacher in a plain method (c + d)', 'method', low=0)
    distill_warmup_epochs: int = _opt(
        0, "epochs of linear warm-up of the teacher's weight in a plain method", 'method', low=0
    )
    kd_loss_kwargs: dict[str, Any] = _opt({}, 'key=value arguments of the loss, such as beta=2 of dkd', 'method')
    student_task_weight: float = _opt(1.0, 'dfpt: weight of the labels for the student', 'method', low=0)
    prompt_task_weight: float = _opt(1.0, 'dfpt: weight of the labels for the prompt path', 'method', low=0)
    prompt_teacher_weight: float | None = _opt(
        None, 'dfpt: a, prompt path learns from teacher', 'method', low=0, unset='1; 0 with --teacher-head new'
    )
    prompt_student_weight: float = _opt(0.25, 'dfpt: b, prompt path learns from student', 'method', low=0)
    student_teacher_weight: float | None = _opt(
        None, 'dfpt: c, student learns from teacher', 'method', low=0, unset='1; 0 with --teacher-head new'
    )
    student_prompt_weight: float = _opt(1.0, 'dfpt: d, student learns from prompt path', 'method', low=0)
    student_prompt_weight_end: float | None = _opt(
        None, 'dfpt: final value of d, linear from --student-prompt-weight', 'method', low=0, unset='constant'
    )
    adapt_statistics: bool = _opt(
        True, 'unlabelled: re-estimate the BatchNorm statistics of the teacher on the training images', 'method'
    )
    baselines: list[str] = _opt([], 'methods to train alongside, on the same batches', 'method', choices=METHODS)
    method_options: dict[str, Any] = _opt(
        {}, 'options that apply to one method: {dkd: {temperature: 4}} (in recipes only)', 'method', recipe_only=True
    )
    # --- models
    teacher: str | None = _opt(
        None, 'timm name, hf-hub:user/name or local-dir:folder of the teacher', 'models',
        required='required by methods with a teacher',
    )  # fmt: skip
    teacher_checkpoint: str | None = _opt(None, 'safetensors file with weights for --teacher', 'models')
    teacher_kwargs: dict[str, Any] = _opt({}, 'key=value arguments of the teacher architecture', 'models')
    teacher_dtype: Literal['float32', 'bfloat16', 'float16'] = _opt(
        'float32', 'dtype of the frozen teacher weights; heads stay in float32, and the deviation is reported', 'models'
    )
    teacher_input_size: list[int] = _opt(
        [], 'side (or height and width) of the images that the teacher sees', 'models', low=1, unset="the teacher's own"
    )
    teacher_head: Literal['auto', 'own', 'fit', 'new'] = _opt(
        'auto', 'head of the teacher: its own, one fitted to its features, or a new one on the prompt path only; auto: '
                'own if its classes are those of the data, else fit', 'models',
    )  # fmt: skip
    teacher_head_balanced: bool = _opt(False, 'weight all classes equally when the head is fitted', 'models')
    cache_teacher: bool = _opt(False, 'compute the logits of the teacher once; needs --aug-cycle or --no-aug', 'models')
    teacher_cache_dir: str = _opt('output/teacher-cache', 'folder of these logits, which later runs reuse', 'models')
    student: str | None = _opt(
        None, 'timm name, hf-hub:user/name or local-dir:folder of the student', 'models',
        required='required where no recipe names one',
    )  # fmt: skip
    student_pretrained: bool = _opt(False, 'start the student from its pretrained weights', 'models')
    student_kwargs: dict[str, Any] = _opt({}, 'key=value arguments of the student architecture', 'models')
    head_init_scale: float | None = _opt(
        None, "factor on the initial weights of a new head (timm)", 'models', low=0,
        unset='0 where pretrained weights get another number of classes, else 1',
    )  # fmt: skip
    drop: float = _opt(0.0, 'dropout rate of the student', 'models', low=0, below=1)
    drop_path: float | None = _opt(
        None, 'stochastic depth rate of the student', 'models', low=0, below=1, unset="the model's own"
    )
    # --- prompt path
    prompt_path: str | None = _opt(None, 'start from a published prompt path: Hub id or folder', 'prompt path')
    prompt_epochs: str | None = _opt(
        None, 'tune the prompt path in the first N epochs (or a share such as 25%), then freeze it; all: never',
        'prompt path', unset='all; 25% for a teacher of other classes, or with a = c = 0',
    )  # fmt: skip
    freeze_prompt_path: bool = _opt(False, 'use --prompt-path as it is: --prompt-epochs 0', 'prompt path')
    prompt_stages: list[str] = _opt([], 'number of stages, or names of the modules that end one', 'prompt path')
    prompt_reduction: float = _opt(2.0, 'r1: blocks work on channels / r1', 'prompt path', above=0, high=1024)
    prompt_partial_ratio: float = _opt(
        0.5, 'r2: share of channels a partial convolution convolves', 'prompt path', above=0, high=1
    )
    prompt_kernel_sizes: list[int] = _opt([1, 3, 5], 'kernel sizes of the partial convolutions', 'prompt path', low=1)
    prompt_norm: Literal['batch', 'layer', 'none'] = _opt('batch', 'norm layer of the blocks', 'prompt path')
    prompt_act: str = _opt('relu', 'activation of the blocks', 'prompt path')
    prompt_fusion: Literal['conv', 'depthwise', 'none'] | None = _opt(
        None, 'fusion: conv (1x1, paper), depthwise, or none', 'prompt path', unset='conv; none without labels'
    )
    prompt_fusion_rank: int | None = _opt(
        None, 'rank of that convolution beyond the identity', 'prompt path', low=1, high=4096, unset='whole'
    )
    prompt_block: bool | None = _opt(
        None, 'use prompt blocks', 'prompt path', unset='yes; no without labels'
    )
    prompt_head: bool = _opt(True, 'give the prompt path a trainable head of its own', 'prompt path')
    prompt_head_init_scale: float | None = _opt(
        None, "factor on the weights of the prompt path's own head at the start; 0: logits of zero",
        'prompt path', low=0, unset='0.3 where the head is fitted, else 1',
    )  # fmt: skip
    prompt_head_rank: int | None = _opt(
        None, "rank of a correction of the teacher's frozen head, instead of a copy of it",
        'prompt path', low=1, high=4096, unset='a copy',
    )  # fmt: skip
    prompt_norms: Literal['teacher', 'own'] | None = _opt(
        None, "norm layers of the prompt path: the teacher's, or its own, with their own statistics",
        'prompt path', unset='teacher; own without labels',
    )  # fmt: skip
    prompt_opt: str = _opt('adamw', 'optimizer of the prompt path (timm)', 'prompt path')
    prompt_lr: float = _opt(1e-3, 'learning rate of the prompt path', 'prompt path', low=0)
    prompt_weight_decay: float = _opt(0.01, 'weight decay of the prompt path', 'prompt path', low=0)
    prompt_backbone_lr_scale: float = _opt(0.3, 'dfpt+: lr of the backbone copy, x prompt_lr', 'prompt path', low=0)
    # --- data
    dataset: str | None = _opt(
        None, 'folder of class folders, parquet, or Hub id', 'data', required='required where no recipe names one'
    )
    dataset_config: str | None = _opt(None, 'configuration name of the dataset', 'data')
    dataset_revision: str | None = _opt(None, 'revision of the dataset on the Hub', 'data')
    train_split: str | None = _opt(None, 'name of the training split', 'data', unset='detected')
    val_split: str | None = _opt(None, 'name of the validation split', 'data', unset='detected')
    test_split: str | None = _opt(None, 'name of the test split', 'data', unset='detected')
    input_key: str | None = _opt(None, 'image column', 'data', unset='detected')
    target_key: str | None = _opt(None, 'label column', 'data', unset='detected')
    unlabelled: bool = _opt(
        False, 'train without labels, even if the data have some: on the outputs and the classes of the teacher', 'data'
    )
    val_fraction: float = _opt(
        0.1, 'share of the training data to validate on without a validation split', 'data', above=0, below=1
    )
    input_size: list[int] = _opt([], 'C H W of the images', 'data', low=1, unset="the student's")
    mean: list[float] = _opt([], 'mean of the images per channel', 'data', low=0, high=1, unset="the student's")
    std: list[float] = _opt(
        [], 'standard deviation of the images per channel', 'data', above=0, high=1, unset="the student's"
    )
    interpolation: _Interpolation = _opt('', 'resize interpolation', 'data', unset="the student's")
    crop_pct: float | None = _opt(
        None, 'center crop of the evaluation, as a share of the image', 'data', above=0, high=1, unset="the student's"
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
        'stop', 'stop at an unreadable image, or skip it; skip decodes all images once before training', 'data'
    )
    check_images: Literal['auto', 'on', 'off'] = _opt(
        'auto', 'read all images before training; auto: up to 10,000 of them, else during the first epoch', 'data'
    )
    background: str | None = _opt(
        None, "color behind transparent images, such as white or '255,255,255'", 'data', unset='alpha is dropped'
    )
    # --- augmentation
    no_aug: bool = _opt(False, 'switch augmentation off', 'augmentation')
    train_crop_mode: Literal['rrc', 'rkrc', 'rkrr'] | None = _opt(
        None, 'timm training crop', 'augmentation', unset='rrc, without crop_padding'
    )
    crop_padding: int = _opt(0, 'pad by N pixels and crop back, as on CIFAR (instead of rrc)', 'augmentation', low=0)
    jpeg_draft: bool = _opt(
        False, 'decode JPEGs at a smaller size where the crop (rrc) allows it: faster, slightly different pixels',
        'augmentation',
    )
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
    # --- optimization
    epochs: int = _opt(240, 'passes over the training data', 'optimization', low=1)
    opt: str = _opt('sgd', 'optimizer (timm): sgd has Nesterov momentum, momentum the plain one', 'optimization')
    lr: float = _opt(0.05, 'learning rate of the student', 'optimization', above=0)
    momentum: float = _opt(0.9, 'momentum of the student', 'optimization', low=0, below=1)
    weight_decay: float = _opt(5e-4, 'weight decay of the student', 'optimization', low=0)
    opt_fused: bool = _opt(False, "torch's fused optimizers: faster on a CPU, different rounding", 'optimization')
    clip_grad: float | None = _opt(None, 'clip the gradient norm of each optimizer', 'optimization', above=0)
    grad_accum_steps: int = _opt(1, 'accumulate the gradients of N steps per update', 'optimization', low=1)
    sched: str = _opt('cosine', 'learning rate schedule (timm)', 'optimization', choices=tuple(SCHEDULES))
    warmup_epochs: int = _opt(0, 'epochs of linear warm-up; time scale of sched=rsqrt', 'optimization', low=0)
    warmup_lr: float = _opt(1e-5, 'learning rate at the start of the warm-up', 'optimization', low=0)
    min_lr: float = _opt(0.0, 'learning rate at the end', 'optimization', low=0)
    decay_epochs: float | None = _opt(
        None, 'epochs between decays (sched=step), or of the decay at the end (wsd, rsqrt); below 1 a share of the run',
        'optimization', above=0, unset='0.3 (step), 0.2 (wsd, rsqrt)',
    )  # fmt: skip
    decay_milestones: list[int] = _opt([150, 180, 210], 'epochs at which sched=multistep decays', 'optimization', low=1)
    decay_rate: float = _opt(0.1, 'factor of a decay (step, multistep), or power (poly)', 'optimization', above=0)
    model_ema: bool = _opt(
        False, 'keep a moving average (EMA) of the student and publish the better of the two', 'optimization'
    )
    model_ema_warmup: bool = _opt(True, 'increase the decay of the average over the updates', 'optimization')
    model_ema_decay: float = _opt(
        0.9998, 'decay of the average; its final value with --model-ema-warmup', 'optimization', low=0, below=1
    )
    # --- run
    seed: int = _opt(42, 'random seed', 'run', low=0, high=2**31 - 1)
    output: str | None = _opt(None, 'run folder', 'run', unset='output/<dataset>-<student>-<method>-s<seed>')
    resume: bool = _opt(False, 'continue the run in --output from its last checkpoint, if there is one', 'run')
    checkpoint_steps: int = _opt(0, 'also checkpoint every N updates (0: at the end of each epoch only)', 'run', low=0)
    checkpoint_hist: int = _opt(2, 'checkpoints to keep', 'run', low=1)
    val_interval: int = _opt(1, 'validate every N epochs; the last epoch is always validated', 'run', low=1)
    patience: int | None = _opt(
        None, 'stop after N validations in a row without an improvement', 'run', low=1, unset='never'
    )
    export_epochs: list[int] = _opt([], 'also save the student of these epochs, as student-epoch<n>', 'run', low=1)
    log_interval: int = _opt(50, 'log every N steps', 'run', low=1)
    log_with: Literal['tensorboard', 'wandb', 'trackio'] | None = _opt(None, 'experiment tracker', 'run')
    report: bool = _opt(True, 'write report.html, a page about the run, at its end', 'run')
    mixed_precision: Literal['no', 'bf16', 'fp16'] = _opt('no', 'autocast', 'run')
    channels_last: bool = _opt(False, 'use the channels_last memory format', 'run')
    compile: bool = _opt(False, 'torch.compile the step: student, both paths, losses', 'run')
    compile_mode: Literal['default', 'reduce-overhead', 'max-autotune-no-cudagraphs'] = _opt(
        'default', 'mode of --compile; reduce-overhead replays CUDA graphs: for small networks on a GPU', 'run'
    )
    cpu: bool = _opt(False, 'train on the CPU even if there is a GPU', 'run')
    # --- export
    export: list[str] = _opt(
        [], 'also export the student as ONNX (float32, float16, int8) or as a torch.export program (pt2)', 'export',
        choices=('onnx', 'pt2'),
    )  # fmt: skip
    export_weights: Literal['last', 'best'] = _opt(
        'last', 'export the weights of the last epoch, or of the best one on the validation data', 'export'
    )
    include_preprocessing: bool = _opt(False, 'exported files take pixels (uint8) and normalize them', 'export')
    # --- publishing
    push_to_hub: str | None = _opt(None, 'publish the student under user/name at the end', 'publishing')
    push_prompt_path: str | None = _opt(None, 'publish the prompt path under user/name at the end', 'publishing')
    private: bool = _opt(False, 'make new repositories private', 'publishing')
    license: str | None = _opt(None, 'license of what is published, such as apache-2.0, or other', 'publishing')
    license_name: str | None = _opt(None, 'name of the license with --license other', 'publishing')
    license_link: str | None = _opt(None, 'address of the text of that license', 'publishing')
