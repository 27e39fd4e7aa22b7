"""What a run is made from besides its options: images and teachers, told apart by what is cheap to look at."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from ..data.datasets import DataSplits, ImageSplit, dataset_fingerprint
from ..hub.base import fingerprint

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

__all__ = ['changes', 'describe_data', 'describe_teachers']

_READ_WHOLE = 256


def describe_data(data: DataSplits) -> dict[str, str]:
    """Describe a data set so that another one is described otherwise, wherever its files lie.

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
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    paths = pc.struct_field(chunk, 'path').to_pylist()
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


def describe_teachers(teachers: Mapping[str, nn.Module | None]) -> dict[str, str]:
    """Describe teachers so that others are described otherwise.

    Args:
        teachers: The frozen model by name of the learner, `None` for those without.

    Returns:
        By what it is about, the number of parameters and a hash of all weights.
    """
    known: dict[int, str] = {}
    described = {}
    for name, teacher in teachers.items():
        if teacher is None:
            continue
        if id(teacher) not in known:
            found = fingerprint(teacher)
            digest = hashlib.sha256(f'{found.shapes} {found.weights}'.encode()).hexdigest()
            known[id(teacher)] = f'{found.parameters:,} parameters, hash {digest[:16]}'
        described[f'teacher of {name}'] = known[id(teacher)]
    return described


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> Sequence[str]:
    """Return in words what is described otherwise now than before."""
    return [
        f'{name}: {before.get(name, "none")} when the run was started, {now.get(name, "none")} now'
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
