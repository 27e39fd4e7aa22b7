"""Folders of images in common layouts: class folders, with splits above or in them, or a metadata file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from .files import FileTable, ImageFiles
from .listing import Folder
from .metadata import find_metadata, open_metadata
from .paths import printable
from .splits import assign_roles, role_of

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ['open_folder']

_logger = logging.getLogger(__name__)

# Name of the class to its folders; of a split.
_Classes = Mapping[str, list[Folder]]


def open_folder(
    listed: Folder, named: Mapping[str, str | None], target_key: str | None = None, unlabelled: bool = False
) -> Mapping[str, Dataset | FileTable]:
    """Open a folder of images.

    A file that is there twice because of links is taken once.

    Args:
        listed: A folder of class folders; of split folders above them, or in each of them; or with a `metadata.csv` (or
            `.jsonl`, `.parquet`) as `datasets` has it. A folder that holds nothing but one of these is looked through.
        named: For `train`, `val` and `test` the split that the user named, or `None`; a folder in a folder is written
            `a/b`, and `.` is the folder itself.
        target_key: Column of the labels, if the user named one: then they are in the metadata file.
        unlabelled: Whether a split need not have classes: one that has none, or images next to them, is a single list
            of all images in it, without the column `label`.

    Returns:
        Split name to images; a table of `datasets` where there is a metadata file. Class names are those of all splits.

    Raises:
        ValueError: If there are no classes, a class folder is empty, or it is not clear what is a split.
    """
    root = _unwrapped(listed, named)
    tables = _tables(root, named, target_key)
    if root in tables.values():
        return open_metadata(root.path, _relative(root), split_by_folder=True)
    if tables:
        return {name: open_metadata(f.path, _relative(f))['train'] for name, f in tables.items()}
    if unlabelled:
        return _open_unlabelled(root, named)
    splits = _splits(root, named)
    classes = sorted({name for split in splits.values() for name in split})
    if not classes:
        raise ValueError(
            f'dataset={printable(listed.path)!r}: expected one subfolder of images per class (with or without split '
            'folders above them), or a metadata.csv with the columns file_name and label, and found neither.'
        )
    return {name: _read(name, split, classes) for name, split in splits.items()}


def _open_unlabelled(root: Folder, named: Mapping[str, str | None]) -> dict[str, FileTable]:
    given = {name: folder for name in named.values() if name and (folder := _find(root, name)) is not None}
    usual = {name: folder for name, folder in root.parts.items() if role_of(name) and root not in given.values()}
    # A folder next to others that are none is hardly a split: dates and the like, or classes.
    usual = usual if given or (len(usual) == len(root.parts) and not root.images) else {}
    folders = {**usual, **given} or {'train': root}
    folders = {name: folders[name] for name in assign_roles(list(folders), named).values()}
    empty = [folder.path for folder in folders.values() if not folder.filled]
    if empty:
        raise ValueError(
            f'{printable(empty[0])!r} holds no images ({", ".join(IMG_EXTENSIONS)}): add some, or remove it.'
        )
    classes = sorted({name for folder in folders.values() if not folder.images for name in folder.parts})
    return {
        name: _read_flat(folder)
        if folder.images
        else _read(name, {label: [part] for label, part in folder.parts.items()}, classes)
        for name, folder in folders.items()
    }


def _read_flat(folder: Folder) -> FileTable:
    kept, _ = _without_copies([(each, 0) for each in _in_order([folder])], [''])
    return FileTable(ImageFiles((each.path, names) for each, _, names in kept))


def _unwrapped(folder: Folder, named: Mapping[str, str | None]) -> Folder:
    """Go down to the first folder in which there is a choice."""
    while len(folder.parts) == 1 and not folder.images and not find_metadata(folder.others):
        (inside,) = folder.parts.values()
        # An empty folder of a split is a mistake to speak of.
        empty = any(role_of(name) for name in folder.folders if name not in folder.parts)
        if empty or any(_find(folder, name) for name in named.values()):
            break
        if not (inside.parts or find_metadata(inside.others)):
            break
        folder = inside
    return folder


def _find(root: Folder, name: str | None) -> Folder | None:
    folder: Folder | None = root if name else None
    for part in (name or '').split('/'):
        if part not in ('', '.') and folder is not None:
            folder = folder.folders.get(part)
    return folder


def _tables(root: Folder, named: Mapping[str, str | None], target_key: str | None) -> dict[str, Folder]:
    """Return the folders with a metadata file that has the labels, by split."""
    if find_metadata(root.others, root.path, target_key, len(root.parts) > 1):
        return {'train': root}
    splits = {n: f for n, f in root.parts.items() if role_of(n) or n in named.values()}
    splits = {n: f for n, f in splits.items() if find_metadata(f.others, f.path, target_key, len(f.parts) > 1)}
    roles = assign_roles(list(splits), named) if splits else {}
    return {name: splits[name] for name in roles.values()}


def _relative(folder: Folder) -> set[str]:
    """Return all images in a folder, relative to it."""
    return {
        os.path.normpath(os.path.join(os.path.relpath(each.path, folder.path), name))
        for each in folder.walk()
        for name in each.images
    }


def _splits(root: Folder, named: Mapping[str, str | None]) -> dict[str, _Classes]:
    where = printable(root.path)
    given = {name: folder for name in named.values() if name and (folder := _find(root, name)) is not None}
    parts = root.parts
    known = {name: folder for name, folder in root.folders.items() if role_of(name)}
    if given:
        # What is in the folder itself are its classes.
        usual = {} if root in given.values() else {n: f for n, f in known.items() if f not in given.values()}
        return _chosen({**given, **usual}, named)
    # Classes may be called like splits ("train" is a vehicle, too), but then there are no folders in them.
    if any(folder.parts for folder in known.values()):
        strange = sorted(set(parts) - set(known))
        if strange:
            raise ValueError(_unclear(where, f'{list(known)} look like splits and {strange} do not'))
        return _chosen(known, named)
    if set(parts) <= set(known) and len({role_of(name) for name in parts} | {'train'}) > 1:
        raise ValueError(_unclear(where, f'{list(parts)} look like splits and hold no class folders'))
    inner = {name: list(folder.parts) for name, folder in parts.items()}
    divided = [name for name, below in inner.items() if sum(role_of(each) is not None for each in below) > 1]
    if divided:
        whole = all(not parts[n].images and all(map(role_of, below)) and below for n, below in inner.items())
        if not whole:
            raise ValueError(_unclear(where, f'{divided} hold folders that look like splits, and other folders do not'))
        return _splits_in_classes(parts)
    for first in parts:
        alike = [name for name in parts if len(set(inner[name]) & set(inner[first])) > 1]
        if len(alike) > 1:
            raise ValueError(_unclear(where, f'{alike} hold folders of the same names, as splits do'))
    if root.images:
        _logger.warning('%d images of %r are not in a class folder and are ignored', len(root.images), where)
    return {'train': {name: [folder] for name, folder in root.folders.items()}}


def _unclear(where: str, what: str) -> str:
    return (
        f'dataset={where!r}: {what}. Name the splits with --train-split and --val-split, and move what is neither '
        'split nor class out of the folder; if all of them are classes, give --train-split .'
    )


def _splits_in_classes(parts: Mapping[str, Folder]) -> dict[str, _Classes]:
    splits: dict[str, dict[str, list[Folder]]] = {}
    for label, folder in parts.items():
        for name, part in folder.parts.items():
            splits.setdefault(str(role_of(name)), {}).setdefault(label, []).append(part)
    return dict(splits)


def _chosen(folders: Mapping[str, Folder], named: Mapping[str, str | None]) -> dict[str, _Classes]:
    used = {name: folders[name] for name in assign_roles(list(folders), named).values()}
    # A folder between split and classes, as in `train/images/cat`.
    while all(len(f.parts) == 1 and next(iter(f.parts.values())).parts for f in used.values() if f.parts):
        used = {name: next(iter(f.parts.values())) if f.parts else f for name, f in used.items()}
    for name, folder in used.items():
        # A test split without labels is usual.
        if not folder.folders and role_of(name) != 'test':
            where = printable(folder.path)
            raise ValueError(f'split {name!r}: {where!r} holds no class folders: add some, or remove it.')
    return {
        name: {label: [each] for label, each in folder.folders.items() if each not in used.values()}
        for name, folder in used.items()
    }


def _read(split: str, folders: _Classes, classes: list[str]) -> FileTable:
    empty = [folder.path for each in folders.values() for folder in each if not folder.filled]
    if empty:
        raise ValueError(
            f'class folder {printable(empty[0])!r} holds no image ({len(empty)} such folders): '
            f'add images ({", ".join(IMG_EXTENSIONS)}), or remove it.'
        )
    numbers = {name: number for number, name in enumerate(classes)}
    ordered = [(each, numbers[label]) for label in sorted(folders) for each in _in_order(folders[label])]
    kept, linked = _without_copies(ordered, classes)
    if linked:
        _logger.warning(
            '%d links of split %r point to files that are in it already; each file is used once', linked, split
        )
    others = [os.path.join(folder.path, name) for folder, _ in ordered for name in folder.others]
    if others:
        _logger.warning(
            '%d files in the class folders of split %r are not of a known type and are ignored, such as %r: convert '
            'them if they are images (%s)', len(others), split, printable(min(others)), ', '.join(IMG_EXTENSIONS),
        )  # fmt: skip
    names = [printable(name) for name in classes]
    if names != classes:
        wrong = next(name for name, known in zip(names, classes, strict=True) if name != known)
        _logger.warning(
            'The name of class folder %r is not valid UTF-8 and becomes the name of its class: better rename it', wrong
        )
    counts = np.array([len(images) for _, _, images in kept], np.int64)
    labels = np.repeat(np.array([label for _, label, _ in kept], np.int64), counts)
    return FileTable(ImageFiles((folder.path, images) for folder, _, images in kept), names, labels)


def _in_order(folders: Iterable[Folder]) -> list[Folder]:
    """Return all folders in some, in the order of torchvision's `make_dataset`."""
    return sorted((each for folder in folders for each in folder.walk()), key=lambda folder: folder.path)


def _without_copies(
    folders: list[tuple[Folder, int]], classes: list[str]
) -> tuple[list[tuple[Folder, int, list[str]]], int]:
    """Return folders and class numbers with the images that are not links to earlier ones, and the number of links.

    Raises:
        ValueError: If a file is in two classes.
    """
    reals = {folder.real for folder, _ in folders}
    if len(reals) == len(folders) and not any(folder.links for folder, _ in folders):
        return [(folder, label, folder.images) for folder, label in folders], 0
    seen: dict[str, tuple[str, int]] = {}
    kept, linked = [], 0
    for folder, label in folders:
        images = []
        for name in folder.images:
            path = os.path.join(folder.path, name)
            # Only of links: a call for each of a million files would take a minute.
            real = os.path.realpath(path) if name in folder.links else os.path.join(folder.real, name)
            first, before = seen.setdefault(real, (path, label))
            if before != label:
                raise ValueError(
                    f'{printable(path)!r} and {printable(first)!r} are the same file through links, in two classes: '
                    'remove one.'
                )
            if first == path:
                images.append(name)
        linked += len(folder.images) - len(images)
        kept.append((folder, label, images))
    return kept, linked
