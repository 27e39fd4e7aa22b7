"""What a training step costs on a GPU, in four parts that each fit into ten minutes.

    python -m benchmarks.gpu --part 1 --budget-seconds 540 --out part1.jsonl
    python -m benchmarks.gpu --report part1.jsonl part2.jsonl        # the tables, in Markdown
    python -m benchmarks.gpu --part 1 --device cpu --tiny            # a dry run

Part 1: eager steps in bf16, 64 images, four pairs, six ways. Part 2: compiled, and float32 with tf32, two pairs.
Part 3: 256 images. Part 4: the data path. Rows come in the order of their worth; one that would not fit into the budget
any more is skipped and named; each is written to the file at once. Weights are random, which costs the same.
"""
from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import data
from .machine import ceilings, facts
from .report import report
from .steps import ARMS, PAIRS, Row, failure, measure

# Seconds that a row is taken to need before one of its kind has been measured.
_EAGER, _COMPILED = 15.0, 75.0
_CONVOLUTIONAL = ('resnet50 -> resnet18', 'convnext_base -> convnext_atto')
_COMPILED_PAIRS = ('resnet50 -> resnet18', 'vit_base -> vit_tiny')


def rows_of(part: int) -> list[Row]:
    """Return the rows of a part, the most worth first."""
    pairs = list(PAIRS)
    if part == 1:
        rows = [Row(pair, arm) for pair in pairs for arm in ARMS]
        return rows + [Row(p, arm, channels_last=True) for p in _CONVOLUTIONAL for arm in ('timm kd', 'dfpt', 'dfpt+')]
    if part == 2:
        main = ('timm kd', 'dfpt')
        rows = [Row(pair, arm, mode='default') for pair in _COMPILED_PAIRS for arm in main]
        rows += [Row(_COMPILED_PAIRS[0], arm, mode='reduce-overhead') for arm in main]
        rows += [Row(p, arm, precision='tf32') for p in _COMPILED_PAIRS for arm in ('timm kd', 'kd', 'dfpt', 'scratch')]
        rows += [Row(pair, 'dfpt+', mode='default') for pair in _COMPILED_PAIRS]
        rows += [Row(_COMPILED_PAIRS[0], arm, mode='default', channels_last=True) for arm in main]
        rows += [Row(p, arm, precision='fp32') for p in _COMPILED_PAIRS for arm in main]
        rows += [Row(p, arm, precision='tf32') for p in _COMPILED_PAIRS for arm in ('dfpt+', 'frozen path')]
        rows += [Row(p, arm, precision='tf32', mode='default') for p in _COMPILED_PAIRS for arm in main]
        others = ('frozen path', 'kd', 'scratch')
        rows += [Row(_COMPILED_PAIRS[0], arm, mode='reduce-overhead') for arm in ('dfpt+', *others)]
        return rows + [Row(p, arm, mode='default') for p in _COMPILED_PAIRS for arm in others]
    rows = [Row(pair, arm, batch=256) for pair in pairs for arm in ('timm kd', 'dfpt', 'dfpt+', 'scratch')]
    rows += [Row(p, arm, batch=256, channels_last=True) for p in _CONVOLUTIONAL for arm in ('timm kd', 'dfpt')]
    return rows + [Row(pair, arm, batch=256) for pair in pairs for arm in ('frozen path', 'kd')]


class Budget:
    """Estimate of whether a row still fits, by the longest of its kind so far.

    Args:
        seconds: How long all rows together may take.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.longest: dict[str, float] = {}

    def left(self) -> float:
        """Return the seconds that are left."""
        return max(0.0, self.end - time.monotonic())

    def fits(self, kind: str, guess: float) -> bool:
        """Return whether a row of this kind can be measured in what is left."""
        return self.left() > 1.2 * self.longest.get(kind, guess)

    def took(self, kind: str, seconds: float) -> None:
        """Note how long a row took."""
        self.longest[kind] = max(self.longest.get(kind, 0.0), seconds)


def run_steps(
    part: int, budget: Budget, device: torch.device, tiny: bool, found: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Measure the rows of parts 1 to 3 as far as the budget goes."""
    for row in rows_of(part):
        kind, guess = ('eager', _EAGER) if row.mode == 'eager' else ('compiled', _COMPILED)
        if not budget.fits(kind, 1.0 if tiny else guess):
            reason = f'{budget.left():.0f} s of the budget are left'
            yield {'kind': 'skipped', 'part': part, 'row': str(row), 'reason': reason}
            continue
        small = Row(**{**vars(row), 'batch': 2}) if tiny else row
        start = time.monotonic()
        measured = measure(small, device, tiny, found[f'matmul_{row.precision}'])
        seconds = time.monotonic() - start
        budget.took(kind, seconds)
        yield {'kind': 'step', 'part': part, **measured, 'row_s': round(seconds, 1)}


def run_data(budget: Budget, device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Measure the data path as far as the budget goes."""
    batch, pixels, seconds = (4, 32, 0.2) if tiny else (64, 224, 8.0)
    folder = data.write_jpegs(64, 40) if tiny else data.write_jpegs(1024, links=32)
    most = 1 if tiny else 15
    rows: list[tuple[str, str, float, Callable[[], dict[str, Any]]]] = []
    for workers in (0, 1) if tiny else data.WORKERS:
        loader = functools.partial(data.measure_loader, folder, workers, device, batch, pixels, seconds)
        rows.append(('loader', f'{workers} workers', 2 * seconds, loader))
    for arm in ('dfpt', 'timm kd', 'scratch'):
        row = Row('resnet50 -> resnet18', arm, batch=batch)
        together = functools.partial(data.measure_together, folder, row, most, device, tiny, seconds)
        rows.append(('fed', f'{row}, {most} workers', 1.0 if tiny else 40.0, together))
    try:
        for kind, name, guess, run in rows:
            if not budget.fits(kind, guess):
                reason = f'{budget.left():.0f} s of the budget are left'
                yield {'kind': 'skipped', 'part': 4, 'row': name, 'reason': reason}
                continue
            start = time.monotonic()
            try:
                measured = run()
            except Exception as error:
                measured = {'row': name, 'failed': failure(error)}
            budget.took(kind, time.monotonic() - start)
            yield {'kind': kind, 'part': 4, **measured}
    finally:
        data.remove(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--part', type=int, choices=(1, 2, 3, 4), default=1, help='which part')
    parser.add_argument('--budget-seconds', type=float, default=540, help='start no row that would end later')
    parser.add_argument('--out', type=Path, help='file to which a line of JSON is added after each row')
    parser.add_argument('--device', default='cuda', help='where to run')
    parser.add_argument('--tiny', action='store_true', help='tiny networks and few repetitions: a dry run')
    parser.add_argument('--report', type=Path, nargs='+', metavar='FILE', help='print tables of these files instead')
    args = parser.parse_args(argv)
    if args.report:
        print(report(args.report))
        return
    budget, device = Budget(args.budget_seconds), torch.device(args.device)
    if device.type == 'cuda' and not torch.cuda.is_available():
        parser.error('there is no GPU; a dry run is --device cpu --tiny')

    def keep(record: dict[str, Any]) -> None:
        line = json.dumps(record)
        print(line, flush=True)
        if args.out is not None:
            with args.out.open('a', encoding='utf-8') as file:
                file.write(line + '\n')

    keep({'kind': 'machine', 'part': args.part, **facts(device)})
    found = ceilings(device, args.tiny)
    keep({'kind': 'ceilings', 'part': args.part, **found})
    rows = run_data(budget, device, args.tiny) if args.part == 4 else run_steps(
        args.part, budget, device, args.tiny, found
    )  # fmt: skip
    for record in rows:
        keep(record)


if __name__ == '__main__':
    main()
