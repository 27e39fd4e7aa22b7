"""Hashes that distinguish datasets, wherever their files are."""
from __future__ import annotations

import hashlib
import os

import numpy as np

from .datasets import DataSplits
from .files import ImageFiles
from .image_split import ImageSplit
from .inspection import SMALL

__all__ = ['dataset_fingerprint', 'describe_data']

_READ_ROWS = 512  # rows fetched at once: large enough to spare the overhead of a fetch, small enough for memory
_READ_WHOLE = 256  # images of a split whose content is hashed
# Of many files: data made anew have other sizes nearly everywhere, and a repaired file is hardly among so few.
_SIZES = 16


def dataset_fingerprint(split: ImageSplit) -> str:
    """Compute a hash of labels and images in their order, for what is kept of them beyond a run.

    Of up to 10,000 images, and in tables of `datasets` of any number, the content is hashed: the hash is the same on
    every machine, wherever the files lie. Of more files it is names, sizes and times of change: reading a million takes
    minutes. Files that are copied without their times then have another hash.

    Args:
        split: The split.

    Returns:
        SHA-256 as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    if isinstance(split.images, ImageFiles) and len(split) > SMALL:
        digest.update(_labels(split))
        for row, name in enumerate(split.images.names()):
            status = os.stat(split.images.path(row))
            digest.update(name + f'\0{status.st_size}\0{status.st_mtime_ns}\0'.encode())
        return digest.hexdigest()
    for start in range(0, len(split), _READ_ROWS):
        rows = range(start, min(start + _READ_ROWS, len(split)))
        for row, source in zip(rows, split.encoded(rows), strict=True):
            if isinstance(source, str):
                with open(source, 'rb') as file:
                    source = file.read()
            # Lengths keep the end of one image from passing for the start of the next.
            digest.update(np.array([split.labels[row], len(source or b'')], dtype='<i8').tobytes())
            digest.update(source or b'')
    return digest.hexdigest()


def describe_data(data: DataSplits) -> dict[str, str]:
    """Describe a dataset so that another one is described otherwise, wherever its files lie.

    It covers labels, names and sizes of all images, and the content of some. Of a split of more than 10,000 files it
    covers labels, names and the sizes of some: no file is opened, and a bad one may be replaced before the run goes on.

    Args:
        data: The splits.

    Returns:
        By what it is about, the number and a hash.
    """
    classes = hashlib.sha256('\0'.join(data.class_names).encode()).hexdigest()
    described = {'classes': f'{data.num_classes}, hash {classes[:16]}'}
    splits = {'training images': data.train, 'validation images': data.val, 'test images': data.test}
    return described | {
        name: f'{len(split):,}, hash {_digest(split)[:16]}' for name, split in splits.items() if split is not None
    }


def _digest(split: ImageSplit) -> str:
    digest = hashlib.sha256(_labels(split))
    if isinstance(split.images, ImageFiles) and len(split) > SMALL:
        digest.update(b'\0'.join(split.images.names()))
        digest.update(repr([size for _, size in _spread(split, _SIZES).images.names_and_sizes()]).encode())
        return digest.hexdigest()
    for name, size in split.images.names_and_sizes():
        digest.update(name + f'\0{size}\0'.encode())
    digest.update(dataset_fingerprint(_spread(split, _READ_WHOLE)).encode())
    return digest.hexdigest()


def _spread(split: ImageSplit, count: int) -> ImageSplit:
    return split.select(np.unique(np.linspace(0, len(split) - 1, count).astype(np.int64)))


def _labels(split: ImageSplit) -> bytes:
    return split.labels.numpy().astype('<i8').tobytes()
