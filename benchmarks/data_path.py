"""What the data path leaves of the speed of training: steps on loader batches against steps on a batch in memory.

    python -m benchmarks.data_path
    python -m benchmarks.data_path jpeg-2 --steps 6    # one of the runs; the table is only printed then
    python -m benchmarks.data_path listing crops once shards    # parts by themselves, next to timm's
    python -m benchmarks.data_path listing --images 1281167

The runs' own loaders and learners, in turn in one process: the quickstart with `kd` and `dfpt` (28x28, decoded once),
and a generated folder of 224x224 JPEGs with timm's random resized crops, decoded image by image, for a resnet18 trained
on labels alone: a teacher makes the step longer and the loader's part in it smaller. The table is kept in
benchmarks/results/data_path.md.
"""
from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from timm_dfpt.job.cli import parse_config
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.training.run import set_up

from .data_parts import PARTS
from .measure import spread
from .ways import RESULTS, ROOT

_CLASSES = ('a', 'b')
_IMAGES = 320
_HEADER = """# The data path

Made by `python -m benchmarks.data_path`: {rounds} rounds, 1 thread for the steps, a CPU with {cores} cores that others
use too; medians (quartiles). 'Share' is samples/s on loader batches over samples/s on a batch in memory, taken within a
round: by the clock, and by CPU time of the training process, which other work on the machine changes little, but which
does not see what worker processes do. 'Loader alone': samples/s where nothing is trained.

| run | workers | batch | samples/s in memory | samples/s with loader | share, clock | share, CPU time | loader alone |
|---|---:|---:|---:|---:|---:|---:|---:|
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A run to be profiled.

    Args:
        key: For the command line.
        name: For the table.
        config: Its options.
        steps: Steps a round, of each kind.
    """

    key: str
    name: str
    config: TrainConfig
    steps: int


def write_jpegs(folder: Path) -> None:
    """Write smooth random 224x224 JPEGs in class folders, about as large as photographs of that size."""
    rng = np.random.default_rng(0)
    for split, count in (('train', _IMAGES), ('val', 4)):
        for i in range(count):
            path = folder / split / _CLASSES[i % len(_CLASSES)] / f'{i:04}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((224, 224), Image.Resampling.BICUBIC)) + rng.normal(0, 6, (224, 224, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def cases(folder: Path, batch: int, steps: int) -> Iterator[Case]:
    """Yield the runs of the table."""
    recipe = ROOT / 'train/recipes/quickstart.yaml'
    for method in ('kd', 'dfpt'):
        config = parse_config(['--method', method, '--output', str(folder / method), '--cpu'], recipe)
        yield Case(f'quickstart-{method}', f'quickstart {method}, 28x28', dataclasses.replace(config, baselines=[]), 15)
    write_jpegs(folder / 'data')
    jpeg = ['--dataset', str(folder / 'data'), '--student', 'resnet18', '--batch-size', str(batch), '--cpu']
    for workers in (2, 0):
        output = ['--output', str(folder / f'jpeg-{workers}'), '--workers', str(workers)]
        config = parse_config([*jpeg, *output, '--method', 'supervised'])
        yield Case(f'jpeg-{workers}', 'resnet18, labels only, 224x224 JPEG', config, steps)


def _endless(loader: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def measure(case: Case, rounds: int) -> str:
    """Measure one run, and return its row of the table."""
    config = case.config
    setup = set_up(config)
    (learner,) = setup.create_learners({config.method: config})
    learner.train()
    learner.set_progress(0, 0)
    batches = _endless(setup.loaders['train'])
    held = next(batches)

    def step(batch: Any) -> None:
        with setup.accelerator.accumulate(learner.module):
            learner.step(batch[0], batch[1], seed=0)

    def drain() -> None:
        # What workers prepared during other work must not count as made in the time that is measured.
        for _ in range(2 * config.workers):
            next(batches)

    def from_memory() -> None:
        for _ in range(case.steps):
            step(held)

    def from_loader() -> None:
        for _ in range(case.steps):
            step(next(batches))

    def untrained() -> None:
        for _ in range(case.steps):
            next(batches)

    kinds: list[Callable[[], None]] = [from_memory, from_loader, untrained]
    clock: list[list[float]] = [[], [], []]
    cpu: list[list[float]] = [[], [], []]
    step(held)
    for turn in range(rounds):
        for i in range(3)[:: -1 if turn % 2 else 1]:
            if kinds[i] is not from_memory:
                drain()
            start = time.perf_counter(), time.process_time()
            kinds[i]()
            clock[i].append(time.perf_counter() - start[0])
            cpu[i].append(time.process_time() - start[1])
    samples = case.steps * int(setup.config.batch_size or 0)

    def rates(seconds: list[float]) -> str:
        middle, low, high = spread([samples / s for s in seconds])
        return f'{middle:.0f} ({low:.0f}-{high:.0f})' if middle >= 100 else f'{middle:.1f} ({low:.1f}-{high:.1f})'

    def share(seconds: list[list[float]]) -> str:
        middle, low, high = spread([100 * memory / loader for memory, loader in zip(*seconds[:2], strict=True)])
        return f'{middle:.0f}% ({low:.0f}-{high:.0f})'

    cells = (config.workers, int(setup.config.batch_size or 0), *map(rates, clock[:2]), share(clock), share(cpu))
    return f'| {case.name} | {" | ".join(map(str, cells))} | {samples / spread(clock[2])[0]:.0f} |'


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = 'quickstart-kd, quickstart-dfpt, jpeg-2, jpeg-0'
    parser.add_argument('runs', nargs='*', help=f'{runs} (default: these), {", ".join(PARTS)}')
    parser.add_argument('--rounds', type=int, default=5, help='how often each is timed')
    parser.add_argument('--batch', type=int, default=8, help='batch size of the JPEG runs')
    parser.add_argument('--steps', type=int, default=2, help='steps a round of the JPEG runs')
    parser.add_argument('--images', type=int, nargs='+', default=[100_000], help='images of the folders to list')
    args = parser.parse_args()
    torch.set_num_threads(1)
    for part in [run for run in args.runs if run in PARTS]:
        for line in PARTS[part](args):
            print(line, flush=True)
    if args.runs and set(args.runs) <= set(PARTS):
        return
    text = _HEADER.format(rounds=args.rounds, cores=os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder), args.batch, args.steps):
            if args.runs and case.key not in args.runs:
                continue
            text += measure(case, args.rounds) + '\n'
            print(text.splitlines()[-1], flush=True)
            if not args.runs:
                (RESULTS / 'data_path.md').write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
