"""What is known of a classifier that a model has instead of its published one."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch

from ..backbone.modes import look_through

__all__ = ['ATTRIBUTE', 'FittedHead', 'fitted_head_of']

ATTRIBUTE = 'fitted_head'
"""Under which name a model carries it."""


@dataclasses.dataclass(frozen=True, eq=False)
class FittedHead:
    """What a model has for a classifier instead of its published one.

    Args:
        how: `'fitted'` by ridge regression, or `'reordered'`: the published one with its classes in another order.
        classifier: Names of the classifier modules.
        num_classes: Number of classes `K`.
        tensors: Weights and biases, and what else the published model does not have, by name in its state dict.
        published: What the published model has under the names of its classifier.
        images: Number of images that it was fitted to.
        balanced: Whether classes had the same weight.
        penalty: Penalty of the ridge regression per image.
        temperature: Temperature that its scores were divided by.
        accuracy: Top-1 in percent on images left out, one at a time.
        loss: Cross-entropy in nats on them.
    """

    how: Literal['fitted', 'reordered']
    classifier: tuple[str, ...]
    num_classes: int
    tensors: Mapping[str, torch.Tensor]
    published: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    images: int | None = None
    balanced: bool = False
    penalty: float | None = None
    temperature: float | None = None
    accuracy: float | None = None
    loss: float | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FittedHead:
        # Nothing in it ever changes.
        return self

    def facts(self) -> dict[str, Any]:
        """Return everything but tensors, as plain JSON types without what is unknown."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ('tensors', 'published')]
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**values, 'classifier': list(self.classifier)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> FittedHead:
        """Return the head that `facts` were written of.

        Args:
            facts: What `facts` returned, from a file that anybody may have written.
            tensors: Its tensors.

        Raises:
            ValueError: If a value is not allowed.
        """
        known = ('images', 'balanced', 'penalty', 'temperature', 'accuracy', 'loss')
        values = {key: facts[key] for key in known if key in facts}
        names: Any = facts.get('classifier')
        classes: Any = facts.get('num_classes')
        good = facts.get('how') in ('fitted', 'reordered') and type(classes) is int and classes > 0
        good = good and isinstance(names, list) and all(isinstance(name, str) for name in names)
        good = good and all(type(value) in (int, float, bool) for value in values.values())
        if not good:
            raise ValueError(
                'fitted_head must have the keys how, classifier, num_classes and numbers: the file is damaged.'
            )
        return cls(facts['how'], tuple(names), classes, dict(tensors), **values)

    def equals(self, other: FittedHead) -> bool:
        """Say whether another head has the same tensors to the bit."""
        return self.tensors.keys() == other.tensors.keys() and all(
            torch.equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items()
        )


def fitted_head_of(model: Any) -> FittedHead | None:
    """Return what stands in a model for its published classifier; `None` for the published one."""
    found = getattr(look_through(model), ATTRIBUTE, None)
    return found if isinstance(found, FittedHead) else None
