"""Which options have an effect on a run: those that cannot have any are refused where they are given."""
from __future__ import annotations

from collections.abc import Callable, Sequence

from ..tasks.methods import METHODS
from .option_table import Options

__all__ = ['refuse_unused']

_TUNING = (
    'prompt_opt', 'prompt_lr', 'prompt_weight_decay', 'prompt_backbone_lr_scale', 'prompt_task_weight',
    'prompt_teacher_weight', 'prompt_student_weight',
)  # fmt: skip
# What is known of a prompt path once it exists.
_SHAPE = (
    'prompt_stages', 'prompt_reduction', 'prompt_partial_ratio', 'prompt_kernel_sizes', 'prompt_norm', 'prompt_act',
    'prompt_fusion', 'prompt_fusion_rank', 'prompt_block', 'prompt_head', 'prompt_head_init_scale', 'prompt_head_rank',
    'prompt_norms',
)  # fmt: skip
_Unused = Callable[[Options, Sequence[str]], bool]
# Options, when they have no effect, what with, and the remedy besides leaving them out.
_RULES: tuple[tuple[tuple[str, ...], _Unused, str, str], ...] = (
    (
        ('model_ema_decay', 'model_ema_warmup'),
        lambda config, methods: not config.model_ema, 'without a moving average', 'give --model-ema',
    ),
    (
        ('mixup_prob',),
        lambda config, methods: not (config.mixup or config.cutmix), 'with mixup=0 and cutmix=0',
        'give --mixup or --cutmix',
    ),
    (
        ('patience',),
        lambda config, methods: (config.patience or 0) * config.val_interval >= config.epochs,
        'in a run of so few validations', 'lower it or --val-interval',
    ),
    (('aug_cycle',), lambda config, methods: config.no_aug, 'with --no-aug', 'leave --no-aug out'),
    (
        ('teacher_cache_dir',),
        lambda config, methods: not config.cache_teacher, 'without a cache', 'give --cache-teacher',
    ),
    (
        ('private',),
        lambda config, methods: not (config.push_to_hub or config.push_prompt_path), 'where nothing is published',
        'give --push-to-hub or --push-prompt-path',
    ),
    (
        _SHAPE,
        lambda config, methods: config.prompt_path is not None, 'with --prompt-path, which brings its own',
        'leave --prompt-path out',
    ),
    (
        _TUNING,
        lambda config, methods: config.freeze_prompt_path or config.prompt_epochs in ('0', '0%'),
        'on a prompt path that is not tuned', 'let it be tuned with --prompt-epochs',
    ),
    (
        ('prompt_backbone_lr_scale',),
        lambda config, methods: not any(METHODS[name].copies_backbone for name in methods),
        'without a copy of the backbone', 'choose --method dfpt+',
    ),
    (
        ('task_loss_weight', 'distill_loss_weight', 'distill_warmup_epochs'),
        lambda config, methods: all(METHODS[name].variant for name in methods),
        'with dfpt and dfpt+, which have a weight for each term', 'add a plain method with --baselines kd',
    ),
    (
        ('teacher_dtype', 'teacher_kwargs'),
        lambda config, methods: not any(METHODS[name].needs_teacher for name in methods),
        'without a teacher', 'choose a method that has one',
    ),
)  # fmt: skip


def refuse_unused(config: Options, given: Sequence[str], methods: Sequence[str]) -> None:
    """Refuse options that were given and have no effect on any of the methods.

    Args:
        config: The options.
        given: Names of those that were given and are not as by default.
        methods: What is trained.

    Raises:
        ValueError: If an option has no effect; the message says with what, and the remedy.
    """
    known = [name for name in methods if name in METHODS]
    for names, unused, reason, remedy in _RULES:
        for name in names:
            if name in given and known and unused(config, known):
                raise ValueError(
                    f'{name}={getattr(config, name)!r} has no effect {reason}: leave it out, or {remedy}.'
                )
