"""Images of a split as tensors, each a function of seed, epoch and row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .augment import AugmentConfig, BatchTransform, create_crops, create_transforms
from .crops import stack_images
from .image_split import ImageSplit
from .images import BadImageError, Reduction, decode_and_inspect, decode_image, read_source
from .progress import progress_bar
from .seeding import derive_seed, preserved_rng, seed_rng
from .workers import leave_signals_to_main_process

__all__ = ['Batch', 'ImageDataset']

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_REMEDY = 'repair or remove it'
# Of images that are decoded once: what a process gives back at a time, and how many make processes worth it.
_BLOCK_ROWS, _BLOCK_BYTES = 256, 4 * 2**20
_MANY = 2048


class ImageDataset(Dataset):
    """Images of a split as batches, decoded at each access or once for all.

    All randomness is a function of seed, epoch and row. Rows are asked for as `(epoch, row)`, so that workers that live
    longer than an epoch know the right one; a plain row means the epoch of `set_epoch`.

    Args:
        split: The images.
        data_config: Input size and statistics, see `create_loader`.
        augment: Augmentation, `None` for evaluation.
        seed: Seed of the augmentation.
        cache: Decode all images now and keep them as uint8.
        aug_cycle: Augment epoch `e` as epoch `e % aug_cycle`; 0 for every epoch anew.
        workers: Processes that decode all images, 0 for none.

    Raises:
        ValueError: If `cache` is asked for and the augmentation works image by image.
    """

    def __init__(
        self,
        split: ImageSplit,
        data_config: Mapping[str, Any],
        augment: AugmentConfig | None,
        seed: int,
        cache: bool,
        aug_cycle: int = 0,
        workers: int = 0,
    ) -> None:
        self.split = split
        self.aug_cycle = aug_cycle
        self.seed = seed
        self.epoch = 0
        self.jpeg_draft = augment is not None and augment.jpeg_draft
        self.channels = int(data_config['input_size'][0])
        self.crops = create_crops(data_config, augment, seed)
        self.transform, complete = create_transforms(data_config, augment)
        self.batch_transform: BatchTransform | None = None
        if self.crops is not None or not complete:
            # What random resized crops are flipped by belongs to their draw.
            batched = augment if augment is not None and self.crops is None and not augment.no_aug else None
            self.batch_transform = BatchTransform(
                len(split),
                data_config['mean'],
                data_config['std'],
                seed,
                padding=batched.crop_padding if batched is not None else 0,
                hflip=batched.hflip if batched is not None else 0.0,
                vflip=batched.vflip if batched is not None else 0.0,
            )
        self.cached: torch.Tensor | None = None
        if cache:
            if complete:
                reason = augment.per_image() if augment is not None else None
                raise ValueError(f'images cannot be decoded once for all: {reason} works image by image')
            self.cached = self._decode_all(tuple(data_config['input_size']), workers)

    def __len__(self) -> int:
        return len(self.split)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that augmentation and order are drawn for."""
        self.epoch = epoch

    def __getitem__(self, key: int | tuple[int, int]) -> Batch:
        """Get one image: input `[C, H, W]`, target `[]`, index `[]`."""
        inputs, target, index = self.__getitems__([key])
        return inputs[0], target[0], index[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> Batch:
        """Get a batch: input float32 `[B, C, H, W]`, target int64 `[B]`, index (row in the split) int64 `[B]`."""
        pairs = [key if isinstance(key, tuple) else (self.epoch, key) for key in keys]
        if self.aug_cycle:
            pairs = [(epoch % self.aug_cycle, row) for epoch, row in pairs]
        epoch, rows = pairs[0][0], [row for _, row in pairs]
        index = torch.tensor(rows)
        if self.batch_transform is None:
            with preserved_rng():
                inputs = torch.stack([self._augmented(*each) for each in zip(self._decode(rows), pairs, strict=True)])
        elif self.crops is not None:
            inputs = self.batch_transform(self._cropped(rows, epoch), index, epoch)
        else:
            images = self.cached.index_select(0, index) if self.cached is not None else self.resized(rows)
            inputs = self.batch_transform(images, index, epoch)
        return inputs, self.split.labels[index], index

    def _augmented(self, image: Image.Image, pair: tuple[int, int]) -> torch.Tensor:
        seed_rng(derive_seed(self.seed, 2, *pair))
        return self.transform(image)

    def _cropped(self, rows: Sequence[int], epoch: int) -> torch.Tensor:
        assert self.crops is not None
        draws = self.crops.draw(epoch, rows)
        reductions = [Reduction(draw.reduction) for draw in draws] if self.jpeg_draft else None
        images = self._decode(rows, reductions)
        if reductions is None:
            return stack_images([draw.apply(image) for draw, image in zip(draws, images, strict=True)])
        # Each is known once its image is decoded.
        cropped = zip(draws, images, reductions, strict=True)
        return stack_images([draw.apply(image, reduction.whole) for draw, image, reduction in cropped])

    def resized(self, rows: Sequence[int]) -> torch.Tensor:
        """Return images as they are before what is random, uint8 `[B, C, H, W]`."""
        return torch.stack([self.transform(image) for image in self._decode(rows)])

    def _decode(self, rows: Sequence[int], reductions: Sequence[Reduction] | None = None) -> Iterator[Image.Image]:
        findings, background = self.split.findings, self.split.background
        unread = findings.unread(rows) if findings is not None else [False] * len(rows)
        wishes: Sequence[Reduction | None] = reductions or [None] * len(rows)
        for row, source, new, wish in zip(rows, self.split.encoded(rows), unread, wishes, strict=True):
            try:
                if findings is None or not new:
                    yield decode_image(source, self.channels, background, wish)
                    continue
                content = read_source(source)
                image, report = decode_and_inspect(content, self.channels, background, wish)
                findings.add(row, content or b'', report)
                yield image
            except BadImageError as error:
                raise BadImageError(f'{self.split.describe(row)}: {error}; {_REMEDY}') from error

    def _decode_all(self, size: tuple[int, ...], workers: int) -> torch.Tensor:
        images = torch.empty(len(self), *size, dtype=torch.uint8)
        one = images[0].numel()
        blocks = _Blocks(self, max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // one)))
        loader: DataLoader[torch.Tensor] = DataLoader(
            blocks,
            batch_size=None,
            num_workers=workers if len(self) >= _MANY else 0,
            collate_fn=lambda block: block,
            worker_init_fn=leave_signals_to_main_process,
            # Else the global one would be drawn from.
            generator=torch.Generator(),
        )
        what = f'decoding {self.split.name} once, into {images.numel() / 2**20:.0f} MiB'
        start = 0
        with progress_bar(what, 'images', len(self)) as bar:
            for block in loader:
                images[start : start + len(block)] = block
                start += len(block)
                bar.update(len(block))
        return images


class _Blocks(Dataset):
    def __init__(self, images: ImageDataset, rows: int) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return -(-len(self.images) // self.rows)

    def __getitem__(self, block: int) -> torch.Tensor:
        return self.images.resized(range(block * self.rows, min((block + 1) * self.rows, len(self.images))))
