"""What happens to an image before a model sees it: timm's transforms, and a crop-and-flip on whole batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import create_transform
from torch.nn import functional as F
from torchvision import transforms

from .checks import checked
from .crops import RandomCrops
from .seeding import derive_seed, preserved_rng, seed_rng

__all__ = ['AugmentConfig', 'BatchTransform', 'create_crops', 'create_transforms']


_TRIALS = 200  # of a policy, which draws a few of its operations each time


def _probability(default: float) -> Any:
    return dataclasses.field(default=default, metadata={'low': 0, 'high': 1})


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images, names as in timm's train.py, defaults as on the command line (no color jitter).

    Args:
        no_aug: No augmentation: resize only.
        train_crop_mode: `'rrc'` (random resized crop, timm's default), `'rkrc'` or `'rkrr'`.
        scale: Range of the area of random resized crops, as a share.
        ratio: Range of their aspect ratio.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of changes of brightness, contrast and saturation; 0 for none.
        aa: Policy such as `'rand-m9-mstd0.5-inc1'`, see timm.
        reprob: Probability of random erasing.
        crop_padding: CIFAR's augmentation instead of random resized crops: the image as in evaluation, padded by so
            many black pixels on every side, and a random crop of the input size.
        jpeg_draft: Decode a JPEG at 1/2, 1/4 or 1/8 of its size where its random resized crop is still as large as the
            input: faster for large photographs, and other pixels.
    """

    no_aug: bool = False
    train_crop_mode: Literal['rrc', 'rkrc', 'rkrr'] | None = None
    scale: Sequence[float] | None = None
    ratio: Sequence[float] | None = None
    hflip: float = _probability(0.5)
    vflip: float = _probability(0.0)
    color_jitter: float | Sequence[float] | None = None
    aa: str | None = None
    reprob: float = _probability(0.0)
    crop_padding: int = dataclasses.field(default=0, metadata={'low': 0})
    jpeg_draft: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.metadata or field.name == 'train_crop_mode':
                checked(AugmentConfig, field, getattr(self, field.name))
        for name in ('scale', 'ratio'):
            bounds = getattr(self, name)
            if bounds is not None and not (len(bounds) == 2 and 0 < bounds[0] <= bounds[1]):
                raise ValueError(f'{name}={bounds} must be a lower and an upper bound, both positive, such as 0.08 1.')
        if self.scale is not None and self.scale[1] > 1 and self.train_crop_mode in (None, 'rrc'):
            raise ValueError(f'scale={self.scale} must be shares of the image area, at most 1.')
        jitter = self.color_jitter
        if any(value < 0 for value in (jitter if isinstance(jitter, Sequence) else [jitter or 0])):
            raise ValueError(f'color_jitter={jitter} must be at least 0.')
        if self.crop_padding:
            clash = [name for name in ('no_aug', 'train_crop_mode', 'scale', 'ratio') if getattr(self, name)]
            if clash:
                raise ValueError(
                    f'crop_padding={self.crop_padding} and {clash[0]} contradict each other: give one of them.'
                )

        if self.jpeg_draft and not self.plain_crops():
            raise ValueError(
                'jpeg_draft works with random resized crops and flips only: leave it out, or all of no_aug, '
                'train_crop_mode, crop_padding, aa, color_jitter and reprob.'
            )

    def plain_crops(self) -> bool:
        """Say whether there is nothing but random resized crops and flips."""
        others = (self.no_aug, self.crop_padding, self.aa, self.color_jitter, self.reprob)
        return self.train_crop_mode in (None, 'rrc') and not any(others)

    def per_image(self) -> str | None:
        """Name what must be done image by image and keeps images from being decoded once for all, if anything does."""
        if self.no_aug:
            return None
        if not self.crop_padding:
            return 'random resized crops (crop_padding=0)'
        used = [name for name in ('aa', 'color_jitter', 'reprob') if getattr(self, name)]
        return f'{used[0]}={getattr(self, used[0])!r}' if used else None


class BatchTransform:
    """Random crops, flips and normalisation of a whole batch of images that have one size.

    What happens to an image is a function of seed, epoch and its row, whatever batch it is in.

    Args:
        num_rows: Number of images in the split.
        mean: Mean of each channel, images being in [0, 1].
        std: Standard deviation of each channel.
        seed: Seed of all epochs.
        padding: Black pixels on every side before a random crop, 0 for no crop.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
    """

    def __init__(
        self,
        num_rows: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        padding: int = 0,
        hflip: float = 0.0,
        vflip: float = 0.0,
    ) -> None:
        self.num_rows = num_rows
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.seed = seed
        self.padding = padding
        self.hflip = hflip
        self.vflip = vflip
        self._epoch: int | None = None
        self._draws: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))

    def __call__(self, images: torch.Tensor, rows: torch.Tensor, epoch: int) -> torch.Tensor:
        """Augment and normalise.

        Args:
            images: uint8 `[B, C, H, W]`.
            rows: Row of each image in the split, int64 `[B]`.
            epoch: Number of the epoch.

        Returns:
            float32 `[B, C, H, W]`.
        """
        if self.padding or self.hflip or self.vflip:
            images = self._crop_and_flip(images, *(draw[rows] for draw in self.draws(epoch)))
        # The operations of torchvision's ToTensor and Normalize, whose results must be matched to the last bit.
        return images.float().div_(255).sub_(self.mean).div_(self.std)

    def draws(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw an epoch's random numbers.

        Args:
            epoch: Number of the epoch.

        Returns:
            Top and left edge of each row's crop in the padded image, int64 `[N, 2]`, and whether it is flipped
            horizontally and vertically, bool `[N, 2]`.
        """
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, 1, epoch))
            offsets = torch.randint(0, 2 * self.padding + 1, (self.num_rows, 2), generator=generator)
            chances = torch.rand(self.num_rows, 2, generator=generator)
            self._draws = (offsets, chances < torch.tensor([self.hflip, self.vflip]))
            self._epoch = epoch
        return self._draws

    def _crop_and_flip(self, images: torch.Tensor, offsets: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = images.shape
        padded = F.pad(images, [self.padding] * 4)
        ys = _flipped(offsets[:, :1] + torch.arange(height), flips[:, 1])
        xs = _flipped(offsets[:, 1:] + torch.arange(width), flips[:, 0])
        # Lines first, as whole runs of memory: it is what makes this several times faster than a gather of pixels.
        lines = torch.arange(batch * channels).view(batch, channels, 1) * padded.shape[2] + ys[:, None]
        picked = padded.view(-1, padded.shape[3]).index_select(0, lines.flatten())
        return picked.view(batch, channels, height, -1).gather(3, xs[:, None, None].expand_as(images))


def _flipped(positions: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    return torch.where(flip[:, None], positions.flip(1), positions)


def create_crops(data_config: Mapping[str, Any], augment: AugmentConfig | None, seed: int) -> RandomCrops | None:
    """Return random resized crops and flips, where there is nothing else to augment by.

    Args:
        data_config: As for `create_transforms`.
        augment: Augmentation for training, `None` for evaluation.
        seed: Seed of all epochs.
    """
    if augment is None or not augment.plain_crops():
        return None
    height, width = data_config['input_size'][1:]
    ranges = {'scale': augment.scale, 'ratio': augment.ratio}
    given: dict[str, Any] = {name: tuple(bounds) for name, bounds in ranges.items() if bounds}
    return RandomCrops((height, width), seed, hflip=augment.hflip, vflip=augment.vflip, **given)


def create_transforms(
    data_config: Mapping[str, Any], augment: AugmentConfig | None
) -> tuple[Callable[[Image.Image], torch.Tensor], bool]:
    """Build the transform of single images.

    Args:
        data_config: `input_size` `(C, H, W)`, `mean`, `std`, and optionally `interpolation`, `crop_pct`, `crop_mode`,
            as timm's `resolve_data_config` returns them.
        augment: Augmentation for training, `None` for evaluation.

    Returns:
        A function of a PIL image, and whether it is the whole transform. If so it returns a normalised float32
        `[C, H, W]` and is random. If not it returns the resized image as uint8 `[C, H, W]`, always the same, and a
        `BatchTransform` is to follow.

    Raises:
        ValueError: If timm refuses the configuration.
    """
    size = tuple(data_config['input_size'])
    evaluation = {
        'input_size': size,
        'interpolation': data_config.get('interpolation') or 'bilinear',
        'mean': tuple(data_config['mean']),  # the color of borders, where crop_mode asks for them
        'std': tuple(data_config['std']),
        'crop_pct': data_config.get('crop_pct'),
        'crop_mode': data_config.get('crop_mode'),
        'normalize': False,
    }
    if augment is None or (augment.crop_padding and augment.per_image() is None):
        return create_transform(**evaluation), False
    if augment.no_aug:
        return create_transform(**evaluation, is_training=True, no_aug=True), False
    try:
        primary, secondary, final = create_transform(
            size,
            is_training=True,
            separate=True,
            train_crop_mode=augment.train_crop_mode,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.aa,
            interpolation='random',
            mean=evaluation['mean'],
            std=evaluation['std'],
            re_prob=augment.reprob,
            re_mode='pixel',
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(f'timm refuses the augmentation {augment}: {error}') from error
    if augment.crop_padding:
        # The last step turns the image into a tensor, which timm's policies come before.
        resize = create_transform(**evaluation).transforms[:-1]
        crop = transforms.RandomCrop(size[-2:], padding=augment.crop_padding)
        primary = transforms.Compose([*resize, crop, *primary.transforms[1:]])
    transform = transforms.Compose([primary, secondary, final])
    if augment.aa:
        _try(transform, size, augment.aa)
    return transform, True


def _try(transform: Callable[[Image.Image], torch.Tensor], size: Sequence[int], policy: str) -> None:
    """Refuse a policy some of whose operations Pillow refuses, before training comes to them."""
    image = Image.new('L' if size[0] == 1 else 'RGB', (8, 8))
    with preserved_rng():
        seed_rng(0)
        try:
            for _ in range(_TRIALS):
                transform(image)
        except (ArithmeticError, OSError, TypeError, ValueError) as error:
            raise ValueError(f'aa={policy!r} fails on some images ({error}): choose another policy.') from error
