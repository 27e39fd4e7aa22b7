"""One split of a dataset: images as they are stored, and their class numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .images import EncodedImage
from .paths import printable, unpack_path

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ['ImageSplit']


@dataclasses.dataclass(frozen=True)
class ImageSplit:
    """One split: encoded images and their class numbers.

    Args:
        name: Name for messages, such as `train`.
        dataset: The rows, images not decoded.
        image_column: Column of the images.
        labels: Class number of each row, int64 `[N]`; -1 for none.
        background: Colour behind transparent images, see `decode_image`.
    """

    name: str
    dataset: Dataset
    image_column: str
    labels: torch.Tensor
    background: str | None = None

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
        cells = self.dataset[list(rows)][self.image_column]
        return [
            cell and (cell['bytes'] if cell['bytes'] is not None else cell['path'] and unpack_path(cell['path']))
            for cell in cells
        ]

    def describe(self, row: int) -> str:
        """Name a row so that a user finds it: its file if it has one, else split and row."""
        cell = self.dataset[row][self.image_column]
        place = f'row {row} of split {self.name!r}'
        return f'{printable(unpack_path(cell["path"]))} ({place})' if cell and cell['path'] else place

    def select(self, rows: Sequence[int] | np.ndarray, name: str | None = None) -> ImageSplit:
        """Take some of the rows, in the order given."""
        index = np.asarray(rows, dtype=np.int64)
        return dataclasses.replace(
            self,
            name=name or self.name,
            dataset=self.dataset.select(index),
            labels=self.labels[torch.from_numpy(index)],
        )
