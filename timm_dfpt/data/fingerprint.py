"""Hashes that tell one dataset from another, wherever its files lie."""
from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import numpy as np

from .datasets import DataSplits
from .image_split import ImageSplit
from .paths import unpack_path

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

__all__ = ['dataset_fingerprint', 'describe_data']

_READ_ROWS = 512  # rows fetched at once: large enough to spare the overhead of a fetch, small enough for memory
_READ_WHOLE = 256  # images whose content is hashed


def dataset_fingerprint(split: ImageSplit) -> str:
    """Compute a hash of labels and encoded images in their order: the same on every machine, wherever the files lie.

    Args:
        split: The split.

    Returns:
        SHA-256 as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
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

    Labels, names and sizes of all files count, and the content of some: a million images would take minutes to read,
    and those of some formats all have one size.

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
    digest = hashlib.sha256(split.labels.numpy().astype('<i8').tobytes())
    for chunk in split.dataset.data.column(split.image_column).chunks:
        for name, size in _names_and_sizes(chunk):
            digest.update(os.fsencode(f'{name}\0{size}\0'))
    some = np.unique(np.linspace(0, len(split) - 1, _READ_WHOLE).astype(np.int64))
    digest.update(dataset_fingerprint(split.select(some)).encode())
    return digest.hexdigest()


def _names_and_sizes(chunk: pa.StructArray) -> list[tuple[str, int | None]]:
    import pyarrow.compute as pc  # type: ignore[import-untyped]  # costs 0.04 s

    paths = [path and unpack_path(path) for path in pc.struct_field(chunk, 'path').to_pylist()]
    # From the offsets of the column: no image is read.
    sizes = pc.binary_length(pc.struct_field(chunk, 'bytes')).to_pylist()
    return [
        # Without folders, which are others when the data have been moved.
        (os.path.basename(path or ''), _size_of(path) if size is None and path else size)
        for path, size in zip(paths, sizes, strict=True)
    ]


def _size_of(path: str) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:
        # One of those that are left out because they cannot be read.
        return None
