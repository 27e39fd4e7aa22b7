"""Taking a model into evaluation without gradients, keeping it there, and giving it back as it was."""
from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

__all__ = ['ModelState', 'evaluating', 'forget_caches', 'freeze', 'keep_frozen', 'look_through']

# Modules around a model that compute what it computes. By name, because importing some of them takes a second.
_WRAPPERS = {
    'OptimizedModule': '_orig_mod',
    'DataParallel': 'module',
    'DistributedDataParallel': 'module',
    'ModelEma': 'ema',
    'ModelEmaV2': 'module',
    'ModelEmaV3': 'module',
    'AveragedModel': 'module',
}


def look_through(model: Any) -> Any:
    """Return the model inside wrappers of `torch.compile`, data parallelism and moving averages.

    Not by the name of the attribute alone, as `timm.utils.unwrap_model` does: a user's model may well have a part
    that is called `module`.
    """
    while isinstance(model, nn.Module):
        names = (_WRAPPERS.get(c.__name__) for c in type(model).__mro__ if c.__module__.startswith(('torch.', 'timm.')))
        name = next(filter(None, names), None)
        if name is None:
            break
        model = getattr(model, name)
    return model


class ModelState:
    """What freezing changes: modes and compiled calls of modules, gradients and `requires_grad` of parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name: (m.training, m._compiled_call_impl) for name, m in model.named_modules()}
        self._parameters = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}

    def restore(self, model: nn.Module) -> None:
        """Give `model` what was recorded; what has been exchanged since then keeps its own."""
        for name, module in model.named_modules():
            module.training, compiled = self._modules.get(name, (module.training, None))
            if compiled is not None:
                module._compiled_call_impl = compiled
        for name, param in model.named_parameters():
            requires_grad, grad = self._parameters.get(name, (param.requires_grad, param.grad))
            param.requires_grad_(requires_grad)
            if grad is not None and grad.shape == param.shape:
                # The model may have been moved or converted since then.
                param.grad = grad.to(device=param.device, dtype=param.dtype)


def _evaluate(model: nn.Module) -> None:
    for module in model.modules():
        module.training = False
        if module._compiled_call_impl is not None:
            # What was compiled does not see the hooks that a module gets afterwards.
            module._compiled_call_impl = None


def forget_caches(modules: Iterable[nn.Module]) -> None:
    """Drop what timm's attention with biases keeps in evaluation, which is part of the graph it was computed in.

    LeViT, TinyViT, EfficientFormer and EfficientViT of MSRA index their biases once and keep the result until the next
    `train()`: weights that change meanwhile would not be seen, nor get a gradient, nor could the model be copied.
    """
    for module in modules:
        cache = module.__dict__.get('attention_bias_cache')
        if cache:
            cache.clear()


def freeze(model: nn.Module) -> None:
    """Put every module into evaluation, take back `module.compile()`, and drop gradients."""
    _evaluate(model)
    keep_frozen(model.modules())


def keep_frozen(modules: Iterable[nn.Module]) -> None:
    """Freeze again what was switched to training; costs little where nothing was."""
    compiling = torch.compiler.is_compiling()
    for module in modules:
        if module.training:
            module.training = False
        for param in module._parameters.values():
            if param is None:
                continue
            if param.requires_grad and param.is_leaf:
                param.requires_grad_(False)
            if not compiling and param.grad is not None:
                param.grad = None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` into evaluation, and each back into its own mode afterwards."""
    state = ModelState(model)
    try:
        _evaluate(model)
        yield
    finally:
        state.restore(model)
