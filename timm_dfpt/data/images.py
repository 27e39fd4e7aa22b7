"""From an encoded image to a PIL image of the wanted number of channels, and the check that this will work."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

__all__ = ['BadImageError', 'EncodedImage', 'check_image', 'decode_image']

# The bytes of an image file, or the path of one. `None` is how `datasets` says that a row has no image.
EncodedImage = bytes | str | None

T = TypeVar('T')

_MODES = {1: 'L', 3: 'RGB'}
# What Pillow's decoders raise on damaged files: the documented OSError, and what escapes from the parsers of formats.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip


class BadImageError(ValueError):
    """An image that cannot be read; the message says why."""


def decode_image(source: EncodedImage, channels: int = 3) -> Image.Image:
    """Decode an image of any kind to 8 bits and the wanted number of channels.

    Grey, palette, bilevel and CMYK images are converted. Transparency is dropped, as torchvision and timm do, so that
    a model sees the same picture here and when it is used. 16-bit images are scaled to 8 bits by their upper byte
    (Pillow alone clips grey ones at 255, and white is all that is left). The EXIF orientation is applied, as
    `datasets` does. Of an animation the first frame counts.

    Args:
        source: The bytes of the file, or its path.
        channels: 1 for a grey image (Pillow mode `L`), 3 for `RGB`.

    Returns:
        A loaded image `[H, W]` or `[H, W, 3]`.

    Raises:
        ValueError: If `channels` is neither 1 nor 3.
        BadImageError: If the image is missing, unreadable, truncated, or of a kind that has no defined 8-bit range.
    """
    if channels not in _MODES:
        raise ValueError(f'channels={channels}: images are decoded to 1 (grey) or 3 (RGB) channels')
    return _reading(source, lambda image: _convert(image, _MODES[channels]))


def check_image(source: EncodedImage, in_full: bool = False) -> str | None:
    """Say what is wrong with an image, without decoding it where the format allows that.

    PNG carries checksums and JPEG an end marker, which find truncated files at the price of reading them. Files that
    fail here, and all other formats, are decoded, and that decides. What was damaged before its checksum was made, or
    in the middle of a JPEG, is found by decoding alone: 4 to 50 times slower, the larger the image the more.

    Args:
        source: The bytes of the file, or its path.
        in_full: Decode files of all formats.

    Returns:
        The reason why the image cannot be used, or `None` if it can.
    """
    try:
        if in_full or not _reading(source, lambda image: _looks_whole(image, source)):
            decode_image(source)
    except BadImageError as error:
        return str(error)
    return None


def _reading(source: EncodedImage, use: Callable[[Image.Image], T]) -> T:
    if source is None:
        raise BadImageError('the row has no image')
    if isinstance(source, bytes) and not source:
        raise BadImageError('the file is empty (0 bytes)')
    try:
        if isinstance(source, str) and os.path.getsize(source) == 0:
            raise BadImageError('the file is empty (0 bytes)')
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return use(image)
    except BadImageError:
        raise
    except _DECODE_ERRORS as error:
        raise BadImageError(f'{type(error).__name__}: {error}') from error


def _convert(image: Image.Image, mode: str) -> Image.Image:
    image.load()
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == 'F':
        raise BadImageError('pixels are floating point, whose range is not defined: convert it to 8 or 16 bits')
    if image.mode.startswith('I'):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImageError('pixels are 32-bit, whose range is not defined: convert it to 8 or 16 bits')
        # Pillow itself takes the upper byte of 16-bit RGB, so grey images are treated alike.
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    return image if image.mode == mode else image.convert(mode)


def _looks_whole(image: Image.Image, source: EncodedImage) -> bool:
    if image.format == 'PNG':
        try:
            image.verify()
        except _DECODE_ERRORS:
            return False
        return True
    return image.format == 'JPEG' and _tail(source) == b'\xff\xd9'


def _tail(source: EncodedImage) -> bytes:
    if isinstance(source, bytes):
        return source[-2:]
    assert source is not None
    with open(source, 'rb') as file:
        file.seek(-2, os.SEEK_END)
        return file.read()
