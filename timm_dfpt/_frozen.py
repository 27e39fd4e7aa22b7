"""Taking a model into evaluation without gradients, and giving it back as it was."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

__all__ = ['ModelState', 'evaluating']


class ModelState:
    """What freezing a model changes: the mode of its modules and the `requires_grad` of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._training = [module.training for module in model.modules()]
        self._requires_grad = [param.requires_grad for param in model.parameters()]

    def restore(self, model: nn.Module) -> None:
        """Give `model` the modes and flags that were recorded."""
        for module, training in zip(model.modules(), self._training, strict=True):
            module.training = training
        for param, requires_grad in zip(model.parameters(), self._requires_grad, strict=True):
            param.requires_grad_(requires_grad)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` into evaluation, and each back into its own mode afterwards."""
    state = ModelState(model)
    try:
        model.eval()
        yield
    finally:
        state.restore(model)
