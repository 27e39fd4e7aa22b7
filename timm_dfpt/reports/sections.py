"""Sections of a page that follow from predictions alone: classes, where two models part, confusions, calibration."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from . import figures
from .analysis import agreement, class_counts, confusion_matrix, confusions, groups
from .calibration import BINS, calibrate
from .names import shown
from .page import Block, Image, Section, gallery, matrix, table, text
from .page import figures as figure_block
from .predictions import SplitPredictions

__all__ = [
    'IMAGES', 'agreement_section', 'calibration_section', 'classes_section', 'confusion_section', 'images_section',
    'pick_classes', 'words',
]  # fmt: skip

IMAGES = 12
"""The largest number of images of a group."""

_ALL_CLASSES = 30
_END = 12
_MATRIX = 20
_CONFUSIONS = 15
_SQUARE = (4.2, 4.0)


def words(model: str) -> str:
    """Return the name of a model as a page writes it."""
    return model.replace('_', ' ')


def pick_classes(order: Sequence[int]) -> list[int]:
    """Return the classes that are shown: all if they are few, else those at both ends of the order."""
    return list(order) if len(order) <= _ALL_CLASSES else [*order[:_END], *order[-_END:]]


def classes_section(
    split: SplitPredictions, where: str, names: Sequence[str], model: str, other: str | None, colors: Mapping[str, int]
) -> Section:
    """Return the accuracy by class.

    Args:
        split: Predictions; without labels there is no such section.
        where: What the split is, in words.
        names: Names of the classes.
        model: The model that it is about.
        other: The model that it is compared with, if any.
        colors: Number of each model's color, in the order of the columns.
    """
    if split.target is None:
        return Section('classes', 'Accuracy by class', [])
    counts = class_counts(split, len(names))
    models = [name for name in colors if name in split.models]
    percents = {name: counts.accuracy(name) for name in models}
    gap = percents[model] - percents[other] if other is not None else percents[model]
    order = [int(i) for i in gap.argsort(stable=True) if counts.images[i]]
    chosen = pick_classes(order)
    head = ['class', 'images', *(f'{words(name)} %' for name in models)]
    if other is not None:
        head.append(f'{words(model)} - {words(other)}')
    rows = []
    for i in chosen:
        row = [shown(names[i]), f'{int(counts.images[i]):,}', *(f'{float(percents[name][i]):.1f}' for name in models)]
        rows.append(row + ([f'{float(gap[i]):+.1f}'] if other is not None else []))
    by = f'{words(model)} minus {words(other)}' if other is not None else words(model)
    note = f'On {where}, sorted by {by}.'
    if len(chosen) < len(order):
        note += f' {len(chosen)} of {len(order):,} classes: the {_END} at either end.'
    empty = len(names) - len(order)
    if empty:
        note += f' {empty:,} classes have no image here.'
    values = {name: [float(percents[name][i]) for i in chosen] for name in models}
    draw = figures.class_figure([names[i] for i in chosen], values, colors)
    drawing = figures.Drawing(draw, note, (7.2, 0.9 + 0.24 * len(chosen)))
    return Section('classes', 'Accuracy by class', [figure_block(drawing), table(head, rows)])


def agreement_section(split: SplitPredictions, where: str, model: str, others: Sequence[str]) -> Section:
    """Return how often a model and others agree, and where they part."""
    count, rows = len(split), []
    labels = {
        'both_right': 'both right', 'only_model': f'only {words(model)} right', 'only_other': 'only the other right',
        'same_mistake': 'same mistake', 'other_mistakes': 'different mistakes', 'same': 'same answer',
        'different': 'different answers',
    }  # fmt: skip
    head: list[str] = []
    for other in others:
        parts = agreement(split, model, other)
        head = [f'{words(model)} and', *(labels[part] for part in parts)]
        rows.append([words(other), *(f'{number:,} ({100 * number / count:.1f}%)' for number in parts.values())])
    title = f'Where {words(model)} and others part'
    return Section('parting', title, [table(head, rows, note=f'On {where}.')] if rows else [])


def confusion_section(
    split: SplitPredictions, where: str, names: Sequence[str], model: str, others: Sequence[str]
) -> Section:
    """Return the confusions that cost most."""
    title = 'Costliest confusions'
    if split.target is None:
        return Section('confusions', title, [])
    found = confusions(split.models[model], split.target, len(names))
    wrong = sum(each.count for each in found)
    if not found:
        return Section('confusions', title, [text(f'None: the {words(model)} is right about all of {where}.')])
    known = {
        name: {(c.target, c.predicted): c.count for c in confusions(split.models[name], split.target, len(names))}
        for name in others
    }
    first = found[0]
    blocks = [
        text(
            f'{shown(names[first.target])} taken for {shown(names[first.predicted])} costs most: {first.count:,} of '
            f'the {wrong:,} errors of the {words(model)}, {100 * first.count / len(split):.2f} points of accuracy.'
        )
    ]
    rows = []
    for each in found[:_CONFUSIONS]:
        pair = each.target, each.predicted
        row = [shown(names[each.target]), shown(names[each.predicted]), f'{each.count:,}']
        rows.append([*row, f'{100 * each.count / wrong:.1f}%', *(f'{known[name].get(pair, 0):,}' for name in others)])
    head = ['images of', 'taken for', words(model), f'share of its {wrong:,} errors', *map(words, others)]
    cut = f' The first {_CONFUSIONS} of {len(found):,} pairs.' if len(found) > _CONFUSIONS else ''
    blocks.append(table(head, rows, note=f'Images, on {where}.{cut}', text_columns=2))
    if len(names) <= _MATRIX:
        cells = confusion_matrix(split.models[model], split.target, len(names)).tolist()
        note = 'Rows: what the images are. Columns: what they are taken for.'
        blocks.append(matrix(names, cells, f'Every answer of the {words(model)}', note))
    return Section('confusions', title, blocks)


def calibration_section(
    fitted_on: SplitPredictions,
    measured_on: SplitPredictions | None,
    where: str,
    model: str,
    colors: Mapping[str, int],
) -> Section:
    """Return reliability and calibration error before and after a temperature.

    Args:
        fitted_on: Predictions on the validation data.
        measured_on: Predictions on the test data, if there are some.
        where: The data that it is measured on, in words.
        model: The model that it is about.
        colors: Number of each model's color, in the order of the rows.
    """
    title = 'Calibration'
    every = {name: calibrate(name, fitted_on, measured_on) for name in colors}
    known = {name: each for name, each in every.items() if each is not None}
    if model not in known:
        return Section('calibration', title, [])
    rows = [
        [
            words(name), f'{100 * each.before.error:.2f}', f'{100 * each.after.error:.2f}', f'{each.temperature:.3f}',
            f'{each.loss_before:.4f}', f'{each.loss_after:.4f}',
        ]
        for name, each in known.items()
    ]  # fmt: skip
    head = ['model', 'ECE %', 'ECE % after', 'temperature', 'loss', 'loss after']
    images = known[model].images
    half = 'the validation data' if measured_on is not None else 'a random half of the validation data'
    rest = f'{images:,} images of the other half'
    if measured_on is not None:
        rest = where if images == len(measured_on) else f'{images:,} of {where}'
    note = (
        f'ECE: expected calibration error, the mean distance between confidence and accuracy over {BINS} bins of equal '
        f'width; loss: cross entropy in nats. The temperature that logits are divided by is fitted on {half}, all is '
        f'measured on {rest}.'
    )
    after = f'{words(model)}, after temperature'
    lines = {words(model): known[model].before, after: known[model].after}
    numbers = {words(model): colors[model], after: 1}
    caption = f'Reliability of the {words(model)}; points grow with the number of images, ten at least.'
    drawn = [figures.Drawing(figures.reliability_figure(lines, numbers), caption, _SQUARE)]
    rest_of = {words(name): each.before for name, each in known.items() if name != model}
    if rest_of:
        named = {words(name): number for name, number in colors.items()}
        others = figures.reliability_figure(rest_of, named)
        drawn.append(figures.Drawing(others, 'The same of the others, as they are.', _SQUARE))
    blocks = [figure_block(*drawn), table(head, rows, note=note)]
    return Section('calibration', title, blocks)


def images_section(
    split: SplitPredictions,
    thumbnails: Mapping[int, bytes],
    names: Sequence[str],
    model: str,
    other: str | None,
) -> Section:
    """Return images that say more than numbers, in groups."""
    blocks: list[Block] = []
    for group in groups(split, model, other, IMAGES):
        images = [
            Image(thumbnails[row], _caption(split, row, names, model, other)) for row in group.rows if row in thumbnails
        ]
        share = f'{group.count:,} of {len(split):,} images of the validation data'
        title = group.title[:1].upper() + group.title[1:]
        blocks.append(gallery(title, images, f'{share}; {len(images)} are shown.'))
    return Section('images', 'Images', blocks if thumbnails else [])


def _caption(
    split: SplitPredictions, row: int, names: Sequence[str], model: str, other: str | None
) -> list[str]:
    lines = [shown(names[int(split.target[row])], 30)] if split.target is not None else []
    for name in filter(None, (model, other)):
        said = split.models[name]
        lines.append(f'{words(name)}: {shown(names[int(said.classes[row])], 30)} {_percent(said.confidence[row])}')
    return lines


def _percent(share: torch.Tensor) -> str:
    # 100% is said of nothing that is not rounded up to it.
    return f'{min(99.9, 100 * float(share)):.1f}%' if share < 0.99995 else '100%'
