"""timm's optimizers and learning rate schedules by name, and whether they can train anything here."""
from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2

from ..data.checks import nearest

__all__ = [
    'SCHEDULES', 'SCHEDULE_OPTIONS', 'check_optimizer', 'check_schedule', 'check_used', 'create_optimizer',
    'create_scheduler', 'describe_average', 'describe_decay', 'shortened',
]  # fmt: skip

SCHEDULES: dict[str, tuple[str, ...]] = {
    'cosine': ('min_lr',),
    'tanh': ('min_lr',),
    'step': ('decay_epochs', 'decay_rate'),
    'constant': (),
    'multistep': ('decay_milestones', 'decay_rate'),
    'poly': ('decay_rate', 'min_lr'),
    'wsd': ('decay_epochs', 'min_lr'),
    'rsqrt': ('decay_epochs', 'min_lr'),
    'none': (),
}
"""The options of a decay that each schedule uses. All of timm's but plateau: the learning rate must follow from the
number of the update alone."""

SCHEDULE_OPTIONS = (
    'sched', 'epochs', 'warmup_epochs', 'warmup_lr', 'min_lr', 'decay_epochs', 'decay_milestones', 'decay_rate'
)  # fmt: skip

# As in models: an affine weight, a matrix, a token and a convolution.
_SHAPES = ((3,), (3, 2), (1, 1, 3), (4, 2, 3, 3))
_LOOKAHEAD = 'lookahead_'


def create_optimizer(name: str, parameters: Any, fused: bool = False, **kwargs: Any) -> torch.optim.Optimizer:
    """Create an optimizer by timm's name, which may start with `lookahead_`.

    Args:
        name: The name.
        parameters: A model or parameter groups.
        fused: Whether to take torch's fused implementation.
        **kwargs: Arguments of timm's factory.
    """
    if not fused:
        return create_optimizer_v2(parameters, opt=name, **kwargs)
    optimizer = create_optimizer_v2(parameters, opt=name, fused=True, **kwargs)
    # Else a gradient scaler leaves it to the kernel to skip an overflow, and where that is the first step of all,
    # torch's fused SGD goes on with a momentum that nothing was ever written to.
    optimizer._step_supports_amp_scaling = False
    return optimizer


@functools.cache
def check_optimizer(option: str, name: str, fused: bool, cpu: bool, **settings: float) -> None:
    """Let an optimizer do a step on a few weights.

    Args:
        option: The option that names it, for messages.
        name: The name.
        fused: Whether it should be fused.
        cpu: Whether to train on the CPU even where there is a GPU.
        **settings: Learning rate and the like, under the names of timm's factory.

    Raises:
        ValueError: If timm has no such optimizer, or the step fails; the message names the option and the remedy.
    """
    known, plain = list_optimizers(), _plain(name)
    if plain not in known:
        # timm's own error names neither the option nor the optimizer that was meant.
        hint = nearest(name, known) or ' See timm.optim.list_optimizers().'
        raise ValueError(f'{option} must be an optimizer of timm, got {name!r}.{hint}')
    info = get_optimizer_info(plain)
    if info.second_order:
        raise ValueError(
            f'{option}={name} needs second derivatives, which are not computed here: choose another optimizer.'
        )
    try:
        if fused and 'fused' not in inspect.signature(get_optimizer_class(plain, bind_defaults=False)).parameters:
            raise ValueError('no fused implementation: leave --opt-fused out, or choose sgd, momentum, adam or adamw')
        # Those of other packages, which timm imports by name, are for GPUs.
        on_gpu = isinstance(info.opt_class, str) and not cpu and torch.cuda.is_available()
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0))) if on_gpu else torch.device('cpu')
        _try_step(name, fused, device, settings)
    except Exception as error:  # noqa: BLE001
        prefix = option.removesuffix('opt')
        given = ', '.join(f'{prefix}{key}={value:g}' for key, value in settings.items())
        reason = ' '.join(str(error).split()).rstrip('.') or type(error).__name__
        remedy = 'Choose another optimizer.'
        if _has_momentum(name) and settings.get('momentum') == 0:
            remedy = "Use --opt momentum, which is torch's SGD without Nesterov's momentum, or give --momentum above 0."
        raise ValueError(f'{option}={name} cannot train with {given}: {reason}. {remedy}') from error


def _try_step(name: str, fused: bool, device: torch.device, settings: dict[str, float]) -> None:
    # Neither its random numbers are used up nor anything compiled that the models have no use for.
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance('force_eager'):
        weights = [torch.ones(shape, device=device, requires_grad=True) for shape in _SHAPES]
        optimizer = create_optimizer(name, [{'params': weights}], fused, **settings)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()


def _plain(name: str) -> str:
    return name.lower().removeprefix(_LOOKAHEAD)


def _has_momentum(name: str) -> bool:
    return bool(get_optimizer_info(_plain(name)).has_momentum)


def check_used(name: str, value: Any, opt: str, sched: str, warmup_epochs: int) -> None:
    """Refuse an option that neither the optimizer nor the schedule uses.

    Args:
        name: The option.
        value: Its value.
        opt: The optimizer.
        sched: The schedule.
        warmup_epochs: Epochs of warm-up.

    Raises:
        ValueError: If it has no effect; the message says with what, and the remedy.
    """
    users = [each for each, used in SCHEDULES.items() if name in used]
    if users and sched not in users:
        reason, remedy = f'sched={sched}', f'choose --sched {users[0]}'
    elif name == 'momentum' and not _has_momentum(opt):
        reason, remedy = f'opt={opt}', 'choose --opt momentum'
    elif name == 'warmup_lr' and not warmup_epochs:
        reason, remedy = 'warmup_epochs=0', 'give --warmup-epochs'
    else:
        return
    raise ValueError(f'{name}={value!r} has no effect with {reason}: leave it out, or {remedy}.')


def create_scheduler(
    optimizer: torch.optim.Optimizer,
    updates_per_epoch: int,
    *,
    sched: str,
    epochs: int,
    warmup_epochs: float,
    warmup_lr: float,
    min_lr: float,
    decay_epochs: float | None,
    decay_milestones: Sequence[int],
    decay_rate: float,
) -> Any:
    """Create a learning rate schedule of timm that counts updates; the arguments are options of the job.

    Args:
        optimizer: What it is for.
        updates_per_epoch: Updates per epoch.
        sched: One of `SCHEDULES`.
        epochs: Epochs of the run.
        warmup_epochs: Epochs of linear warm-up, and the time scale of `rsqrt`, which is one epoch where there are none.
        warmup_lr: Learning rate at the start of the warm-up, but never above what it warms up to.
        min_lr: Learning rate at the end, but never above what it starts from.
        decay_epochs: Epochs between two decays of `step`; epochs at the end in which `wsd` and `rsqrt` decay. Below 1 a
            share of the epochs (after the warm-up for `wsd` and `rsqrt`). None for 0.3 (`step`) or 0.2.
        decay_milestones: Epochs at which `multistep` decays.
        decay_rate: Factor of a decay; the power of `poly`.

    Returns:
        The schedule, or None for `none`.
    """
    lowest = min(group['lr'] for group in optimizer.param_groups)
    decay = decay_epochs
    if sched == 'step':
        decay = decay_epochs or 0.3
        if decay < 1:
            decay *= epochs
    elif sched in ('wsd', 'rsqrt'):
        after_warmup = epochs - warmup_epochs
        share = decay_epochs or 0.2
        if share >= 1:
            share /= after_warmup
        # timm takes numbers below 1 for shares, and needs an update to decay in.
        share = max(share, 1 / (after_warmup * updates_per_epoch))
        decay = share if share < 1 else after_warmup
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=sched,
        num_epochs=epochs,
        decay_epochs=decay,
        decay_milestones=decay_milestones,
        decay_rate=decay_rate,
        min_lr=min(min_lr, lowest),
        warmup_lr=min(warmup_lr, lowest),
        warmup_epochs=warmup_epochs,
        stable_timescale=max(1, warmup_epochs),
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def shortened(schedule: dict[str, Any], epochs: int | None, updates_per_epoch: int) -> dict[str, Any]:
    """Return the options of a schedule for what is trained in the first epochs of a run only.

    Args:
        schedule: The options of the run's schedule, see `create_scheduler`.
        epochs: Number of these epochs; `None` for all.
        updates_per_epoch: Updates per epoch.

    Returns:
        Those of the run where these are all of its epochs. Otherwise a cosine to zero, of which the same share is
        warm-up, in whole updates.
    """
    if epochs is None or not 0 < epochs < schedule['epochs']:
        return schedule
    warmup = schedule['warmup_epochs'] * epochs * updates_per_epoch // schedule['epochs'] / updates_per_epoch
    return {**schedule, 'sched': 'cosine', 'epochs': epochs, 'warmup_epochs': warmup, 'min_lr': 0.0}


def check_schedule(
    *,
    sched: str,
    epochs: int,
    warmup_epochs: int,
    decay_epochs: float | None,
    decay_milestones: Sequence[int],
    decay_rate: float,
    **_: Any,
) -> None:
    """Check that a schedule can do what its options say; see `create_scheduler`.

    Raises:
        ValueError: If it cannot; the message names the option and the remedy.
    """
    if sched == 'none' and warmup_epochs:
        raise ValueError(f'warmup_epochs={warmup_epochs} has no effect with sched=none: use --sched constant.')
    if sched in ('tanh', 'wsd', 'rsqrt') and warmup_epochs >= epochs:
        raise ValueError(f'warmup_epochs={warmup_epochs} must be less than epochs={epochs} with sched={sched}.')
    if sched in ('wsd', 'rsqrt') and (decay_epochs or 0) > epochs - warmup_epochs:
        raise ValueError(
            f'decay_epochs={decay_epochs:g} must be at most the {epochs - warmup_epochs} epochs after the warm-up with '
            f'sched={sched}.'
        )
    if sched == 'multistep' and list(decay_milestones) != sorted(decay_milestones):
        raise ValueError(f'decay_milestones={list(decay_milestones)} must be in ascending order.')
    if sched in ('step', 'multistep') and decay_rate > 1:
        raise ValueError(f'decay_rate={decay_rate:g} must be at most 1 with sched={sched}: it is a factor.')


def describe_decay(updates_per_epoch: int, lr: float, **options: Any) -> str | None:
    """Describe a schedule that should lower the learning rate and hardly does.

    Args:
        updates_per_epoch: Updates per epoch.
        lr: Learning rate.
        **options: Those of `create_scheduler`.

    Returns:
        One line, if the learning rate of the last update is more than half of the highest.
    """
    used, sched = SCHEDULES[options['sched']], options['sched']
    if not used:
        return None
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler = create_scheduler(optimizer, updates_per_epoch, **options)
    last, rates = options['epochs'] * updates_per_epoch - 1, []
    for update in (*range(0, last, max(updates_per_epoch, last // 1000)), last):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]['lr'])
    if 2 * rates[-1] <= max(rates):
        return None
    given = ', '.join(f'{name}={options[name]}' for name in ('epochs', 'warmup_epochs', *used))
    change = 'never lowers the learning rate'
    if rates[-1] < max(rates):
        change = f'lowers the learning rate to {rates[-1]:.2g} only'
    return f'sched={sched} {change} in this run of {last + 1} updates (lr={lr:g}, {given}).'


def describe_average(updates: int, decay: float, warmup: bool) -> str | None:
    """Describe a moving average that hardly gets away from the weights that it starts with.

    Args:
        updates: Updates of the run.
        decay: Its decay.
        warmup: Whether the decay grows with the updates, as timm has it: then it forgets the first ones at once.

    Returns:
        One line, if after the last update half of the average is still older than the second.
    """
    share = 0.0 if warmup else decay ** (updates - 1)
    if share < 0.5 or updates < 2:
        return None
    return (
        f'model_ema_decay={decay:g}: after the {updates:,} updates of this run, {share:.0%} of the average are still '
        'the weights of the first. Use --model-ema-warmup, or a lower --model-ema-decay.'
    )
