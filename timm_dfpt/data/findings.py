"""What is seen in the images of a split when they are read for the first time, in training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from .images import ImageReport

__all__ = ['Findings']

_READ, _TRANSPARENT, _PEAK = 1, 2, 4


class Findings:
    """A note on each image of a split, in memory that processes of a loader share: 16 bytes per image.

    Args:
        rows: Number of images.
    """

    def __init__(self, rows: int) -> None:
        # The content as a hash of 64 bits; what was seen, 0 for nothing yet.
        self.notes = torch.zeros(rows, 2, dtype=torch.int64).share_memory_()

    def unread(self, rows: Sequence[int]) -> list[bool]:
        """Say for each row whether it has not been read yet."""
        seen: list[int] = self.notes[torch.tensor(rows), 1].tolist()
        return [each == 0 for each in seen]

    def add(self, row: int, content: bytes, report: ImageReport) -> None:
        """Write down what an image is like.

        Args:
            row: Its row.
            content: Its file.
            report: What was found in it.
        """
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), 'little', signed=True)
        peak = 0 if report.peak is None else _PEAK * (report.peak + 1)
        self.notes[row] = torch.tensor([digest, _READ + _TRANSPARENT * report.transparent + peak])

    def read(self) -> np.ndarray:
        """Return the rows that were read and their notes, int64 `[M, 3]`: row, hash, what was seen."""
        notes = self.notes.numpy()
        rows = np.flatnonzero(notes[:, 1])
        return np.column_stack([rows, notes[rows]])

    @staticmethod
    def transparent(read: np.ndarray) -> int:
        """Return the number of transparent images among rows of `read`."""
        return int(np.count_nonzero(read[:, 2] & _TRANSPARENT))

    @staticmethod
    def peaks(read: np.ndarray) -> list[int]:
        """Return the largest values of the images of 16 bits among rows of `read`."""
        peaks = read[:, 2] // _PEAK - 1
        return [int(peak) for peak in peaks[peaks >= 0]]
