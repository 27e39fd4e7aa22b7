"""Parts of the data path by themselves, next to timm's: listing a folder, random resized crops, decode-once, shards.

Each comparison alternates in one process; figures are CPU time of that process, medians (quartiles) of a ratio within
a round. `python -m benchmarks.data_path listing crops once shards` runs them.
"""
from __future__ import annotations

import argparse
import functools
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image

from timm_dfpt.data.augment import AugmentConfig
from timm_dfpt.data.datasets import load_splits
from timm_dfpt.data.fingerprint import describe_data
from timm_dfpt.data.loader import create_loader

from .measure import spread

__all__ = ['PARTS', 'write_links']

_STATISTICS: dict[str, Any] = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
_MAX_LINKS = 30_000  # of one file; ext4 allows 65,000


def _cpu(act: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = act()
    return time.process_time() - start, result


def _shown(values: list[float], digits: int = 2) -> str:
    middle, low, high = spread(values)
    return f'{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})'


def write_links(folder: Path, count: int, side: int = 32, classes: int = 1000) -> None:
    """Write a training split of hard links to 100 JPEGs in class folders, and a validation split of a tenth of them."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(100):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, 'jpeg')
        encoded.append(file.getvalue())
    originals = folder.with_name(f'{folder.name}-originals')
    originals.mkdir()
    for split, number in (('train', count), ('val', min(count // 10, 50_000))):
        names = [f'n{label:08}' for label in range(min(classes, number))]
        for name in names:
            (folder / split / name).mkdir(parents=True)
        for i in range(number):
            original = originals / f'{split}-{i % 100}-{i // (100 * _MAX_LINKS)}.jpg'
            if not original.exists():
                original.write_bytes(encoded[i % 100])
            name = names[i % len(names)]
            os.link(original, folder / split / name / f'{name}_{i}.JPEG')


def _listers(folder: str) -> dict[str, Callable[[], Any]]:
    return {
        'this project': lambda: load_splits(folder, check_images='off'),
        'with the fingerprint of the data': lambda: describe_data(load_splits(folder, check_images='off')),
        'timm': lambda: [timm.data.create_dataset('folder', folder, split=split) for split in ('train', 'val')],
    }


def listing(args: argparse.Namespace) -> Iterator[str]:
    """Time the listing of folders of different sizes."""
    yield '| images to train on | who | CPU s | of timm\'s | MiB | images/s |'
    yield '|---:|---|---:|---:|---:|---:|'
    for count in args.images:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / 'data'
            write_links(folder, count)
            seconds: dict[str, list[float]] = {who: [] for who in _listers('')}
            memory = dict.fromkeys(seconds, 0)
            for turn in range(args.rounds):
                for who in list(seconds)[:: -1 if turn % 2 else 1]:
                    # In a process of its own: what one leaves in memory must not serve the next.
                    argv = [sys.executable, '-m', 'benchmarks.data_parts', who, str(folder)]
                    spent, kib = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()
                    seconds[who].append(float(spent))
                    memory[who] = max(memory[who], int(kib) // 1024)
            for who, values in seconds.items():
                ratio = _shown([a / b for a, b in zip(values, seconds['timm'], strict=True)])
                rate = (count + min(count // 10, 50_000)) / spread(values)[0]
                yield f'| {count:,} | {who} | {_shown(values)} | {ratio} | +{memory[who]} | {rate:,.0f} |'


def _list_once(who: str, folder: str) -> None:
    act = _listers(folder)[who]
    before = _resident()
    seconds, kept = _cpu(act)
    print(seconds, _resident() - before)
    del kept


def _resident() -> int:
    """Return the memory of this process in KiB (Linux)."""
    pages = int(Path('/proc/self/statm').read_text(encoding='ascii').split()[1])
    return pages * os.sysconf('SC_PAGESIZE') // 1024


def crops(args: argparse.Namespace) -> Iterator[str]:
    """Time random resized crops against timm's loader, on the same files."""
    yield '| files | augmentation | ms an image | of timm\'s |'
    yield '|---|---|---:|---:|'
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        'crops and flips': ({}, {}),
        'the same, jpeg_draft': ({'jpeg_draft': True}, {}),
        'with color jitter': ({'color_jitter': 0.4}, {'color_jitter': 0.4}),
        'with rand-m9-mstd0.5': ({'aa': 'rand-m9-mstd0.5'}, {'auto_augment': 'rand-m9-mstd0.5'}),
    }
    for side, size, number, batch in ((32, 32, 640, 64), (224, 224, 160, 8), (500, 224, 80, 8)):
        with tempfile.TemporaryDirectory() as place:
            for label in 'ab':
                (Path(place) / label).mkdir()
            for i in range(number):
                photograph(side, i).save(Path(place) / 'ab'[i % 2] / f'{i}.jpg', quality=90)
            split = load_splits(place, val_fraction=0.01).train
            config = {'input_size': (3, size, size), **_STATISTICS}
            for name, (ours, theirs) in kinds.items():
                loader = create_loader(
                    split, data_config=config, batch_size=batch, is_training=True, augmentation=AugmentConfig(**ours)
                )
                options: dict[str, Any] = {'color_jitter': None, **theirs}
                reference = timm.data.create_loader(
                    timm.data.create_dataset('folder', place), (3, size, size), batch, is_training=True,
                    num_workers=0, use_prefetcher=False, persistent_workers=False, **_STATISTICS, **options,
                )  # fmt: skip
                times: list[list[float]] = [[], []]
                for turn in range(args.rounds + 1):
                    for which, batches in list(enumerate((loader, reference)))[:: -1 if turn % 2 else 1]:
                        seconds, images = _cpu(functools.partial(_count, batches))
                        times[which].append(1e3 * seconds / images)
                own, other = times[0][1:], times[1][1:]
                ratio = _shown([a / b for a, b in zip(own, other, strict=True)])
                yield f'| {side} px JPEG to {size} | {name} | {_shown(own, 3)} | {ratio} |'


def _count(batches: Any) -> int:
    return sum(len(batch[0]) for batch in batches)


def photograph(side: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (max(4, side // 8),) * 2 + (3,), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) + rng.normal(0, 6, (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def once(args: argparse.Namespace) -> Iterator[str]:
    """Time decode-once with and without workers, by the clock."""
    yield '| images | workers | s until they are in memory | images/s |'
    yield '|---:|---:|---:|---:|'
    config = {'input_size': (3, 32, 32), **_STATISTICS}
    count = min(args.images[0], 100_000)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / 'data'
        write_links(folder, count)
        split = load_splits(str(folder), check_images='off').train
        for workers in (0, 1, 2):
            clock = []
            for _ in range(max(1, args.rounds // 2)):
                start = time.perf_counter()
                create_loader(
                    split, data_config=config, batch_size=64, is_training=False, workers=workers, cache_images='on'
                )
                clock.append(time.perf_counter() - start)
            yield f'| {count:,} | {workers} | {_shown(clock, 1)} | {count / spread(clock)[0]:,.0f} |'


def shards(args: argparse.Namespace) -> Iterator[str]:
    """Time what readers of shards give, in one process and without decoding: parquet of 224-pixel JPEGs."""
    import datasets  # costs 0.5 s

    yield '| reader | order | CPU ms an image | images a CPU s |'
    yield '|---|---|---:|---:|'
    count = 4000
    with tempfile.TemporaryDirectory() as place:
        files = []
        encoded = []
        for i in range(50):
            file = io.BytesIO()
            photograph(224, i).save(file, 'jpeg', quality=90)
            encoded.append(file.getvalue())
        for number in range(4):
            part = range(number, count, 4)
            rows = {'image': [{'bytes': encoded[i % 50], 'path': None} for i in part], 'label': [i % 10 for i in part]}
            features = datasets.Features(
                {'image': datasets.Image(decode=False), 'label': datasets.ClassLabel(num_classes=10)}
            )
            files.append(f'{place}/{number}.parquet')
            datasets.Dataset.from_dict(rows, features=features).to_parquet(files[-1], batch_size=100)
        (Path(place) / 'folder').mkdir()
        for label in 'ab':
            (Path(place) / 'folder' / label).mkdir()
        for i in range(count):
            (Path(place) / 'folder' / 'ab'[i % 2] / f'{i}.jpg').write_bytes(encoded[i % 50])
        listed = load_splits(f'{place}/folder', check_images='off', val_fraction=0.001).train
        order = np.random.default_rng(0).permutation(len(listed)).tolist()

        def from_folder() -> int:
            return sum(len(Path(path).read_bytes()) > 0 for path in map(str, listed.encoded(order)))

        stream = datasets.load_dataset('parquet', data_files=files, split='train', streaming=True, cache_dir=place)
        stream = stream.cast_column('image', datasets.Image(decode=False))
        table = datasets.Dataset.from_parquet(files, cache_dir=place)
        table = table.cast_column('image', datasets.Image(decode=False))
        ways: dict[tuple[str, str], Callable[[], int]] = {
            ('a folder, file by file', 'at random'): from_folder,
            ('parquet as a table of `datasets` (Arrow on disk)', 'at random, batches of 64'): lambda: sum(
                len(table[order[i : i + 64]]['label']) for i in range(0, len(order), 64)
            ),
            ('parquet by `datasets`, streaming', 'as stored'): lambda: sum(1 for _ in stream),
            ('parquet by `datasets`, streaming', 'shuffled in a buffer of 1,000'): lambda: sum(
                1 for _ in stream.shuffle(seed=0, buffer_size=1000)
            ),
        }
        times: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        for turn in range(args.rounds):
            for way in list(ways)[:: -1 if turn % 2 else 1]:
                seconds, images = _cpu(ways[way])
                times[way].append(1e3 * seconds / images)
        for (reader, how), values in times.items():
            yield f'| {reader} | {how} | {_shown(values, 3)} | {1e3 / spread(values)[0]:,.0f} |'


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    'listing': listing,
    'crops': crops,
    'once': once,
    'shards': shards,
}

if __name__ == '__main__':
    _list_once(*sys.argv[1:])
