"""Where a backbone can be opened: the modules after which the prompt path puts its blocks."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from .calibration import calibrate, calibration_input
from .modes import look_through
from .rules import StageRule, apply_rename, rule_for
from .types import Stage, Tap, name_of

__all__ = ['find_stages', 'find_taps']

_DEFAULT_NUM_STAGES = 4


def find_stages(
    model: nn.Module,
    stages: int | Sequence[str] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> list[Stage]:
    """Find the stages of a backbone, by its `feature_info` and a calibration pass.

    Args:
        model: Any timm model, or with a list of module names any model that returns tensors there.
        stages: `None` for the model's own stages (at most four; a plain transformer's blocks are grouped evenly), a
            number for that many, or a list of module names in the order in which they run.
        input_size: Size `(C, H, W)` of the calibration input; by default the smallest that the model takes.

    Returns:
        The stages in the order in which they run. A feature that the model's output does not depend on is left out.

    Raises:
        ValueError: If the stages cannot be found; the message names the model, the reason and the remedy.
    """
    model = look_through(model)
    return list(calibrate(model, find_taps(model, stages), calibration_input(model, input_size)).stages)


def find_taps(model: nn.Module, stages: int | Sequence[str] | None) -> list[Tap]:
    """Choose the modules that end a stage; `stages` is as in `find_stages`."""
    if isinstance(stages, Sequence) and not isinstance(stages, str):
        return _named_taps(model, stages)
    if stages is not None and (type(stages) is not int or stages < 1):
        raise ValueError(f'stages must be None, a positive number of stages or a list of module names, got {stages!r}.')
    taps = _own_taps(model)
    if not taps:
        raise ValueError(
            f'{name_of(model)} has no feature_info to find its stages by. Name the modules that end a stage, e.g. '
            'stages=["layer1", "layer2", "layer3"].'
        )
    # More than that, and all alike: the blocks of a plain transformer, not stages.
    if len(taps) > _DEFAULT_NUM_STAGES and len({(t.channels, t.reduction) for t in taps}) == 1:
        count = stages or _DEFAULT_NUM_STAGES
        if count <= len(taps):
            return [taps[math.ceil(len(taps) * (i + 1) / count) - 1] for i in range(count)]
    count = stages or min(_DEFAULT_NUM_STAGES, len(taps))
    if count > len(taps):
        raise ValueError(f'stages={stages} is more than the {len(taps)} stages that {name_of(model)} has.')
    return taps[-count:]


def _own_taps(model: nn.Module) -> list[Tap]:
    """Return what the model's family or its `feature_info` names, in order and each module once."""
    rule = rule_for(model)
    modules = dict(model.named_modules())
    if rule.modules:
        return [Tap(_last_child(modules, name), leaves=rule.leaves) for name in rule.modules if name in modules]
    info = getattr(model, 'feature_info', None)
    taps: dict[str, Tap] = {}
    for entry in getattr(info, 'info', info) or []:
        tap = _tap_of(entry, modules, rule)
        if tap.module in taps:
            # Listed once for each of its branches, so that the channels are those of one branch only.
            tap = Tap(tap.module, leaves=rule.leaves)
        taps[tap.module] = tap
    return list(taps.values())


def _tap_of(entry: dict[str, Any], modules: dict[str, nn.Module], rule: StageRule) -> Tap:
    renamed = apply_rename(rule, entry['module'])
    channels, reduction = entry['num_chs'], entry['reduction']
    if rule.own_channels and renamed != entry['module']:
        channels = reduction = None
    return Tap(_last_child(modules, renamed), channels, reduction, rule.leaves)


def _named_taps(model: nn.Module, names: Sequence[Any]) -> list[Tap]:
    modules = dict(model.named_modules())
    if not names:
        raise ValueError('stages=[] is empty: name at least one module, or leave stages=None.')
    for name in names:
        if not isinstance(name, str) or name not in modules or not name:
            raise ValueError(
                f'stages names {name!r}, which is not a module of {name_of(model)}. '
                'See [name for name, _ in model.named_modules()].'
            )
    found = [_last_child(modules, name) for name in names]
    if len(set(found)) != len(found):
        raise ValueError(f'stages={list(names)!r} names a module twice: name each once.')
    known = {tap.module: tap for tap in _own_taps(model)}
    return [known.get(name) or Tap(name, leaves=rule_for(model).leaves) for name in found]


def _last_child(modules: dict[str, nn.Module], name: str) -> str:
    """Return the last child of a container instead of it.

    timm's `checkpoint_seq` runs the children of an `nn.Sequential` one by one and so bypasses a hook on the container;
    an `nn.ModuleList` is never called at all.
    """
    module: Any = modules.get(name)
    while type(module) in (nn.Sequential, nn.ModuleList) and len(module):
        name = f'{name}.{list(module._modules)[-1]}'
        module = modules.get(name)
    return name
