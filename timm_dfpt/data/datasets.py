"""From the name of a dataset to checked splits: which split is what, which column, which class has which number."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .class_names import match_classes
from .columns import find_image_column, find_label_column, images_of, is_unlabelled, local_classes
from .image_split import ImageSplit
from .images import parse_color
from .inspection import SMALL, find_bad_images, warn_of_copies
from .sources import open_dataset
from .splits import assign_roles

if TYPE_CHECKING:
    from datasets import Dataset

    from .files import FileTable

__all__ = ['DataSplits', 'load_split', 'load_splits']

_logger = logging.getLogger(__name__)

# What to do about a split without labels.
_REMEDIES = {
    'train': ': name another split with --train-split or another column with --target-key, or train on the outputs of '
             'the teacher with --unlabelled',
    'val': ': name another split with --val-split',
    'test': ' and cannot be tested on: leave --test-split out, or name another split with it',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataSplits:
    """A dataset ready for training.

    Args:
        train: Images to learn from.
        val: Images to make choices on.
        test: Images for the last number only, if the dataset has labelled ones.
        class_names: Name of each class number.
        val_from: Where `val` comes from, in words.
    """

    train: ImageSplit
    val: ImageSplit
    test: ImageSplit | None
    class_names: list[str]
    val_from: str

    @property
    def checked(self) -> bool:
        """Whether all images have been read."""
        return self.train.findings is None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def load_splits(
    dataset: str,
    *,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    train_split: str | None = None,
    val_split: str | None = None,
    test_split: str | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    on_bad_image: str = 'stop',
    check_images: str = 'auto',
    background: str | None = None,
    teacher_classes: Sequence[str] | None = None,
    once: Callable[[Callable[[], Any]], Any] = lambda act: act(),
) -> DataSplits:
    """Load a dataset for image classification and check it before any work starts.

    A dataset without a validation split gets one: `val_fraction` of each class of the training split, the choice
    being a function of `seed`. The test split is never taken for it. Classes are matched between splits by name
    (unicode NFC).

    Up to 10,000 images are read before training (some 5,000 per second and core of 32 x 32 pixels, 500 (PNG) to 2,000
    (JPEG) of 224 x 224), and images of equal content on both sides of a split are counted. Of a larger folder only the
    names are read; what is to be said of its images is noted when they are first read (`ImageSplit.findings`).

    Args:
        dataset: What `open_dataset` takes: a local folder of images, parquet, what `save_to_disk` has written, or the
            id of a dataset on the Hub.
        dataset_config: Configuration, for datasets that have several.
        dataset_revision: Revision on the Hub.
        train_split: Name of the training split, found if not given; of a folder, a path in it.
        val_split: Name of the validation split, found if not given.
        test_split: Name of the test split, found if not given.
        input_key: Column of the images, found from the features if not given.
        target_key: Column of the labels (class labels, strings or integers), found if not given.
        val_fraction: Share of the training images to split off when there is no validation split, in (0, 1).
        seed: Seed of that split, not negative.
        on_bad_image: `'stop'`: an unreadable image is an error. `'skip'`: it is left out, with a warning naming it.
        check_images: `'on'`: read all images before training, `'off'`: none, `'auto'`: up to 10,000; to skip bad images
            all are read.
        background: Colour behind transparent images, see `parse_color`; by default transparency is dropped.
        teacher_classes: Train without labels, and take these names of classes: labels are not needed, those of the
            training split are dropped, and those of others are kept where all of their classes are among these.
        once: Does what one process of several is to do for all, and returns the result in each.

    Returns:
        The splits. Rows without a label have the class number -1, and are numbered without what was left out.

    Raises:
        FileNotFoundError: If the dataset is not found.
        ValueError: If it is not fit for training, or an argument does not fit it; the message names the remedy.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction={val_fraction} must be between 0 and 1, both excluded.')
    if seed < 0:
        raise ValueError(f'seed={seed} must be at least 0.')
    if on_bad_image not in ('stop', 'skip'):
        raise ValueError(f"on_bad_image={on_bad_image!r} must be 'stop' or 'skip'.")
    if check_images not in ('auto', 'on', 'off'):
        raise ValueError(f"check_images={check_images!r} must be 'auto', 'on' or 'off'.")
    if check_images == 'off' and on_bad_image == 'skip':
        raise ValueError(
            "on_bad_image='skip' reads all images before training and cannot be used with check_images='off': leave "
            'one of them out.'
        )
    if background is not None:
        parse_color(background)
    named = {'train': train_split, 'val': val_split, 'test': test_split}
    unlabelled = teacher_classes is not None
    available = open_dataset(
        dataset,
        dataset_config=dataset_config,
        dataset_revision=dataset_revision,
        named_splits=named,
        target_key=target_key,
        unlabelled=unlabelled,
    )
    roles = assign_roles(list(available), named)
    if 'train' not in roles:
        raise ValueError(f'there is no training split among {list(available)}: name one with --train-split.')
    found = {role: available[name] for role, name in roles.items()}
    image = find_image_column(found['train'], input_key)
    label = None if unlabelled else find_label_column(found['train'], target_key, image)
    if label is not None and 'test' in found and test_split is None and is_unlabelled(found['test'], label):
        columns = found['test'].column_names
        why = '' if label in columns else f' (no column {label!r} among {columns})'
        _logger.warning(
            'Split %r has no labels%s and is not used: the student is measured on validation images only',
            roles['test'], why,
        )  # fmt: skip
        del found['test']
    for role, split in found.items():
        for column, option in ((image, '--input-key'), (label, '--target-key')):
            if column is not None and column not in split.column_names:
                raise ValueError(
                    f'split {roles[role]!r} has no column {column!r}, it has {split.column_names}; name one that all '
                    f'splits have with {option}.'
                )

    if teacher_classes is not None:
        class_names = list(teacher_classes)
        labels = {role: _labels_if_any(split, target_key, image, class_names) for role, split in found.items()}
    else:
        assert label is not None
        class_names, labels = _number_classes(found, label, roles)
    splits = {
        role: ImageSplit(roles[role], images_of(split, image), torch.from_numpy(labels[role]), background)
        for role, split in found.items()
    }
    few = sum(map(len, splits.values())) <= SMALL
    checked = on_bad_image == 'skip' or check_images == 'on' or (check_images == 'auto' and few)
    if checked:
        bad = once(lambda: find_bad_images(splits, on_bad_image))
        splits = {role: split.without(bad[role]) for role, split in splits.items()}
    if not unlabelled:
        _check_classes(splits, class_names)

    val_from = f'split {roles.get("val")!r}'
    if 'val' not in splits:
        name = roles['train']
        if unlabelled:
            train_rows, val_rows = _random_split(splits['train'], val_fraction, seed)
        else:
            train_rows, val_rows = _stratified_split(splits['train'], class_names, val_fraction, seed)
        splits['val'] = splits['train'].select(val_rows, name=f'{name} (held out)')
        splits['train'] = splits['train'].select(train_rows)
        val_from = f'{val_fraction:.1%} of split {name!r}, {"at random" if unlabelled else "stratified"}, seed {seed}'
    if unlabelled:
        splits['train'] = splits['train'].without_labels()
    if checked:
        once(lambda: warn_of_copies(splits))
    else:
        splits |= {role: splits[role].with_findings() for role in ('train', 'val')}
    return DataSplits(splits['train'], splits['val'], splits.get('test'), class_names, val_from)


def load_split(
    dataset: str,
    class_names: Sequence[str],
    *,
    split: str | None = None,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    background: str | None = None,
) -> ImageSplit:
    """Load one split to measure a model on that is trained already.

    Args:
        dataset: As for `load_splits`.
        class_names: The classes of the model. Those of the data are found among them by name.
        split: Its name; by default the test split, else that of validation, else the only one.
        dataset_config: As for `load_splits`.
        dataset_revision: As for `load_splits`.
        input_key: As for `load_splits`.
        target_key: As for `load_splits`.
        background: As for `load_splits`.

    Raises:
        FileNotFoundError: If the dataset is not found.
        ValueError: If there is no such split, it has no labels, or a class that the model does not have.
    """
    named: dict[str, str | None] = {'train': split, 'val': None, 'test': None}
    try:
        available = open_dataset(
            dataset, dataset_config=dataset_config, dataset_revision=dataset_revision, named_splits=named,
            target_key=target_key,
        )  # fmt: skip
        # Which splits are for what is no matter where one is named.
        roles = {'test': split} if split in available else assign_roles(list(available), named, leave=True)
    except ValueError as error:
        # There is one split to name, whatever it is for.
        message = re.sub('--(train|val|test)-split', '--split', str(error)).replace('train_split', 'split')
        raise ValueError(message) from error
    name = next((roles[role] for role in ('test', 'val', 'train') if role in roles), None)
    if name is None:
        raise ValueError(f'none of the splits {list(available)} is one to test or validate on: name one with --split.')
    table = available[name]
    image = find_image_column(table, input_key)
    others = [each for each in available if each != name]
    another = f'another split with --split ({", ".join(others)})'
    try:
        label = find_label_column(table, target_key, image)
    except ValueError as error:
        more = f', or {another}' if others else ''
        raise ValueError(f'split {name!r}: {str(error).rstrip(".")}{more}.') from error
    try:
        names, local = local_classes(table, label, f'column {label!r} of split {name!r}')
    except ValueError as error:
        if not is_unlabelled(table, label):
            raise
        more = f'name {another}, or ' if others else ''
        raise ValueError(
            f'split {name!r} has no labels to compare with: {more}see what the model says of its images with '
            '`timm-dfpt predict`.'
        ) from error
    numbers = _numbers_among(class_names, names, local)
    if numbers is None:
        strange = next((names[i] for i in np.unique(local) if names[i] not in class_names), names[0])
        raise ValueError(
            f'split {name!r} has images of class {strange!r}, which is not one of the {len(class_names):,} classes of '
            f'the model ({", ".join(class_names[:3])}, ...): rename or remove it, or name another column with '
            '--target-key'
        )
    return ImageSplit(name, images_of(table, image), torch.from_numpy(numbers), background)


def _number_classes(
    splits: Mapping[str, Dataset | FileTable], column: str, roles: dict[str, str]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Give every class a number that is the same in all splits; returns class names and numbers `[N]` by split."""
    names: list[str] = []
    numbers: dict[str, np.ndarray] = {}
    for role, dataset in splits.items():
        where = f'column {column!r} of split {roles[role]!r}'
        try:
            local_names, local = local_classes(dataset, column, where)
        except ValueError as error:
            if len(dataset) and is_unlabelled(dataset, column):
                raise ValueError(f'{where} has no labels{_REMEDIES[role]}.') from error
            raise
        names = names or local_names
        unknown = {local_names[i] for i in np.unique(local)} - set(names)
        names = names + sorted(unknown)
        number = {name: i for i, name in enumerate(names)}
        numbers[role] = np.array([number.get(name, -1) for name in local_names], dtype=np.int64)[local]
    if len(names) < 2:
        raise ValueError(
            f'column {column!r} has only the class {names}, and a classifier needs at least two: add images of '
            'others, or name another label column with --target-key.'
        )
    return names, numbers


def _labels_if_any(dataset: Dataset | FileTable, named: str | None, image: str, class_names: list[str]) -> np.ndarray:
    """Return the class numbers `[N]` among `class_names`, -1 everywhere if there are no labels or others."""
    none = np.full(len(dataset), -1, dtype=np.int64)
    try:
        column = find_label_column(dataset, named, image)
        names, local = local_classes(dataset, column, f'column {column!r}')
    except ValueError:
        return none
    return next((found for found in [_numbers_among(class_names, names, local)] if found is not None), none)


def _numbers_among(class_names: Sequence[str], names: list[str], local: np.ndarray) -> np.ndarray | None:
    """Return the class numbers `[N]` among `class_names` of rows with others; `None` if a class is not among them."""
    used = np.unique(local)
    numbers = match_classes(names, class_names) or match_classes([names[i] for i in used], class_names)
    if numbers is None:
        return None
    by_local = np.full(len(names), -1, dtype=np.int64)
    by_local[range(len(names)) if len(numbers) == len(names) else used] = numbers
    return by_local[local]


def _random_split(split: ImageSplit, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off `fraction` of the rows, one at least; returns the rows left and the rows split off."""
    if len(split) < 2:
        raise ValueError(
            f'split {split.name!r} has a single image, which cannot be both trained and validated on; add images, or '
            'give a validation split with --val-split.'
        )
    count = min(max(1, round(len(split) * fraction)), len(split) - 1)
    order = np.random.Generator(np.random.PCG64([seed])).permutation(len(split))
    return np.sort(order[count:]), np.sort(order[:count])


def _check_classes(splits: dict[str, ImageSplit], class_names: list[str]) -> None:
    learnt = splits['train'].labels.unique().tolist()
    for split in splits.values():
        unlearnt = [class_names[label] for label in split.labels.unique().tolist() if label not in learnt]
        if unlearnt:
            raise ValueError(
                f'split {split.name!r} has images of class {unlearnt[0]!r}, of which split {splits["train"].name!r} '
                f'has none ({len(unlearnt)} such classes): add training images of them, or remove these.'
            )
    if len(learnt) < len(class_names):
        unused = [name for label, name in enumerate(class_names) if label not in learnt]
        _logger.warning('%d classes have no image at all: %s', len(unused), ', '.join(unused[:5]))


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
                f'class {class_names[label]!r} has a single image in split {split.name!r}, which cannot be both '
                'trained and validated on; add images of it, or give a validation split with --val-split.'
            )
        count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
        # A generator per class: adding images to one class leaves the choice in all others as it was.
        order = np.random.Generator(np.random.PCG64([seed, int(label)])).permutation(len(rows))
        held_out[rows[order[:count]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
