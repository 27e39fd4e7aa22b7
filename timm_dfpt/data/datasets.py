"""From the name of a data set to checked splits: which split is what, which column, which class has which number."""

from __future__ import annotations

import dataclasses
import logging
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .images import EncodedImage, check_image
from .sources import SPLIT_NAMES, open_dataset

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ['DataSplits', 'ImageSplit', 'load_splits']

_logger = logging.getLogger(__name__)

_LABEL_COLUMNS = ('label', 'labels', 'target', 'class')
_READ_ROWS = 512  # rows fetched at once: large enough to spare the overhead of a fetch, small enough for memory


@dataclasses.dataclass(frozen=True)
class ImageSplit:
    """One split: encoded images and their class numbers.

    Args:
        name: Name for messages, such as `train`.
        dataset: The rows, images not decoded.
        image_column: Column of the images.
        labels: Class number of each row, int64 `[N]`.
    """

    name: str
    dataset: Dataset
    image_column: str
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, rows: Sequence[int]) -> list[EncodedImage]:
        """Fetch images as they are stored: bytes, a path, or `None` where a row has no image."""
        cells = self.dataset[list(rows)][self.image_column]
        return [cell and (cell['bytes'] if cell['bytes'] is not None else cell['path']) for cell in cells]

    def describe(self, row: int) -> str:
        """Name a row so that a user finds it: its file if it has one, else split and row."""
        cell = self.dataset[row][self.image_column]
        place = f'row {row} of split {self.name!r}'
        return f'{cell["path"]} ({place})' if cell and cell['path'] else place

    def select(self, rows: Sequence[int] | np.ndarray, name: str | None = None) -> ImageSplit:
        """Take some of the rows, in the order given."""
        index = np.asarray(rows, dtype=np.int64)
        return ImageSplit(
            name or self.name, self.dataset.select(index), self.image_column, self.labels[torch.from_numpy(index)]
        )


@dataclasses.dataclass(frozen=True)
class DataSplits:
    """A data set ready for training.

    Args:
        train: Images to learn from.
        val: Images to make choices on.
        test: Images for the last number only, if the data set has labelled ones.
        class_names: Name of each class number.
        val_from: Where `val` comes from, in words.
    """

    train: ImageSplit
    val: ImageSplit
    test: ImageSplit | None
    class_names: list[str]
    val_from: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def load_splits(
    dataset: str,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    train_split: str | None = None,
    val_split: str | None = None,
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    on_bad_image: str = 'stop',
) -> DataSplits:
    """Load a data set for image classification and check it before any work starts.

    A data set without a validation split gets one: `val_fraction` of each class of the training split, the choice
    being a function of `seed`. The test split is never taken for it. Classes are matched between splits by name
    (unicode NFC). All images are checked by `check_image` (see there for what it finds): about 10,000 a second and
    core. To skip bad images they are decoded in full: some 5,000 a second and core of 32 x 32 pixels, 500 (PNG) to
    2,000 (JPEG) of 224 x 224.

    Args:
        dataset: A local folder of class folders (with or without `train`, `val`, `test` folders above them), a
            parquet file or a folder of them, or the id of a data set on the Hub.
        config_name: Configuration, for data sets that have several.
        revision: Revision on the Hub.
        train_split: Name of the training split, found if not given.
        val_split: Name of the validation split, found if not given.
        test_split: Name of the test split, found if not given.
        image_column: Column of the images, found from the features if not given.
        label_column: Column of the labels (class labels, strings or integers), found if not given.
        val_fraction: Share of the training images to split off when there is no validation split, in (0, 1).
        seed: Seed of that split, not negative.
        on_bad_image: `'stop'`: an unreadable image is an error. `'skip'`: it is left out, with a warning naming it.

    Returns:
        The splits. Rows of a split are numbered without what was left out.

    Raises:
        FileNotFoundError: If the data set is not found.
        ValueError: If it is not fit for training, or an argument does not fit it; the message names the remedy.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction={val_fraction} must be between 0 and 1, both excluded')
    if seed < 0:
        raise ValueError(f'seed={seed} must not be negative')
    if on_bad_image not in ('stop', 'skip'):
        raise ValueError(f"on_bad_image={on_bad_image!r} must be 'stop' or 'skip'")
    named = {'train': train_split, 'val': val_split, 'test': test_split}
    available = open_dataset(
        dataset,
        config_name=config_name,
        revision=revision,
        named_splits=tuple(name for name in named.values() if name is not None),
    )
    roles = _assign_roles(list(available), named)
    found = {role: available[name] for role, name in roles.items()}
    image = _find_image_column(found['train'], image_column)
    label = _find_label_column(found['train'], label_column, image)
    for role, split in found.items():
        missing = {image, label} - set(split.column_names)
        if missing:
            raise ValueError(f'split {roles[role]!r} has no column {missing.pop()!r}, it has {split.column_names}')

    if 'test' in found and test_split is None and _is_unlabelled(found['test'], label):
        _logger.warning('Split %r has no labels and is not used', roles['test'])
        del found['test']
    class_names, labels = _number_classes(found, label, roles)
    splits = {
        role: ImageSplit(roles[role], _undecoded(split, image), image, torch.from_numpy(labels[role]))
        for role, split in found.items()
    }
    splits = {role: _without_bad_images(split, on_bad_image) for role, split in splits.items()}
    _check_classes(splits, class_names)

    val_from = f'split {roles.get("val")!r}'
    if 'val' not in splits:
        name = roles['train']
        train_rows, val_rows = _stratified_split(splits['train'], class_names, val_fraction, seed)
        splits['val'] = splits['train'].select(val_rows, name=f'{name} (held out)')
        splits['train'] = splits['train'].select(train_rows)
        val_from = f'{val_fraction:.1%} of split {name!r}, stratified, seed {seed}'
    return DataSplits(splits['train'], splits['val'], splits.get('test'), class_names, val_from)


def _assign_roles(available: list[str], named: dict[str, str | None]) -> dict[str, str]:
    roles: dict[str, str] = {}
    for role, name in named.items():
        if name is not None and name not in available:
            raise ValueError(f'{role}_split={name!r} is unknown; the data set has the splits {available}')
        taken = {other for other in named.values() if other is not None} | set(roles.values())
        usual = [usual for usual in SPLIT_NAMES[role] if usual in available and usual not in taken]
        if name is not None:
            roles[role] = name
        elif usual:
            roles[role] = usual[0]
        elif role == 'train' and len(available) == 1:
            roles[role] = available[0]
    if 'train' not in roles:
        raise ValueError(f'no training split among {available}; name one with train_split')
    if len(set(roles.values())) < len(roles):
        raise ValueError(f'train, val and test splits must differ, got {roles}')
    return roles


def _find_image_column(dataset: Dataset, named: str | None) -> str:
    from datasets import Image

    if named is not None:
        if named not in dataset.column_names:
            raise ValueError(f'image_column={named!r} is unknown; the data set has the columns {dataset.column_names}')
        return named
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, Image) or _is_raw(feature)]
    if len(columns) != 1:
        problem = f'several image columns, {columns}' if columns else f'no image column among {dataset.column_names}'
        raise ValueError(f'{problem}; name one with image_column')
    return columns[0]


def _is_raw(feature: Any) -> bool:
    return isinstance(feature, dict) and set(feature) == {'bytes', 'path'}


def _find_label_column(dataset: Dataset, named: str | None, image_column: str) -> str:
    from datasets import ClassLabel, Value

    if named is not None:
        if named not in dataset.column_names:
            raise ValueError(f'label_column={named!r} is unknown; the data set has the columns {dataset.column_names}')
        return named
    others = {name: feature for name, feature in dataset.features.items() if name != image_column}
    columns = [name for name, feature in others.items() if isinstance(feature, ClassLabel)]
    if not columns:
        usable = [name for name, feature in others.items() if isinstance(feature, Value)]
        columns = [name for name in _LABEL_COLUMNS if name in usable][:1] or usable
    if len(columns) != 1:
        problem = f'several label columns, {columns}' if columns else f'no label column among {dataset.column_names}'
        raise ValueError(f'{problem}; name one with label_column')
    return columns[0]


def _undecoded(dataset: Dataset, image_column: str) -> Dataset:
    from datasets import Image

    feature = dataset.features[image_column]
    if isinstance(feature, Image) and not feature.decode:
        return dataset
    try:
        return dataset.cast_column(image_column, Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f'image_column={image_column!r} does not hold images: {error}') from error


def _values(dataset: Dataset, column: str) -> list[Any]:
    return dataset.select_columns(column).with_format(None)[column][:]


def _is_unlabelled(dataset: Dataset, column: str) -> bool:
    return all(value in (None, -1) for value in _values(dataset, column))


def _number_classes(
    splits: dict[str, Dataset], column: str, roles: dict[str, str]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Give every class a number that is the same in all splits; returns class names and numbers `[N]` by split."""
    names: list[str] = []
    numbers: dict[str, np.ndarray] = {}
    for role, dataset in splits.items():
        where = f'column {column!r} of split {roles[role]!r}'
        local_names, local = _local_classes(dataset, column, where)
        names = names or local_names
        unknown = {local_names[i] for i in np.unique(local)} - set(names)
        names = names + sorted(unknown)
        number = {name: i for i, name in enumerate(names)}
        numbers[role] = np.array([number.get(name, -1) for name in local_names], dtype=np.int64)[local]
    if len(names) < 2:
        raise ValueError(f'column {column!r} has only the class {names}; a classifier needs two at least')
    return names, numbers


def _local_classes(dataset: Dataset, column: str, where: str) -> tuple[list[str], np.ndarray]:
    from datasets import ClassLabel

    values = _values(dataset, column)
    if not values:
        raise ValueError(f'{where} is empty')
    missing = [row for row, value in enumerate(values) if value is None]
    if missing:
        raise ValueError(f'{where} has no label in {len(missing)} rows, the first is row {missing[0]}; remove them')
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        names, local = list(feature.names), np.array(values, dtype=np.int64)
        outside = np.flatnonzero((local < 0) | (local >= len(names)))
        if outside.size:
            row = int(outside[0])
            raise ValueError(
                f'{where} has {outside.size} labels out of range: row {row} has {local[row]}, '
                f'the {len(names)} classes are 0 to {len(names) - 1}'
            )
    elif isinstance(values[0], (str, int)):
        # Integers sort by value: as text, class 10 would come before class 2.
        unique = sorted(set(values))
        if unique[0] == -1:
            raise ValueError(f'{where} has rows without a label (-1), the first is row {values.index(-1)}; remove them')
        index = {value: i for i, value in enumerate(unique)}
        names, local = [str(value) for value in unique], np.array([index[value] for value in values], dtype=np.int64)
    else:
        raise ValueError(f'{where} holds {type(values[0]).__name__}; labels are class labels, strings or integers')
    names = [unicodedata.normalize('NFC', name) for name in names]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f'{where} has several classes named {twice[0]!r} (in unicode NFC); rename or join them')
    return names, local


def _check_classes(splits: dict[str, ImageSplit], class_names: list[str]) -> None:
    learnt = splits['train'].labels.unique().tolist()
    for split in splits.values():
        unlearnt = [class_names[label] for label in split.labels.unique().tolist() if label not in learnt]
        if unlearnt:
            raise ValueError(
                f'split {split.name!r} has images of class {unlearnt[0]!r}, of which split {splits["train"].name!r} '
                f'has none ({len(unlearnt)} such classes); add or remove some'
            )
    if len(learnt) < len(class_names):
        unused = [name for label, name in enumerate(class_names) if label not in learnt]
        _logger.warning('%d classes have no image at all: %s', len(unused), ', '.join(unused[:5]))


def _without_bad_images(split: ImageSplit, on_bad_image: str) -> ImageSplit:
    def check(start: int) -> dict[int, str]:
        rows = range(start, min(start + _READ_ROWS, len(split)))
        # A quick look is enough to stop soon; what it overlooks stops the run later, which is not to skip it.
        reasons = [check_image(source, in_full=on_bad_image == 'skip') for source in split.encoded(rows)]
        return {row: reason for row, reason in zip(rows, reasons, strict=True) if reason is not None}

    bad: dict[int, str] = {}
    with ThreadPoolExecutor() as pool:
        for part in pool.map(check, range(0, len(split), _READ_ROWS)):
            bad.update(part)
    if not bad:
        return split
    lines = [f'  {split.describe(row)}: {reason}' for row, reason in bad.items()]
    if on_bad_image == 'stop':
        shown = '\n'.join(lines[:5] + ['  ...'] * (len(lines) > 5))
        raise ValueError(
            f'{len(bad)} images of split {split.name!r} cannot be read:\n{shown}\n'
            "Repair or remove them, or leave them out with on_bad_image='skip'."
        )
    _logger.warning('%d unreadable images of split %r are left out:\n%s', len(bad), split.name, '\n'.join(lines))
    return split.select([row for row in range(len(split)) if row not in bad])


def _stratified_split(
    split: ImageSplit, class_names: list[str], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split off `fraction` of each class, one image at least; returns the rows left and the rows split off."""
    labels = split.labels.numpy()
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) == 1:
            raise ValueError(
                f'class {class_names[label]!r} has a single image in split {split.name!r}, which cannot be both learnt '
                'from and validated on; add images of it or give a validation split (val_split)'
            )
        count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
        # A generator per class: adding images to one class leaves the choice in all others as it was.
        order = np.random.Generator(np.random.PCG64([seed, int(label)])).permutation(len(rows))
        held_out[rows[order[:count]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
