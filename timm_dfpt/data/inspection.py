"""Checks of the images of a dataset: damage, misleading content, and copies.

In a small dataset before training, in a large one when its images are first read.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .findings import Findings
from .image_split import ImageSplit
from .images import EncodedImage, ImageReport, inspect_image
from .progress import progress_bar

__all__ = ['SMALL', 'find_bad_images', 'report_findings', 'warn_of_copies']

_logger = logging.getLogger(__name__)

SMALL = 10_000  # images that are all decoded before training
_READ_ROWS = 512  # rows fetched at once: large enough to spare the overhead of a fetch, small enough for memory
_DIM_BITS = 14  # 16-bit images none of which needs more are of a camera or scanner with fewer


def find_bad_images(splits: Mapping[str, ImageSplit], on_bad_image: str) -> dict[str, list[int]]:
    """Decode all images, and warn of those that a model would see otherwise than meant.

    Args:
        splits: The splits by role.
        on_bad_image: `'stop'` or `'skip'`.

    Returns:
        By role the rows that cannot be read.

    Raises:
        ValueError: If there are bad images, and they stop.
    """
    reports = {role: _reports(split) for role, split in splits.items()}
    bad = {role: _bad_rows(split, reports[role], on_bad_image) for role, split in splits.items()}
    found = [report for each in reports.values() for report in each]
    transparent = sum(report.transparent for report in found)
    peaks = [report.peak for report in found if report.peak is not None]
    _warn_of_kinds(transparent, len(found), peaks, splits['train'].background)
    return bad


def _warn_of_kinds(transparent: int, count: int, peaks: Sequence[int], background: str | None) -> None:
    if transparent and background is None:
        _logger.warning(
            '%d of %d images have transparent pixels; their alpha channel is dropped, as timm and transformers do. To '
            'put a color behind them instead, give --background white (or another)',
            transparent, count,
        )  # fmt: skip
    if peaks and max(peaks).bit_length() <= _DIM_BITS:
        bits = max(1, max(peaks).bit_length())
        _logger.warning(
            '%d images of 16 bits have no value above %d and are nearly black, since only the upper 8 of the 16 bits '
            'are used: multiply their pixels by %d and save them again', len(peaks), max(peaks), 2 ** (16 - bits),
        )  # fmt: skip


def _reports(split: ImageSplit) -> list[ImageReport]:
    def inspect(start: int) -> list[ImageReport]:
        rows = range(start, min(start + _READ_ROWS, len(split)))
        return [inspect_image(source) for source in split.encoded(rows)]

    reports: list[ImageReport] = []
    with ThreadPoolExecutor() as pool, progress_bar(f'checking {split.name}', 'images', len(split)) as bar:
        for part in pool.map(inspect, range(0, len(split), _READ_ROWS)):
            reports += part
            bar.update(len(part))
    return reports


def _bad_rows(split: ImageSplit, reports: list[ImageReport], on_bad_image: str) -> list[int]:
    bad = {row: report.problem for row, report in enumerate(reports) if report.problem is not None}
    if not bad:
        return []
    lines = [f'{split.describe(row)}: {reason}' for row, reason in bad.items()]
    if on_bad_image == 'stop':
        shown = '; '.join(lines[:5] + [f'and {len(lines) - 5} more'] * (len(lines) > 5))
        raise ValueError(
            f'{len(bad)} images of split {split.name!r} cannot be read: {shown}. Repair or remove them, or leave them '
            'out with --on-bad-image skip.'
        )
    _logger.warning('%d unreadable images of split %r are left out:\n%s', len(bad), split.name, '\n'.join(lines))
    return list(bad)


def report_findings(splits: Mapping[str, ImageSplit], read: Mapping[str, np.ndarray]) -> None:
    """Warn of what was seen in images when they were read for the first time.

    Args:
        splits: The splits by role.
        read: By role what `Findings.read` returns, of all processes.
    """
    everything = np.concatenate(list(read.values()))
    _warn_of_kinds(
        Findings.transparent(everything), len(everything), Findings.peaks(everything), splits['train'].background
    )
    learnt = read['train']
    for role, found in read.items():
        if role == 'train':
            continue
        copies = np.flatnonzero(np.isin(found[:, 1], learnt[:, 1]))
        if len(copies):
            first = found[copies[0]]
            original = learnt[np.argmax(learnt[:, 1] == first[1])]
            _warn_of_copies(splits, role, len(copies), int(first[0]), int(original[0]))


def warn_of_copies(splits: Mapping[str, ImageSplit]) -> None:
    """Warn of images to validate or test on that are also trained on, by their content.

    Args:
        splits: The splits by role.
    """
    sizes = {role: _sizes(split) for role, split in splits.items()}
    for role in splits:
        if role == 'train':
            continue
        # Large images hardly ever have one size, and need not be read again.
        common = set(sizes['train']) & set(sizes[role])
        learnt, found = (_rows_by_content(splits[each], sizes[each], common) for each in ('train', role))
        copies = {content: rows for content, rows in found.items() if content in learnt}
        if copies:
            content, rows = next(iter(copies.items()))
            _warn_of_copies(splits, role, sum(map(len, copies.values())), rows[0], learnt[content][0])


def _warn_of_copies(splits: Mapping[str, ImageSplit], role: str, count: int, row: int, original: int) -> None:
    split = splits[role]
    _logger.warning(
        '%d of %d images of split %r are also in the training split (files of equal content, such as %s and %s), and '
        'accuracy on them is not meaningful: remove them from one split', count, len(split), split.name,
        split.describe(row), splits['train'].describe(original),
    )  # fmt: skip


def _sizes(split: ImageSplit) -> list[int]:
    return [
        os.path.getsize(source) if isinstance(source, str) else len(source or b'')
        for start in range(0, len(split), _READ_ROWS)
        for source in split.encoded(range(start, min(start + _READ_ROWS, len(split))))
    ]


def _rows_by_content(split: ImageSplit, sizes: list[int], wanted: set[int]) -> dict[bytes, list[int]]:
    rows = [row for row, size in enumerate(sizes) if size in wanted]
    found: dict[bytes, list[int]] = {}
    for start in range(0, len(rows), _READ_ROWS):
        part = rows[start : start + _READ_ROWS]
        for row, source in zip(part, split.encoded(part), strict=True):
            found.setdefault(_content(source), []).append(row)
    return found


def _content(source: EncodedImage) -> bytes:
    if isinstance(source, str):
        with open(source, 'rb') as file:
            source = file.read()
    return hashlib.sha256(source or b'').digest()
