"""What is refused before a model is wrapped, and where its classifier is."""
from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..backbone.calibration import calibration_input
from ..backbone.heads import ENCODER_HEAD
from ..backbone.modes import evaluating, forget_caches
from ..backbone.types import name_of
from .hooks import Injection
from .teacher import DualForwardPathTeacher
from .wrapped import remove_hooks, teachers_of

__all__ = ['check_finite', 'check_model', 'find_classifier']


def check_model(model: Any) -> None:
    """Refuse what cannot be wrapped, and clear what forwards and a former teacher have left on what can.

    Raises:
        TypeError: If it is not a module.
        ValueError: If it is wrapped already, or cannot be opened whatever its stages are.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a torch.nn.Module such as timm.create_model(...), got {type(model).__name__}.')
    kind = name_of(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f'{kind} is compiled by torch.jit: blocks cannot be put between its stages. Wrap the model before it is '
            'compiled.'
        )
    if any(isinstance(module, DualForwardPathTeacher) for module in model.modules()):
        raise ValueError('model is a DualForwardPathTeacher already, or contains one; wrap what its unwrap() returns.')
    if any(type(hook) is Injection for module in model.modules() for hook in module._forward_hooks.values()):
        raise ValueError(f'{kind} has prompt blocks already, as the prompt path of a teacher; wrap teacher.unwrap().')
    teachers = teachers_of(model)
    if any(teacher.model is not model for teacher in teachers):
        raise ValueError(
            f'{kind} is part of a model that is wrapped already, or has one in it: call unwrap() of its teacher first.'
        )
    if any(t.is_inference() for t in itertools.chain(model.parameters(), model.buffers())):
        raise ValueError(
            f'{kind} was created under torch.inference_mode(), which gradients cannot pass through. Create it outside.'
        )
    forget_caches(model.modules())
    if not teachers:
        remove_hooks(model)


def check_finite(model: nn.Module, logits: torch.Tensor) -> None:
    """Refuse a model that computes NaN or Inf, or has them in its weights.

    Args:
        model: The model.
        logits: What it returned for a calibration input `[B, K]`.

    Raises:
        ValueError: If something is not finite; the message names a tensor.
    """
    weights = [name for name, param in model.named_parameters() if not _is_finite(param)]
    if not weights and _is_finite(logits):
        return
    # Of buffers, masks of attention may well be infinite.
    bad = weights or [name for name, buffer in model.named_buffers() if not _is_finite(buffer)]
    found = f', and neither are {len(bad)} of its tensors, such as {bad[0]}' if bad else ''
    raise ValueError(
        f'The outputs of {name_of(model)} are not finite (NaN or Inf){found}: it cannot teach. Load other weights; if '
        'these are right, wrap the model in float32, or with the input_size=(channels, height, width) that it takes.'
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    return tensor.device.type == 'meta' or not tensor.is_floating_point() or bool(tensor.isfinite().all())


def find_classifier(
    model: nn.Module,
    classifier: str | Sequence[str] | None,
    num_classes: int | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> tuple[str, ...]:
    """Return the names of the classifier modules, none for an encoder that is to get a classifier.

    Args:
        model: The model.
        classifier: Their names, as far as they are known; `()` says that there are none.
        num_classes: Number of classes of a new head, which an encoder must get.
        input_size: `(C, H, W)` that the model takes; by default the smallest.

    Raises:
        ValueError: If there is none and `num_classes` is None, or it cannot be found.
    """
    kind = name_of(model)
    modules = dict(model.named_modules())
    names = classifier
    if names is None and ENCODER_HEAD in modules:
        names = ENCODER_HEAD
    if names is None:
        names = (getattr(model, 'pretrained_cfg', None) or {}).get('classifier')
    get_classifier: Any = getattr(model, 'get_classifier', None)
    if names is None and get_classifier is not None:
        found = get_classifier()
        names = next((name for name, module in modules.items() if module is found), None)
    names = (names,) if isinstance(names, str) else tuple(names) if names is not None else None
    bare = getattr(model, 'num_classes', None) == 0 and not _has_weights(modules, names or ())
    if bare or names == () or (names == (ENCODER_HEAD,) and ENCODER_HEAD not in modules):
        if num_classes is None:
            raise ValueError(
                f'{kind} is an encoder without a classifier{" (num_classes=0)" if bare else ""}, so it has no logits '
                'to start from: give num_classes=K, the number of your classes, and its prompt path gets a head of its '
                'own.'
            )
        return ()
    if names is None:
        last = _last_linear(model, input_size) if num_classes is not None else ''
        if last is None:
            return ()
        raise ValueError(
            f'{kind} does not name its classifier; name the module, e.g. classifier="{last or "fc"}".'
            + (f' If {last} is none and its outputs are features: classifier=().' if last else '')
        )
    missing = [name for name in names if name not in modules]
    if missing:
        raise ValueError(f'{kind} has no module {missing[0]!r}; name its classifier, e.g. classifier="fc".')
    return names


def _last_linear(model: nn.Module, input_size: tuple[int, int, int] | None) -> str | None:
    """Return the linear layer or 1x1 convolution whose output is the model's, which may well be a classifier."""
    outputs: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    x = calibration_input(model, input_size)
    try:
        with evaluating(model), torch.no_grad():
            output = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return next((name for name, found in outputs.items() if found is output), None)


def _has_weights(modules: dict[str, nn.Module], names: Sequence[str]) -> bool:
    return any(next(modules[name].parameters(), None) is not None for name in names if name in modules)
