"""From an encoded image to a PIL image of the wanted number of channels, and the check that this will work."""

from __future__ import annotations

import dataclasses
import io
import os
import struct
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageColor, ImageOps

__all__ = [
    'BadImageError', 'EncodedImage', 'ImageReport', 'Reduction', 'decode_and_inspect', 'decode_image', 'inspect_image',
    'parse_color', 'read_source',
]  # fmt: skip

# The bytes of an image file, or the path of one. `None` is how `datasets` says that a row has no image.
EncodedImage = bytes | str | None

T = TypeVar('T')

_ORIENTATION = 0x0112  # in EXIF
_MODES = {1: 'L', 3: 'RGB'}
# What Pillow's decoders raise on damaged files: the documented OSError, and what escapes from the parsers of formats.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip


class BadImageError(ValueError):
    """An image that cannot be read; the message says why."""


class ImageReport(NamedTuple):
    """What was found in an image.

    Args:
        problem: The reason why it cannot be used, or `None` if it can.
        transparent: Whether pixels of it are transparent.
        peak: The largest value of an image of 16 bits; `None` for other images.
    """

    problem: str | None = None
    transparent: bool = False
    peak: int | None = None


def parse_color(text: str) -> tuple[int, int, int]:
    """Read a color.

    Args:
        text: A name such as `white`, three numbers from 0 to 255 such as `255,255,255`, one for a grey, or `#ffffff`.

    Returns:
        Red, green and blue, from 0 to 255.

    Raises:
        ValueError: If it is none of these.
    """
    numbers = text.strip(' ()[]').split(',')
    if len(numbers) in (1, 3) and all(number.strip().isdecimal() for number in numbers):
        values = [int(number) for number in numbers] * (3 // len(numbers))
        if max(values) <= 255:
            return values[0], values[1], values[2]
    try:
        color = ImageColor.getrgb(text.strip())
    except ValueError as error:
        raise ValueError(f'background={text!r} must be a color such as white, 255,255,255 or #ffffff.') from error
    return color[0], color[1], color[2]


@dataclasses.dataclass
class Reduction:
    """A wish to have a JPEG decoded at a smaller size, which is several times faster.

    Args:
        choose: From width and height the factor by which it may be smaller: 1, 2, 4 or 8.
        whole: Its width and height, once it is decoded.
    """

    choose: Callable[[int, int], int]
    whole: tuple[int, int] | None = None

    def apply(self, image: Image.Image) -> None:
        """Set the size of the decoder, if it is one of JPEGs; an orientation would turn width and height."""
        if image.format != 'JPEG' or image.getexif().get(_ORIENTATION, 1) != 1:
            return
        self.whole = image.size
        factor = self.choose(*image.size)
        if factor > 1:
            image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))


def read_source(source: EncodedImage) -> bytes | None:
    """Return the bytes of an image.

    Raises:
        BadImageError: If there is no such file.
    """
    if not isinstance(source, str):
        return source
    try:
        with open(source, 'rb') as file:
            return file.read()
    except OSError as error:
        raise BadImageError(f'{type(error).__name__}: {error}') from error


def decode_image(
    source: EncodedImage, channels: int = 3, background: str | None = None, reduction: Reduction | None = None
) -> Image.Image:
    """Decode an image of any kind to 8 bits and the wanted number of channels.

    Grey, palette, bilevel and CMYK images are converted. Transparency is dropped, as torchvision, timm and transformers
    do, so that a model sees the same here and when it is used, or laid over a background. 16-bit images are scaled to
    8 bits by their upper byte (Pillow alone clips grey ones at 255, and white is all that is left). The EXIF
    orientation is applied, as `datasets` does. Of an animation the first frame is used.

    Args:
        source: The bytes of the file, or its path.
        channels: 1 for a grey image (Pillow mode `L`), 3 for `RGB`.
        background: The color to lay transparent images over, see `parse_color`; `None`: transparency is dropped.
        reduction: Where a JPEG may be smaller.

    Returns:
        A loaded image `[H, W]` or `[H, W, 3]`.

    Raises:
        ValueError: If `channels` is neither 1 nor 3, or `background` is not a color.
        BadImageError: If the image is missing, unreadable, truncated, or of a kind that has no defined 8-bit range.
    """
    if channels not in _MODES:
        raise ValueError(f'channels={channels}: images have 1 (gray) or 3 (RGB) channels here.')
    color = None if background is None else parse_color(background)

    def use(image: Image.Image) -> Image.Image:
        if reduction is not None:
            reduction.apply(image)
        return _convert(image, _MODES[channels], color)

    return _reading(source, use)


def decode_and_inspect(
    source: EncodedImage, channels: int = 3, background: str | None = None, reduction: Reduction | None = None
) -> tuple[Image.Image, ImageReport]:
    """Decode an image as `decode_image` does, and say what is unusual about it.

    Args:
        source: As for `decode_image`.
        channels: As for `decode_image`.
        background: As for `decode_image`.
        reduction: As for `decode_image`.

    Raises:
        BadImageError: If `decode_image` raises it.
    """
    color = None if background is None else parse_color(background)

    def use(image: Image.Image) -> tuple[Image.Image, ImageReport]:
        if reduction is not None:
            reduction.apply(image)
        # Pillow keeps the upper byte of colors of 16 bits; this is where it says so.
        wide = any(';16' in str(tile) for tile in getattr(image, 'tile', ()))
        converted = _convert(image, _MODES[channels], color)
        peak = None
        if image.mode.startswith('I'):
            peak = int(np.asarray(image).max())
        elif wide:
            peak = 256 * int(np.asarray(converted).max()) + 255
        alpha = image.convert('RGBA').getchannel('A') if image.has_transparency_data else None
        return converted, ImageReport(transparent=alpha is not None and int(np.asarray(alpha).min()) < 255, peak=peak)

    return _reading(source, use)


def inspect_image(source: EncodedImage) -> ImageReport:
    """Decode an image, and say what is wrong with it or unusual.

    Args:
        source: The bytes of the file, or its path.
    """
    try:
        return decode_and_inspect(source)[1]
    except BadImageError as error:
        return ImageReport(problem=str(error))


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


def _convert(image: Image.Image, mode: str, background: tuple[int, int, int] | None = None) -> Image.Image:
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == 'F':
        raise BadImageError('its pixels are floating point, whose range is not defined: convert it to 8 or 16 bits')
    if image.mode.startswith('I'):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImageError('its pixels are 32-bit, whose range is not defined: convert it to 8 or 16 bits')
        # Pillow itself takes the upper byte of 16-bit RGB, so grey images are treated alike.
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if background is not None and image.has_transparency_data:
        below = Image.new('RGBA', image.size, (*background, 255))
        image = Image.alpha_composite(below, image.convert('RGBA')).convert('RGB')
    if image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    return image if image.mode == mode else image.convert(mode)
