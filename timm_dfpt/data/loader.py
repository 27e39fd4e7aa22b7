"""From a checked split to batches: the same ones whatever the workers, processes and interruptions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from .augment import AugmentConfig
from .image_dataset import Batch, ImageDataset
from .image_split import ImageSplit
from .seeding import derive_seed
from .workers import leave_signals_to_main_process

__all__ = ['Batch', 'EpochSampler', 'ImageDataset', 'create_loader', 'default_batch_size']

_logger = logging.getLogger(__name__)

_CACHE_BYTES = 512 * 2**20
# What a published student may say of its images.
_RANGES = {'mean': (-1e3, 1e3), 'std': (1e-6, 1e3)}
_MAX_SIDE = 4096


class EpochSampler(Sampler):
    """Rows of a dataset as `(epoch, row)`, in an order that is a function of seed and epoch only.

    The epoch is the dataset's: accelerate sets it on the sampler or on the dataset, depending on how many processes
    and skipped batches there are, and either must do.

    Args:
        dataset: The dataset.
        shuffle: Draw a new order for each epoch, else the order of the rows.
        seed: Seed of the orders.
    """

    def __init__(self, dataset: ImageDataset, shuffle: bool, seed: int) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch on the dataset."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.dataset.epoch
        order = torch.arange(len(self))
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, 0, epoch))
            order = torch.randperm(len(self), generator=generator)
        return ((epoch, row) for row in order.tolist())


def create_loader(
    dataset: ImageSplit,
    *,
    data_config: Mapping[str, Any],
    batch_size: int,
    is_training: bool,
    seed: int = 0,
    workers: int = 0,
    augmentation: AugmentConfig | None = None,
    cache_images: str = 'auto',
    pin_memory: bool = False,
    aug_cycle: int = 0,
    passes: int | None = None,
) -> DataLoader:
    """Create a loader of `(input, target, index)` batches.

    Input is float32 `[B, C, H, W]`, normalised; target int64 `[B]`; index, int64 `[B]`, the row in the split. Order and
    augmentation are functions of seed, epoch and row, not of workers, processes, batches or earlier epochs: call
    `loader.dataset.set_epoch(epoch)`, or `set_epoch` of a loader that accelerate prepared, before each epoch; after
    `skip_first_batches`, too, since accelerate before 1.15 forgets it there.

    In evaluation, and in training when `AugmentConfig` asks for nothing but `crop_padding` and flips (or `no_aug`),
    images are resized by timm's transform and the rest is done on whole batches; then images can be decoded once and
    kept in memory as uint8. Random resized crops with flips alone are drawn for whole batches (see `RandomCrops`). All
    other augmentation is timm's, image by image.

    Args:
        dataset: A split of `load_splits`.
        data_config: `input_size` `(C, H, W)`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`, as timm's
            `resolve_data_config` returns them. `C` is 1 (grey) or 3 (RGB).
        batch_size: Images per batch.
        is_training: Shuffle, augment, and leave out a last batch that is too short.
        seed: Seed of order and augmentation, not negative.
        workers: Processes that prepare batches, 0 for none.
        augmentation: Augmentation in training, timm's defaults if not given.
        cache_images: `'on'`: decode images once and keep them in memory, `'off'`: at each access, `'auto'`: once if
            the augmentation allows it, they take no more than 512 MiB, and are needed more than once. The `workers` do
            that, too; where it takes a while, a bar shows the memory and the time that is left.
        pin_memory: Return batches in pinned memory, for faster copies to an accelerator.
        aug_cycle: Augment epoch `e` as epoch `e % aug_cycle`, in an order of its own; 0 for every epoch anew.
        passes: How often the images are needed, if that is known.

    Returns:
        The loader. accelerate's `prepare` and `skip_first_batches` work on it.

    Raises:
        ValueError: If an argument is out of its range, does not fit another or the dataset.
    """
    _check_data_config(data_config)
    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size} must be at least 1.')
    if seed < 0 or workers < 0 or aug_cycle < 0:
        raise ValueError(f'seed={seed}, workers={workers} and aug_cycle={aug_cycle} must be at least 0.')
    if is_training and len(dataset) < batch_size:
        raise ValueError(
            f'split {dataset.name!r} has {len(dataset)} images, fewer than one batch of batch_size={batch_size}: give '
            'a smaller --batch-size.'
        )
    if cache_images not in ('auto', 'on', 'off'):
        raise ValueError(f"cache_images={cache_images!r} must be 'auto', 'on' or 'off'.")
    augment = (augmentation or AugmentConfig()) if is_training else None
    side = min(data_config['input_size'][1:])
    if augment is not None and augment.crop_padding > side:
        raise ValueError(f'crop_padding={augment.crop_padding} must be at most {side}, the shorter side of input_size.')
    obstacle = augment.per_image() if augment is not None else None
    num_bytes = len(dataset) * int(torch.Size(data_config['input_size']).numel())
    if cache_images == 'on' and obstacle is not None:
        raise ValueError(
            f"cache_images='on' does not work with {obstacle}, which needs every image decoded anew: use 'auto'."
        )
    if obstacle is None and num_bytes > _CACHE_BYTES:
        obstacle = f'they would take {num_bytes / 2**20:.0f} MiB'
    if obstacle is None and passes is not None and passes < 2:
        obstacle = 'they are needed once'
    cache = cache_images == 'on' or (cache_images == 'auto' and obstacle is None)
    how = f'once ({num_bytes / 2**20:.0f} MiB)' if cache else f'at each access ({obstacle or "as asked"})'
    _logger.info('Images of split %r: decoded %s', dataset.name, how)
    images = ImageDataset(dataset, data_config, augment, seed, cache, aug_cycle, workers)
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=EpochSampler(images, is_training, seed),
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=pin_memory,
        drop_last=is_training,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_main_process,
        # A generator of its own: else each epoch would draw from the global one, and evaluation change training.
        generator=torch.Generator().manual_seed(seed),
    )


def default_batch_size(num_images: int, num_processes: int = 1) -> int:
    """Return the batch size to train with when none is given.

    Args:
        num_images: Number of training images.
        num_processes: Number of processes that share a batch; each needs two images at least.

    Returns:
        128, or for few images the largest power of two by which an epoch has 10 steps, but not less than 8.
    """
    size = 128
    while num_images // size < 10 and size // 2 >= max(8, 2 * num_processes):
        size //= 2
    return size


def _identity(batch: Any) -> Any:
    return batch


def _check_data_config(data_config: Mapping[str, Any]) -> None:
    missing = [name for name in ('input_size', 'mean', 'std') if name not in data_config]
    if missing:
        raise ValueError(f'data_config lacks {missing}')
    size = tuple(data_config['input_size'])
    if len(size) != 3 or size[0] not in (1, 3) or min(size) < 1 or max(size) > _MAX_SIDE:
        raise ValueError(f'input_size={size} must be (1 or 3 channels, height, width), sides up to {_MAX_SIDE}.')
    for name in ('mean', 'std'):
        values = data_config[name]
        if len(values) != size[0]:
            raise ValueError(f'{name}={values} must have one value per channel of input_size={size}.')
        if not all(_RANGES[name][0] <= value <= _RANGES[name][1] for value in values):
            raise ValueError(f'{name}={values} must be from {_RANGES[name][0]:g} to {_RANGES[name][1]:g}')
