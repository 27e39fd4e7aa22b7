"""Small images of what a model is evaluated on, as it sees them."""
from __future__ import annotations

import io
from collections.abc import Iterable

import torch
from PIL import Image

from ..data.loader import ImageDataset

__all__ = ['thumbnails']

_SIDE = 96
_QUALITY = 80


def thumbnails(
    dataset: ImageDataset, rows: Iterable[int], mean: Iterable[float], std: Iterable[float]
) -> dict[int, bytes]:
    """Return images as JPEG files, at most 96 pixels wide and high.

    Args:
        dataset: The images, as they are evaluated.
        rows: Rows in it.
        mean: What was subtracted, per channel.
        std: What was divided by, per channel.
    """
    images = {}
    mean, std = (torch.tensor(list(values)).view(-1, 1, 1) for values in (mean, std))
    for row in sorted(set(rows)):
        pixels = ((dataset[row][0] * std + mean) * 255).round().clamp(0, 255).byte()
        image = Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous()).numpy())
        image.thumbnail((_SIDE, _SIDE))
        file = io.BytesIO()
        # Of so small an image halved colors would be seen.
        image.save(file, 'JPEG', quality=_QUALITY, subsampling=0)
        images[row] = file.getvalue()
    return images
