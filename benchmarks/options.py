"""What the options that make a step cheaper save: logits from a cache, a bfloat16 teacher, channels_last.

    python -m benchmarks.options quickstart resnet50-resnet18

Side by side in one process and one thread, as in `benchmarks.step`; kept in benchmarks/results/options.md.
"""
from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch

from timm_dfpt.rivals import AdaptedTeacher

from .measure import interleaved, spread
from .step import _RESULTS, Pair, Steps, all_pairs


def _cached_kd(steps: Steps) -> Callable[[], Any]:
    teacher: Any = steps.tasks['b'].teacher.model
    assert isinstance(teacher, AdaptedTeacher)
    logits = {0: teacher(steps.input)}

    def step() -> None:
        with teacher.sharing(dict(logits), 0):
            steps.step('b')

    return step


def _cached_dfpt(steps: Steps) -> Callable[[], Any]:
    task: Any = steps.tasks['d']
    logits = task.teacher.original(task.adapter(steps.input))
    original = task.forward
    task.forward = functools.partial(original, teacher_logits=logits)
    return lambda: steps.step('d')


def _half(steps: Steps) -> Steps:
    for task in steps.tasks.values():
        if hasattr(task.teacher, 'prompt_path'):
            task.teacher.model.to(torch.bfloat16)
            task.teacher.prompt_path.share_weights_with(task.teacher.model)
        else:
            task.teacher.model.model.to(torch.bfloat16)
    return steps


def _channels_last(steps: Steps) -> Steps:
    for task in steps.tasks.values():
        task.to(memory_format=torch.channels_last)
    steps.input = steps.input.contiguous(memory_format=torch.channels_last)
    return steps


def measure(pair: Pair, rounds: int) -> list[str]:
    """Time every option on one pair, and return rows of a table."""
    plain, half, last = (Steps(pair, 'bd') for _ in range(3))
    _half(half)
    _channels_last(last)
    runs: dict[str, Callable[[], Any]] = {
        'kd': functools.partial(plain.step, 'b'),
        'kd, logits from the cache': _cached_kd(Steps(pair, 'b')),
        'kd, bfloat16 teacher': functools.partial(half.step, 'b'),
        'kd, channels_last': functools.partial(last.step, 'b'),
        'DFPT-KD': functools.partial(plain.step, 'd'),
        'DFPT-KD, logits from the cache': _cached_dfpt(Steps(pair, 'd')),
        'DFPT-KD, bfloat16 teacher': functools.partial(half.step, 'd'),
        'DFPT-KD, channels_last': functools.partial(last.step, 'd'),
    }
    seconds = interleaved(runs, rounds)
    rows = []
    for name, values in seconds.items():
        base = seconds[name.split(',')[0]]
        ratio, low, high = spread([t / b for t, b in zip(values, base, strict=True)])
        rows.append(f'| {pair.name} | {name} | {1000 * spread(values)[0]:.0f} | {ratio:.2f} ({low:.2f}-{high:.2f}) |')
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pairs', nargs='*', default=['quickstart', 'resnet50-resnet18'])
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = ['| pair | step | CPU ms | time / without |', '|---|---|---:|---:|']
    for pair in all_pairs(batch=4, size=96):
        if pair.name in args.pairs:
            lines += measure(pair, args.rounds)
            print('\n'.join(lines), flush=True)
    header = f'# What options save\n\nMade by `python -m benchmarks.options`, {args.rounds} rounds, 1 thread, CPU.\n\n'
    (_RESULTS / 'options.md').write_text(header + '\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
