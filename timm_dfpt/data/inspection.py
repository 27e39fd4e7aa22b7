"""What is looked for in the images of a dataset before training: damage, what would mislead, and copies."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from .image_split import ImageSplit
from .images import EncodedImage, ImageReport, inspect_image

__all__ = ['inspect_splits', 'warn_of_copies']

_logger = logging.getLogger(__name__)

_SMALL = 10_000  # images that are all decoded before training
_SAMPLE = 100  # of a split of a larger set
_READ_ROWS = 512  # rows fetched at once: large enough to spare the overhead of a fetch, small enough for memory
_DIM_BITS = 14  # 16-bit images none of which needs more are of a camera or scanner with fewer


def inspect_splits(splits: Mapping[str, ImageSplit], on_bad_image: str) -> dict[str, ImageSplit]:
    """Inspect all images, and warn of those that are seen otherwise than was meant.

    Args:
        splits: The splits by role.
        on_bad_image: `'stop'` or `'skip'`.

    Returns:
        The splits without bad images.

    Raises:
        ValueError: If there are bad images, and they stop.
    """
    # A quick look is enough for many to stop soon; what it overlooks stops the run later, which is not to skip it.
    in_full = on_bad_image == 'skip' or sum(map(len, splits.values())) <= _SMALL
    reports = {role: _reports(split, in_full) for role, split in splits.items()}
    kept = {role: _without_bad_images(split, reports[role], on_bad_image) for role, split in splits.items()}
    found = [report for each in reports.values() for report in each]
    transparent = sum(report.transparent for report in found)
    if transparent and splits['train'].background is None:
        what = 'are transparent in places' if in_full else 'have an alpha channel'
        _logger.warning(
            '%d of %d images %s, and what is behind is not defined: alpha is dropped, as timm and transformers do; '
            'to lay them over a colour instead, give --background white (or another)', transparent, len(found), what,
        )  # fmt: skip
    peaks = [report.peak for report in found if report.peak is not None]
    if peaks and max(peaks).bit_length() <= _DIM_BITS:
        bits = max(1, max(peaks).bit_length())
        _logger.warning(
            '%d images of 16 bits have no value above %d, and are nearly black, since the upper 8 bits of 16 are used: '
            'multiply their pixels by %d and save them again', len(peaks), max(peaks), 2 ** (16 - bits),
        )  # fmt: skip
    return kept


def _reports(split: ImageSplit, in_full: bool) -> list[ImageReport]:
    stride = max(1, len(split) // _SAMPLE)

    def inspect(start: int) -> list[ImageReport]:
        rows = range(start, min(start + _READ_ROWS, len(split)))
        return [
            inspect_image(source, in_full=in_full or row % stride == 0)
            for row, source in zip(rows, split.encoded(rows), strict=True)
        ]

    with ThreadPoolExecutor() as pool:
        return [report for part in pool.map(inspect, range(0, len(split), _READ_ROWS)) for report in part]


def _without_bad_images(split: ImageSplit, reports: list[ImageReport], on_bad_image: str) -> ImageSplit:
    bad = {row: report.problem for row, report in enumerate(reports) if report.problem is not None}
    if not bad:
        return split
    lines = [f'{split.describe(row)}: {reason}' for row, reason in bad.items()]
    if on_bad_image == 'stop':
        shown = '; '.join(lines[:5] + [f'and {len(lines) - 5} more'] * (len(lines) > 5))
        raise ValueError(
            f'{len(bad)} images of split {split.name!r} cannot be read: {shown}. Repair or remove them, or leave them '
            'out with --on-bad-image skip'
        )
    _logger.warning('%d unreadable images of split %r are left out:\n%s', len(bad), split.name, '\n'.join(lines))
    return split.select([row for row in range(len(split)) if row not in bad])


def warn_of_copies(splits: Mapping[str, ImageSplit]) -> None:
    """Warn of images to validate or test on that are also trained on, by their content; in small sets only.

    Args:
        splits: The splits by role.
    """
    if sum(map(len, splits.values())) > _SMALL:
        return
    sizes = {role: _sizes(split) for role, split in splits.items()}
    for role, split in splits.items():
        if role == 'train':
            continue
        # Large images hardly ever have one size, and need not be read again.
        common = set(sizes['train']) & set(sizes[role])
        learnt, found = (_rows_by_content(splits[each], sizes[each], common) for each in ('train', role))
        copies = {content: rows for content, rows in found.items() if content in learnt}
        if copies:
            content, rows = next(iter(copies.items()))
            _logger.warning(
                '%d of %d images of split %r are trained on, too: files of equal content, such as %s and %s; what is '
                'measured on them says nothing, remove them from one side', sum(map(len, copies.values())), len(split),
                split.name, split.describe(rows[0]), splits['train'].describe(learnt[content][0]),
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
