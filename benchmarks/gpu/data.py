"""The data path: JPEGs of 224 pixels through a loader with more and more workers, against what the step needs."""
from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .steps import Row, prepare

__all__ = ['WORKERS', 'measure_loader', 'measure_together', 'write_jpegs']

# By worth.
WORKERS = (15, 0, 8, 4, 2, 1, 12)
_CONFIG: dict[str, Any] = {
    'input_size': (3, 224, 224), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bicubic', 'crop_pct': 0.95,
}  # fmt: skip


def write_jpegs(count: int, size: int = 224, links: int = 1) -> Path:
    """Write images of waves and noise, as large as photographs of that size, into class folders; return the folder.

    Args:
        count: Images to train on.
        size: Height and width, pixels.
        links: Names of each image: an epoch so short that workers mostly begin one would say nothing.
    """
    root = Path(tempfile.mkdtemp(prefix='timm_dfpt-jpegs-'))
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size] / size
    for split, part in (('train', count), ('val', 10)):
        for i in range(part):
            folder = root / split / f'class{i % 10}'
            folder.mkdir(parents=True, exist_ok=True)
            waves = [np.sin(x * rng.uniform(2, 40) + y * rng.uniform(2, 40) + rng.uniform(0, 6)) for _ in range(3)]
            pixels = 128 + 80 * np.stack(waves, axis=2) + rng.normal(0, 12, (size, size, 3))
            first = folder / f'{i:05}.jpg'
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(first, quality=90)
            for link in range(1, links):
                os.link(first, folder / f'{i:05}-{link}.jpg')
    return root


def _loader(folder: Path, batch: int, workers: int, pin: bool, size: int) -> tuple[str, Iterable[Any]]:
    config = {**_CONFIG, 'input_size': (3, size, size)}
    if importlib.util.find_spec('datasets') is not None:
        from timm_dfpt.data.datasets import load_splits
        from timm_dfpt.data.loader import create_loader

        split = load_splits(str(folder)).train
        return 'timm_dfpt', create_loader(
            split, data_config=config, batch_size=batch, is_training=True, workers=workers, pin_memory=pin
        )
    from timm.data import create_dataset
    from timm.data import create_loader as timms_loader

    images = create_dataset('', root=str(folder), split='train')
    del config['crop_pct']
    return 'timm', timms_loader(
        images, batch_size=batch, is_training=True, num_workers=workers, use_prefetcher=False, pin_memory=pin, **config
    )


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    return itertools.chain.from_iterable(itertools.repeat(loader))


def measure_loader(
    folder: Path, workers: int, device: torch.device, batch: int = 64, size: int = 224, seconds: float = 8
) -> dict[str, Any]:
    """Measure images/s of the loader alone, copies to the device included."""
    name, loader = _loader(folder, batch, workers, device.type == 'cuda', size)
    batches = _endless(loader)
    start = time.perf_counter()
    next(batches)
    first = time.perf_counter() - start
    # What the workers had ready before is not counted.
    for _ in range(2 * workers):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images = next(batches)[0].to(device, non_blocking=True)
        count += len(images)
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    rate = count / (time.perf_counter() - start)
    return {'loader': name, 'workers': workers, 'batch': batch, 'images_per_s': rate, 'first_batch_s': first}


def measure_together(
    folder: Path, row: Row, workers: int, device: torch.device, tiny: bool, seconds: float = 8
) -> dict[str, Any]:
    """Measure images/s of the row's steps on batches of the loader, and on one batch in the device's memory."""
    step, _ = prepare(row, device, tiny)
    size = step.input.shape[-1]
    name, loader = _loader(folder, row.batch, workers, device.type == 'cuda', size)
    batches = _endless(loader)

    def rate(feed: bool) -> float:
        times = []
        for _ in range(3):
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < seconds / 6:
                if feed:
                    step.input = next(batches)[0].to(device, non_blocking=True)
                step()
                count += row.batch
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            times.append(count / (time.perf_counter() - start))
        return statistics.median(times)

    rate(False)
    # What the workers have ready is not counted; in the meantime they would only prepare more of it.
    for _ in range(2 * workers + 1):
        next(batches)
    fed, memory = rate(True), rate(False)
    shown = {'pair': row.pair, 'arm': row.arm, 'batch': row.batch, 'precision': row.precision, 'mode': row.mode}
    return {**shown, 'loader': name, 'workers': workers, 'images_per_s': fed, 'images_per_s_in_memory': memory}


def remove(folder: Path) -> None:
    """Remove the images."""
    shutil.rmtree(folder, ignore_errors=True)
