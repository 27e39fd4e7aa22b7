"""Data sets of grey images in one file of tensors, held and augmented in the memory of a GPU.

    python -m benchmarks.study.data.glyphs --fonts fonts --output glyphs94 --classes 94 --train-per-class 532 --eval-per-class 106
    python -m benchmarks.study.device glyphs94 DIR/data/glyphs94.safetensors

Images are kept in 16 levels of grey, two pixels in a byte: 70,000 of 32 x 32 pixels are 34 MiB, which can be carried to a
machine that has neither fonts nor `datasets`.
"""  # noqa: E501
from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, Sampler

from timm_dfpt.data.seeding import derive_seed

__all__ = ['SPLITS', 'DeviceImages', 'create_device_loader', 'load_split', 'pack_data']

SPLITS = ('train', 'validation', 'test')
_ORDER, _AUGMENTATION = 0, 1


def pack_data(source: Path, output: Path) -> None:
    """Pack a dataset of `benchmarks.study.data.glyphs`, whose names of classes and splits it keeps.

    Args:
        source: Its folder; images have an even width.
        output: The safetensors file.
    """
    import pyarrow.parquet as pq  # type: ignore[import-untyped]  # not needed where images are trained on

    tensors: dict[str, torch.Tensor] = {}
    names: list[str] = []
    for split in SPLITS:
        (path,) = source.rglob(f'{split}-*.parquet')
        table = pq.read_table(path)
        names = json.loads(table.schema.metadata[b'huggingface'])['info']['features']['label']['names']
        drawn = [np.asarray(Image.open(io.BytesIO(each['bytes']))) for each in table['image'].to_pylist()]
        levels = np.rint(np.stack(drawn) / 17).astype(np.uint8)
        tensors[f'{split}.images'] = torch.from_numpy(levels[..., ::2] * 16 + levels[..., 1::2])
        tensors[f'{split}.labels'] = torch.tensor(table['label'].to_pylist(), dtype=torch.int16)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output, {'names': json.dumps(names)})


def load_split(path: Path, split: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Load images uint8 `[N, 1, H, W]` and labels int64 `[N]` onto a device, and the names of the classes.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing: make it as `python -m benchmarks.study.device --help` says.')
    with safe_open(path, 'pt', device=str(device)) as file:
        packed, labels = file.get_tensor(f'{split}.images'), file.get_tensor(f'{split}.labels')
        names = json.loads(file.metadata()['names'])
    images = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(-2) * 17
    return images.unsqueeze(1), labels.long(), names


class DeviceImages(Dataset):
    """Images on a device; each epoch is augmented in one go, as a function of seed, epoch and row.

    Random crops are torchvision's `pad` and `crop`, flips its `horizontal_flip`: all images that draw the same are
    treated together.

    Args:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`.
        mean: Mean of the pixels in [0, 1], per channel.
        std: Their standard deviation.
        padding: Pixels of zeros around an image before the random crop; 0 for none.
        hflip: Probability of a flip.
        seed: Seed of order and augmentation.

    Raises:
        ImportError: If torchvision is missing and images are to be augmented.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        padding: int = 0,
        hflip: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.images, self.labels, self.padding, self.hflip, self.seed = images, labels, padding, hflip, seed
        self.mean, self.std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
        self.epoch = 0
        self._augmented: tuple[int, torch.Tensor] | None = None
        if padding or hflip:
            try:
                from torchvision.transforms.v2 import functional
            except ImportError as error:
                raise ImportError('Images are augmented by torchvision: install it, or set no_aug.') from error
            self._functional = functional

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose augmentation and order follow."""
        self.epoch = epoch

    def __getitems__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return float32 images `[B, C, H, W]`, normalised, labels `[B]` and the rows `[B]`."""
        images = self._current()[rows]
        return (images.float() / 255 - self.mean) / self.std, self.labels[rows], rows

    def _current(self) -> torch.Tensor:
        if not (self.padding or self.hflip):
            return self.images
        if self._augmented is None or self._augmented[0] != self.epoch:
            self._augmented = (self.epoch, self._augment())
        return self._augmented[1]

    def _augment(self) -> torch.Tensor:
        # Drawn on the CPU, so that all devices see the same images.
        generator = torch.Generator().manual_seed(derive_seed(self.seed, _AUGMENTATION, self.epoch))
        side, count = 2 * self.padding + 1, len(self)
        places = torch.randint(side * side, (count,), generator=generator)
        flipped = torch.rand(count, generator=generator) < self.hflip
        height, width = self.images.shape[-2:]
        padded = self._functional.pad(self.images, [self.padding] * 4)
        result = torch.empty_like(self.images)
        for place in range(side * side):
            rows = (places == place).nonzero().flatten().to(self.images.device)
            result[rows] = self._functional.crop(padded[rows], place // side, place % side, height, width)
        rows = flipped.nonzero().flatten().to(self.images.device)
        result[rows] = self._functional.horizontal_flip(result[rows])
        return result


class _Batches(Sampler):
    """Rows of each batch as a tensor on the device, in the order that `timm_dfpt.data` draws."""

    def __init__(self, images: DeviceImages, batch_size: int, shuffle: bool) -> None:
        self.images, self.batch_size, self.shuffle = images, batch_size, shuffle
        self.drop_last = shuffle

    def __len__(self) -> int:
        count = len(self.images)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = torch.arange(len(self.images))
        if self.shuffle:
            seed = derive_seed(self.images.seed, _ORDER, self.images.epoch)
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
        batches: Any = order.to(self.images.images.device).split(self.batch_size)
        return iter(batches[: len(self)])


def create_device_loader(images: DeviceImages, batch_size: int, is_training: bool) -> DataLoader:
    """Create a loader of `(input, target, index)` like those of `timm_dfpt.data.loader`, all on the images' device.

    Args:
        images: The images.
        batch_size: Images per batch.
        is_training: Shuffle, and leave out a last batch that is too short.
    """
    sampler: Any = _Batches(images, batch_size, is_training)
    return DataLoader(images, batch_sampler=sampler, collate_fn=_identity)


def _identity(batch: Any) -> Any:
    return batch


def main() -> None:
    """Command line of `pack_data`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path, help='folder of the parquet files')
    parser.add_argument('output', type=Path, help='the safetensors file')
    args = parser.parse_args()
    pack_data(args.source, args.output)


if __name__ == '__main__':
    main()
