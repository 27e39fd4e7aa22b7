"""One split of a dataset: images as they are stored, and their class numbers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .files import ImageFiles, size_of
from .findings import Findings
from .images import EncodedImage
from .paths import printable, unpack_path

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ['ImageSplit', 'TableImages']


class TableImages:
    """Images in a column of a table of `datasets`: bytes, or paths as `pack_path` writes them.

    Args:
        dataset: The table, images not decoded.
        column: The column.
    """

    def __init__(self, dataset: Dataset, column: str) -> None:
        self.dataset, self.column = dataset, column

    def path(self, row: int) -> str | None:
        """Return the path of an image, if it has one."""
        cell = self.dataset[row][self.column]
        return unpack_path(cell['path']) if cell and cell['path'] else None

    def encoded(self, rows: Sequence[int]) -> list[EncodedImage]:
        """Return some as they are stored: bytes, a path, or `None` where a row has no image."""
        cells = self.dataset[list(rows)][self.column]
        return [
            cell and (cell['bytes'] if cell['bytes'] is not None else cell['path'] and unpack_path(cell['path']))
            for cell in cells
        ]

    def names_and_sizes(self) -> Iterator[tuple[bytes, int | None]]:
        """Yield the name of each image without folders, empty if it has none, and its size in bytes."""
        import pyarrow.compute as pc  # type: ignore[import-untyped]  # costs 0.04 s

        for chunk in self.dataset.data.column(self.column).chunks:
            paths = [path and unpack_path(path) for path in pc.struct_field(chunk, 'path').to_pylist()]
            # From the offsets of the column: no image is read.
            sizes = pc.binary_length(pc.struct_field(chunk, 'bytes')).to_pylist()
            for path, size in zip(paths, sizes, strict=True):
                yield os.fsencode(os.path.basename(path or '')), size_of(path) if size is None and path else size

    def select(self, index: np.ndarray) -> TableImages:
        """Take some of the rows, in the order given."""
        return TableImages(self.dataset.select(index), self.column)


@dataclasses.dataclass(frozen=True)
class ImageSplit:
    """One split: encoded images and their class numbers.

    Args:
        name: Name for messages, such as `train`.
        images: The images as they are stored.
        labels: Class number of each row, int64 `[N]`; -1 for none.
        background: Colour behind transparent images, see `decode_image`.
        findings: Where to note what is seen in images that were not checked before training.
    """

    name: str
    images: ImageFiles | TableImages
    labels: torch.Tensor
    background: str | None = None
    findings: Findings | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Whether every row has a class number."""
        return bool((self.labels >= 0).all())

    def without_labels(self) -> ImageSplit:
        """Return the same images without their class numbers."""
        return dataclasses.replace(self, labels=torch.full_like(self.labels, -1))

    def encoded(self, rows: Sequence[int]) -> list[EncodedImage]:
        """Fetch images as they are stored: bytes, a path, or `None` where a row has no image."""
        return self.images.encoded(rows)

    def describe(self, row: int) -> str:
        """Name a row so that a user finds it: its file if it has one, else split and row."""
        path = self.images.path(row)
        place = f'row {row} of split {self.name!r}'
        return f'{printable(path)} ({place})' if path else place

    def select(self, rows: Sequence[int] | np.ndarray, name: str | None = None) -> ImageSplit:
        """Take some of the rows, in the order given."""
        index = np.asarray(rows, dtype=np.int64)
        return dataclasses.replace(
            self,
            name=name or self.name,
            images=self.images.select(index),
            labels=self.labels[torch.from_numpy(index)],
            findings=None,
        )

    def without(self, rows: Sequence[int]) -> ImageSplit:
        """Take all but some of the rows."""
        return self.select(np.delete(np.arange(len(self)), rows)) if rows else self

    def with_findings(self) -> ImageSplit:
        """Return the same images with a place for what is seen in them."""
        return dataclasses.replace(self, findings=Findings(len(self)))
