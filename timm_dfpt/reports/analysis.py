"""What follows from the predictions of models: accuracy by class, confusions, where two models part."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from .predictions import Predicted, SplitPredictions

__all__ = [
    'ClassCounts', 'Confusion', 'Group', 'agreement', 'class_counts', 'confusion_matrix', 'confusions', 'groups',
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ClassCounts:
    """Images and right answers by class.

    Args:
        images: Images of each class, int64 `[K]`.
        right: Those of them that each model has right, int64 `[K]` by model.
    """

    images: torch.Tensor
    right: Mapping[str, torch.Tensor]

    def accuracy(self, model: str) -> torch.Tensor:
        """Return the accuracy by class in percent, float64 `[K]`; NaN where there is no image."""
        return 100 * self.right[model].double() / self.images


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Images of a class that are taken for another.

    Args:
        target: The class they are of.
        predicted: The class they are taken for.
        count: How many.
    """

    target: int
    predicted: int
    count: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Images on which two models, or one and the labels, relate in the same way.

    Args:
        title: What they have in common.
        count: How many there are.
        rows: The first of them in the order that `title` says.
    """

    title: str
    count: int
    rows: Sequence[int]


def class_counts(split: SplitPredictions, num_classes: int) -> ClassCounts:
    """Count images and right answers by class; the split has labels."""
    target = _labels(split)
    right = {
        name: torch.bincount(target[said.classes == target], minlength=num_classes)
        for name, said in split.models.items()
    }
    return ClassCounts(torch.bincount(target, minlength=num_classes), right)


def confusion_matrix(said: Predicted, target: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Count images by their class (rows) and the class they are taken for (columns), int64 `[K, K]`."""
    cells = torch.bincount(target * num_classes + said.classes, minlength=num_classes**2)
    return cells.view(num_classes, num_classes)


def confusions(said: Predicted, target: torch.Tensor, num_classes: int) -> list[Confusion]:
    """Return the confusions of a model, the most frequent first."""
    wrong = said.classes != target
    # Not a matrix: with 22,000 classes it would have 4 GB.
    pairs, counts = torch.unique(target[wrong] * num_classes + said.classes[wrong], return_counts=True)
    order = torch.argsort(counts, descending=True, stable=True)
    cells = zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    return [Confusion(pair // num_classes, pair % num_classes, count) for pair, count in cells]


def agreement(split: SplitPredictions, model: str, other: str) -> dict[str, int]:
    """Count images by what two models predict.

    Returns:
        `both_right`, `only_model`, `only_other`, `same_mistake`, `other_mistakes` of a split with labels, else `same`
        and `different`.
    """
    one, two = split.models[model].classes, split.models[other].classes
    same = one == two
    if split.target is None:
        return {'same': int(same.sum()), 'different': int((~same).sum())}
    first, second = one == split.target, two == split.target
    parts = {
        'both_right': first & second,
        'only_model': first & ~second,
        'only_other': ~first & second,
        'same_mistake': ~first & same,
        'other_mistakes': ~first & ~second & ~same,
    }
    return {name: int(part.sum()) for name, part in parts.items()}


def groups(split: SplitPredictions, model: str, other: str | None, most: int) -> list[Group]:
    """Choose images to be shown.

    Args:
        split: Predictions.
        model: The model that it is about.
        other: The model that it is compared with, if any.
        most: The largest number of rows of a group.

    Returns:
        Groups with at least one image.
    """
    said = split.models[model]
    second = split.models[other].classes if other is not None else None
    names = (model.replace('_', ' '), str(other).replace('_', ' '))
    everything = torch.ones(len(split), dtype=torch.bool)
    chosen: list[tuple[str, torch.Tensor, bool]] = []
    if split.target is None:
        if second is not None:
            chosen.append((f'{names[0]} and {names[1]} differ', said.classes != second, True))
    elif second is None:
        chosen.append((f'{names[0]} wrong', said.classes != split.target, True))
    else:
        right, also = said.classes == split.target, second == split.target
        chosen += [
            (f'{names[0]} wrong, {names[1]} right', ~right & also, True),
            (f'{names[0]} and {names[1]} wrong', ~right & ~also, True),
            (f'{names[0]} right, {names[1]} wrong', right & ~also, True),
        ]
    chosen += [(f'{names[0]} most sure', everything, True), (f'{names[0]} least sure', everything, False)]
    return [
        Group(title, int(mask.sum()), _ordered(said.confidence, mask, surest)[:most])
        for title, mask, surest in chosen
        if mask.any()
    ]


def _ordered(confidence: torch.Tensor, mask: torch.Tensor, descending: bool) -> list[int]:
    rows = mask.nonzero()[:, 0]
    order = torch.argsort(confidence[rows], descending=descending, stable=True)
    return [int(row) for row in rows[order]]


def _labels(split: SplitPredictions) -> torch.Tensor:
    if split.target is None:
        raise ValueError('The split has no labels, which accuracy by class needs.')
    return split.target
