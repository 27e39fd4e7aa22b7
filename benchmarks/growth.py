"""How cost grows: with classes, image size, batch, blocks and learners side by side.

    python -m benchmarks.growth                  # the tables, kept in benchmarks/results/growth.md
    python -m benchmarks.growth classes blocks --rounds 9
    python -m benchmarks.data_path listing --images 100 10000 1281167     # the same for images in a folder

Steps as in `benchmarks.step`, in one process and one thread. What grows in proportion to the arithmetic has the same
ms a GFLOP in each row of a table; what a step costs by itself shows where there is little arithmetic.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import timm
import torch

from timm_dfpt.job.cli import parse_config
from timm_dfpt.training.run import set_up

from .measure import interleaved, spread
from .ways import RESULTS, ROOT, Pair, Steps, count_floor


def _pair(classes: int = 1000, size: int = 64, batch: int = 4) -> Pair:
    return Pair(
        'resnet18-mobilenetv3_small_050',
        lambda: timm.create_model('resnet18', num_classes=classes),
        lambda: timm.create_model('mobilenetv3_small_050', num_classes=classes),
        (batch, 3, size, size),
    )


def _deep(stages: Sequence[str]) -> Pair:
    def create(name: str) -> Callable[[], Any]:
        return lambda: timm.create_model(name, num_classes=100)

    return Pair('resnet56-resnet20', create('cifar_resnet56'), create('cifar_resnet20'), (8, 3, 32, 32), stages)


def _axes() -> dict[str, list[tuple[Any, Pair]]]:
    """Return pairs by what grows in them."""
    modules = [f'stages.{stage}.{block}' for stage in range(3) for block in range(9)]
    return {
        'classes': [(f'{number:,}', _pair(classes=number)) for number in (10, 1000, 21_841)],
        'size': [(f'{side} px', _pair(size=side)) for side in (32, 64, 128, 256)],
        'batch': [(number, _pair(batch=number)) for number in (2, 8, 32)],
        'blocks': [(number, _deep([*modules[8 :: 18 // number][:number], modules[-1]])) for number in (1, 2, 6, 18)],
    }


def _steps(pairs: Sequence[tuple[Any, Pair]], rounds: int) -> Iterator[str]:
    columns = 'plain KD, ms', 'its GFLOP', 'ms a GFLOP', 'DFPT-KD / KD', 'floor / KD', 'over floor', 'its MiB at peak'
    yield '| | ' + ' | '.join(columns) + ' |'
    yield '|---|' + '---:|' * len(columns)
    for label, pair in pairs:
        steps, floor = Steps(pair, 'ad'), count_floor(pair)
        seconds = interleaved({way: functools.partial(steps.step, way) for way in 'ad'}, rounds, warmup=2)
        ms, demanded = 1000 * spread(seconds['a'])[0], floor.dfpt / floor.kd
        ratio, low, high = spread([d / a for a, d in zip(seconds['a'], seconds['d'], strict=True)])
        yield (
            f'| {label} | {ms:.1f} | {floor.kd / 1e9:.2f} | {ms / floor.kd * 1e9:.0f} | {ratio:.2f} ({low:.2f}-'
            f'{high:.2f}) | {demanded:.2f} | {ratio / demanded:.2f} | {steps.peak("d") / 2**20:.0f} |'
        )


def _learners(rounds: int) -> Iterator[str]:
    """Time the steps of 1, 2, 4 and 8 students with the same teacher on the quickstart's images."""
    recipe = ROOT / 'train/recipes/quickstart.yaml'
    yield '| learners | a step of all, ms | ms for each more |'
    yield '|---:|---:|---:|'
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config(['--method', 'kd', '--output', folder, '--cpu', '--batch-size', '32'], recipe)
        config = dataclasses.replace(config, baselines=[])
        setup = set_up(config)
        learners = setup.create_learners({f'kd-{i}': config for i in range(8)})
        batch = next(iter(setup.loaders['train']))
    for learner in learners:
        learner.train()
        learner.set_progress(0, 0)

    def step(number: int) -> None:
        known: dict[Any, Any] = {}
        for learner in learners[:number]:
            with setup.accelerator.accumulate(learner.module):
                learner.step(batch[0], batch[1], 0, known)

    numbers = (1, 2, 4, 8)
    seconds = interleaved({str(number): functools.partial(step, number) for number in numbers}, rounds, warmup=2)
    medians = [1000 * spread(seconds[str(number)])[0] for number in numbers]
    for i, number in enumerate(numbers):
        more = (medians[i] - medians[i - 1]) / (number - numbers[i - 1]) if i else None
        yield f'| {number} | {medians[i]:.1f} | {"" if more is None else f"{more:.1f}"} |'


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    axes = _axes()
    parser.add_argument('axes', nargs='*', help=f'{", ".join(axes)}, learners (default: all, and the table is kept)')
    parser.add_argument('--rounds', type=int, default=7, help='how often each is timed')
    args = parser.parse_args()
    unknown = [name for name in args.axes if name not in (*axes, 'learners')]
    if unknown:
        parser.error(f'{unknown[0]!r} is not one of {", ".join(axes)}, learners')
    torch.set_num_threads(1)
    lines = [
        '# Growth', '',
        f'Made by `python -m benchmarks.growth`: torch {torch.__version__}, 1 thread, {args.rounds} rounds, medians '
        '(quartiles) of CPU time, ratios within a round.',
        'resnet18 -> mobilenetv3_small_050, 1,000 classes, 64 px, batch 4 but for what grows; blocks: cifar_resnet56',
        '-> cifar_resnet20, 32 px, batch 8, the first block after the first stage in every row;',
        "learners: students of plain KD side by side in the quickstart's run, batch 32.",
    ]  # fmt: skip
    for name in args.axes or [*axes, 'learners']:
        lines += ['', f'## {name.capitalize()}', '']
        for line in _learners(args.rounds) if name == 'learners' else _steps(axes[name], args.rounds):
            lines.append(line)
            print(line, flush=True)
    if not args.axes:
        (RESULTS / 'growth.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
