"""Taking a model into evaluation without gradients, and giving it back as it was."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

__all__ = ['ModelState', 'evaluating']


class ModelState:
    """What freezing a model changes: the mode of its modules and the `requires_grad` of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._training = {name: module.training for name, module in model.named_modules()}
        self._requires_grad = {name: param.requires_grad for name, param in model.named_parameters()}

    def restore(self, model: nn.Module) -> None:
        """Give `model` the modes and flags that were recorded; what has been exchanged since then keeps its own."""
        for name, module in model.named_modules():
            module.training = self._training.get(name, module.training)
        for name, param in model.named_parameters():
            param.requires_grad_(self._requires_grad.get(name, param.requires_grad))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` into evaluation, and each back into its own mode afterwards."""
    state = ModelState(model)
    try:
        model.eval()
        yield
    finally:
        state.restore(model)
