"""Random resized crops and flips, drawn for a whole batch at once; the pixels are those of timm's transform."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from .seeding import derive_seed, uniforms

__all__ = ['CropDraw', 'RandomCrops', 'stack_images']

_TRIALS = 10
# Area and shape of each trial, place of the crop, interpolation, flips.
_DRAWS = 2 * _TRIALS + 5
_INTERPOLATIONS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_MAX_REDUCTION = 8


@dataclasses.dataclass(frozen=True)
class RandomCrops:
    """timm's random resized crop with random interpolation, and flips, as a function of seed, epoch and row.

    Args:
        size: Height and width of the result.
        seed: Seed of all epochs.
        scale: Range of the area of crops, as a share.
        ratio: Range of their aspect ratio.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
    """

    size: tuple[int, int]
    seed: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0

    def draw(self, epoch: int, rows: Sequence[int]) -> list[CropDraw]:
        """Draw for some rows; those of the others in the batch change nothing."""
        numbers = uniforms(derive_seed(self.seed, 5, epoch), rows, _DRAWS)
        return [CropDraw(self, each) for each in numbers.tolist()]


@dataclasses.dataclass(frozen=True)
class CropDraw:
    """What was drawn for one image.

    Args:
        crops: The ranges.
        numbers: Numbers in [0, 1).
    """

    crops: RandomCrops
    numbers: list[float]

    @property
    def interpolation(self) -> Image.Resampling:
        """How the crop is resized."""
        return _INTERPOLATIONS[int(2 * self.numbers[-3])]

    @property
    def flips(self) -> tuple[bool, bool]:
        """Whether the crop is flipped, horizontally and vertically."""
        return self.numbers[-2] < self.crops.hflip, self.numbers[-1] < self.crops.vflip

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return left, upper, right and lower edge of the crop in an image, found as timm finds them."""
        low, high = self.crops.scale
        narrow, wide = self.crops.ratio
        flat, area = math.log(narrow), width * height
        span = math.log(wide) - flat
        for trial in range(_TRIALS):
            target = (low + (high - low) * self.numbers[2 * trial]) * area
            aspect = math.exp(flat + span * self.numbers[2 * trial + 1])
            w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                left = int(self.numbers[-5] * (width - w + 1))
                upper = int(self.numbers[-4] * (height - h + 1))
                return left, upper, left + w, upper + h
        w, h = width, height
        if width / height < narrow:
            h = max(1, round(width / narrow))
        elif width / height > wide:
            w = max(1, round(height * wide))
        left, upper = (width - w) // 2, (height - h) // 2
        return left, upper, left + w, upper + h

    def reduction(self, width: int, height: int) -> int:
        """Return the largest of 1, 2, 4 and 8 by which an image may be smaller and its crop as large as the result."""
        left, upper, right, lower = self.box(width, height)
        tall, broad = self.crops.size
        factor = _MAX_REDUCTION
        while factor > 1 and ((right - left) // factor < broad or (lower - upper) // factor < tall):
            factor //= 2
        return factor

    def apply(self, image: Image.Image, whole: tuple[int, int] | None = None) -> np.ndarray:
        """Crop, resize and flip.

        Args:
            image: The image.
            whole: Its width and height, where it was decoded at a smaller size.

        Returns:
            uint8 `[H, W, C]`, a view if it is flipped.
        """
        box = self.box(*(whole or image.size))
        tall, broad = self.crops.size
        if whole is not None and whole != image.size:
            x, y = image.width / whole[0], image.height / whole[1]
            edges = box[0] * x, box[1] * y, box[2] * x, box[3] * y
            resized = image.resize((broad, tall), self.interpolation, box=edges)
        else:
            resized = image.crop(box).resize((broad, tall), self.interpolation)
        pixels = np.asarray(resized)
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        horizontal, vertical = self.flips
        return pixels[:: -1 if vertical else 1, :: -1 if horizontal else 1]


def stack_images(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Stack images `[H, W, C]` to a batch `[B, C, H, W]`."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
