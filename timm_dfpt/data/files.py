"""Images that are files: their paths, packed, and what folders say of their classes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

__all__ = ['FileTable', 'ImageFiles', 'size_of']


class ImageFiles:
    """Paths of images, in one block of memory: some 30 bytes each for a million.

    A list of a million strings would take several times that, and once more in every worker process, since counting
    the references of an object writes to it.

    Args:
        folders: Folders, each with the names of the images in it.
    """

    def __init__(self, folders: Iterable[tuple[str, Sequence[str]]]) -> None:
        parts = [(path, names) for path, names in folders if names]
        self._folders = [path for path, _ in parts]
        self._folder = np.repeat(
            np.arange(len(parts), dtype=np.int32), np.array([len(names) for _, names in parts], np.int64)
        )
        # No name has this character.
        self._names = os.fsencode('\0'.join(name for _, names in parts for name in names))
        ends = np.flatnonzero(np.frombuffer(self._names, np.uint8) == 0)
        self._bounds = np.concatenate([[-1], ends, [len(self._names)]]) if parts else np.zeros(1, np.int64)
        self._rows = np.arange(len(self._folder), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def path(self, row: int) -> str:
        """Return the path of an image."""
        return os.path.join(self._folders[self._folder[self._rows[row]]], os.fsdecode(self._name(row)))

    def encoded(self, rows: Sequence[int]) -> list[bytes | str | None]:
        """Return the paths of some, which is how images in files are stored."""
        return [self.path(row) for row in rows]

    def names(self) -> Iterator[bytes]:
        """Yield the names of the images without their folders, as on disk."""
        return map(self._name, range(len(self)))

    def names_and_sizes(self) -> Iterator[tuple[bytes, int | None]]:
        """Yield the name of each image and its size in bytes, `None` where it cannot be read."""
        for row, name in enumerate(self.names()):
            yield name, size_of(self.path(row))

    def select(self, index: np.ndarray) -> ImageFiles:
        """Take some of the rows, in the order given."""
        chosen = object.__new__(ImageFiles)
        chosen.__dict__.update(self.__dict__, _rows=self._rows[index])
        return chosen

    def _name(self, row: int) -> bytes:
        at = self._rows[row]
        return self._names[self._bounds[at] + 1 : self._bounds[at + 1]]


def size_of(path: str) -> int | None:
    """Return the size of a file in bytes, `None` if it cannot be read."""
    try:
        return os.path.getsize(path)
    except OSError:
        # One of those that are left out because they cannot be read.
        return None


@dataclasses.dataclass(frozen=True)
class FileTable:
    """A split of a folder of images.

    Args:
        files: The images.
        classes: Names of the classes, those of all splits; `None` where folders say nothing of classes.
        labels: Class number of each image, int64 `[N]`.
    """

    files: ImageFiles
    classes: list[str] | None = None
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def column_names(self) -> list[str]:
        """What the columns would be called if it were a table of `datasets`."""
        return ['image'] if self.labels is None else ['image', 'label']
