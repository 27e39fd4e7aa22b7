"""Columns of a split: which one holds images, which one labels, and what they are."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import FileTable, ImageFiles
from .image_split import TableImages
from .metadata import LABEL_COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ['find_image_column', 'find_label_column', 'images_of', 'is_unlabelled', 'local_classes']

_MAX_NAME = 1000  # what a published student may call a class

def find_image_column(dataset: Dataset | FileTable, named: str | None) -> str:
    """Return the column of the images.

    Args:
        dataset: A split.
        named: The column that the user named, if any.

    Raises:
        ValueError: If there is no such column, or it is not clear which one it is.
    """
    if named is not None:
        return _check_named(dataset, named, 'input_key')
    if isinstance(dataset, FileTable):
        return 'image'
    from datasets import Image  # costs 0.5 s

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, Image) or _is_raw(feature)]
    if len(columns) != 1:
        problem = f'several image columns, {columns}' if columns else f'no image column among {dataset.column_names}'
        raise ValueError(f'{problem}; name one with --input-key.')
    return columns[0]


def _check_named(dataset: Dataset | FileTable, named: str, option: str) -> str:
    if named not in dataset.column_names:
        raise ValueError(
            f'{option}={named!r} is unknown; the dataset has the columns {dataset.column_names}: name one of them '
            f'with --{option.replace("_", "-")}.'
        )
    return named


def _is_raw(feature: Any) -> bool:
    return isinstance(feature, dict) and set(feature) == {'bytes', 'path'}


def find_label_column(dataset: Dataset | FileTable, named: str | None, image_column: str) -> str:
    """Return the column of the labels.

    Args:
        dataset: A split.
        named: The column that the user named, if any.
        image_column: The column of the images.

    Raises:
        ValueError: If there is no such column, or it is not clear which one it is.
    """
    if named is not None:
        return _check_named(dataset, named, 'target_key')
    if isinstance(dataset, FileTable):
        if dataset.labels is None:
            raise ValueError('there is no label column, and the images are not in class folders')
        return 'label'
    from datasets import ClassLabel, Value  # costs 0.5 s

    others = {name: feature for name, feature in dataset.features.items() if name != image_column}
    columns = [name for name, feature in others.items() if isinstance(feature, ClassLabel)]
    if not columns:
        usable = [name for name, feature in others.items() if isinstance(feature, Value)]
        columns = [name for name in LABEL_COLUMNS if name in usable][:1] or usable
    if len(columns) != 1:
        problem = f'several label columns, {columns}' if columns else f'no label column among {dataset.column_names}'
        raise ValueError(f'{problem}; name one with --target-key.')
    return columns[0]


def images_of(dataset: Dataset | FileTable, image_column: str) -> ImageFiles | TableImages:
    """Return the images of a split, not decoded.

    Raises:
        ValueError: If the column does not hold images.
    """
    problem = f'input_key={image_column!r} does not hold images'
    if isinstance(dataset, FileTable):
        if image_column != 'image':
            raise ValueError(f'{problem}; leave --input-key out.')
        return dataset.files
    from datasets import Image  # costs 0.5 s

    feature = dataset.features[image_column]
    if isinstance(feature, Image) and not feature.decode:
        return TableImages(dataset, image_column)
    try:
        return TableImages(dataset.cast_column(image_column, Image(decode=False)), image_column)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f'{problem}: {error}; name another column with --input-key.') from error


def _values(dataset: Dataset, column: str) -> list[Any]:
    return dataset.select_columns(column).with_format(None)[column][:]


def is_unlabelled(dataset: Dataset | FileTable, column: str) -> bool:
    """Say whether no row has a label, of which there need not be a column then."""
    if isinstance(dataset, FileTable):
        return len(dataset) == 0
    if column not in dataset.column_names:
        return True
    return all(value in (None, -1) for value in _values(dataset, column))


def local_classes(dataset: Dataset | FileTable, column: str, where: str) -> tuple[list[str], np.ndarray]:
    """Return the names of the classes, in unicode NFC, and the class number of each row, int64 `[N]`.

    Args:
        dataset: A split.
        column: The column of the labels.
        where: The column in words.

    Raises:
        ValueError: If a row has no label, or a class no name that it can be published with.
    """
    if isinstance(dataset, FileTable):
        if len(dataset) == 0:
            raise ValueError(f'{where} is empty')
        if column != 'label' or dataset.labels is None:
            raise ValueError(f'{where} holds images; name another column with --target-key.')
        return _checked_names(dataset.classes or [], where), dataset.labels
    from datasets import ClassLabel  # costs 0.5 s

    values = _values(dataset, column)
    if not values:
        raise ValueError(f'{where} is empty')
    missing = [row for row, value in enumerate(values) if value is None]
    if missing:
        raise ValueError(
            f'{where} has no label in {len(missing)} rows, the first is row {missing[0]}; remove these rows.'
        )
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        names, local = list(feature.names), np.array(values, dtype=np.int64)
        outside = np.flatnonzero((local < 0) | (local >= len(names)))
        if outside.size:
            row = int(outside[0])
            raise ValueError(
                f'{where} has {outside.size} labels out of range: row {row} has {local[row]}, the {len(names)} '
                f'classes are 0 to {len(names) - 1}; correct or remove these rows.'
            )
    elif isinstance(values[0], (str, int)):
        # Integers sort by value: as text, class 10 would come before class 2.
        unique = sorted(set(values))
        if unique[0] == -1:
            raise ValueError(
                f'{where} has rows without a label (-1), the first is row {values.index(-1)}; remove these rows.'
            )
        index = {value: i for i, value in enumerate(unique)}
        names, local = [str(value) for value in unique], np.array([index[value] for value in values], dtype=np.int64)
    else:
        raise ValueError(
            f'{where} holds {type(values[0]).__name__}; labels must be class labels, strings or integers: name '
            'another column with --target-key.'
        )
    return _checked_names(names, where), local


def _checked_names(names: list[str], where: str) -> list[str]:
    names = [unicodedata.normalize('NFC', name) for name in names]
    wrong = [name for name in names if not 0 < len(name) <= _MAX_NAME]
    if wrong:
        what = f'a class whose name has {len(wrong[0])} characters' if wrong[0] else 'a class without a name (\'\')'
        raise ValueError(
            f'{where} has {what}, which cannot be published with a student: rename it, or name another column with '
            '--target-key.'
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f'{where} has several classes named {twice[0]!r} (in Unicode NFC); rename or merge them.')
    return names
