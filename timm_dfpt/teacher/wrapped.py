"""Which models are wrapped, by which teachers, and what was there before."""
from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from ..backbone.modes import ModelState
from .prefix import PrefixRecorder

__all__ = ['register', 'remove_hooks', 'state_before', 'teachers_of', 'unregister']

# By module, for every module with tensors in it. Copies of a model alone are not here, and so as free as any model.
_TEACHERS: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
_STATES: weakref.WeakKeyDictionary[nn.Module, ModelState] = weakref.WeakKeyDictionary()


def teachers_of(model: nn.Module) -> list[Any]:
    """Return the teachers that have wrapped a model, a part of it, or a model of which it is a part."""
    return list({id(teacher): teacher for part in model.modules() for teacher in _TEACHERS.get(part, ())}.values())


def state_before(model: nn.Module) -> ModelState:
    """Return what was there before the first teacher of a model, or is there now if it has none."""
    state = _STATES.get(model)
    thawed = any(p.requires_grad for p in model.parameters()) or any(module.training for module in model.modules())
    if state is None or (thawed and not _TEACHERS.get(model)):
        state = _STATES[model] = ModelState(model)
    return state


def register(teacher: Any) -> None:
    """Note that a teacher has wrapped its model, and keep that frozen, whoever calls it."""
    for module in teacher.model.modules():
        if module is teacher.model or module._parameters or module._buffers:
            _TEACHERS.setdefault(module, weakref.WeakSet()).add(teacher)
    if _freeze_before_call not in teacher.model._forward_pre_hooks.values():
        teacher.model.register_forward_pre_hook(_freeze_before_call)


def unregister(teacher: Any) -> bool:
    """Note that a teacher has given its model back; return whether it was the last one of that model."""
    for module in teacher.model.modules():
        if module in _TEACHERS:
            _TEACHERS[module].discard(teacher)
    if _TEACHERS.get(teacher.model):
        return False
    _STATES.pop(teacher.model, None)
    return True


def _freeze_before_call(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    teacher = next(iter(_TEACHERS.get(module, ())), None)
    if teacher is not None:
        teacher.keep_frozen()


def remove_hooks(model: nn.Module) -> None:
    """Remove what a teacher has left on a model: one that is gone, or whose model this is a copy of."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            ours = [key for key, hook in hooks.items() if hook is _freeze_before_call or type(hook) is PrefixRecorder]
            for key in ours:
                del hooks[key]
