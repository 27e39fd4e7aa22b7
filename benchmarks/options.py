"""What options save of a step: logits from a cache, a bfloat16 teacher, channels_last, fused optimizers.

    python -m benchmarks.options quickstart resnet50-resnet18 resnet56-resnet20

    python -m benchmarks.options --optimizers          # an update alone, only printed

Side by side in one process and one thread, as in `benchmarks.step`; kept in benchmarks/results/options.md.
"""
from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .measure import interleaved, spread
from .ways import RESULTS, Pair, Steps, all_pairs, create_optimizers


def _cached(steps: Steps, way: str) -> Callable[[], Any]:
    """Return a step that is given the teacher's logits."""
    task: Any = steps.tasks[way]
    task.forward = functools.partial(task.forward, teacher_logits=task.teacher_logits(steps.input))
    return functools.partial(steps.step, way)


def _half(steps: Steps) -> Steps:
    task: Any
    for task in steps.tasks.values():
        task.get_teacher().to(torch.bfloat16)
        if task.get_dual_teacher() is not None:
            task.teacher.prompt_path.share_weights_with(task.teacher.model)
    return steps


def _channels_last(steps: Steps) -> Steps:
    for task in steps.tasks.values():
        task.to(memory_format=torch.channels_last)
    steps.input = steps.input.contiguous(memory_format=torch.channels_last)
    return steps


def _fused(steps: Steps) -> Steps:
    steps.optimizers = {way: create_optimizers(task, fused=True) for way, task in steps.tasks.items()}
    return steps


def measure(pair: Pair, rounds: int) -> list[str]:
    """Time every option on one pair, and return rows of a table."""
    plain, half, last, fused = (Steps(pair, 'bd') for _ in range(4))
    _half(half)
    _channels_last(last)
    _fused(fused)
    runs: dict[str, Callable[[], Any]] = {
        'kd': functools.partial(plain.step, 'b'),
        'kd, logits from the cache': _cached(Steps(pair, 'b'), 'b'),
        'kd, bfloat16 teacher': functools.partial(half.step, 'b'),
        'kd, channels_last': functools.partial(last.step, 'b'),
        'kd, fused optimizers': functools.partial(fused.step, 'b'),
        'DFPT-KD': functools.partial(plain.step, 'd'),
        'DFPT-KD, logits from the cache': _cached(Steps(pair, 'd'), 'd'),
        'DFPT-KD, bfloat16 teacher': functools.partial(half.step, 'd'),
        'DFPT-KD, channels_last': functools.partial(last.step, 'd'),
        'DFPT-KD, fused optimizers': functools.partial(fused.step, 'd'),
    }
    seconds = interleaved(runs, rounds)
    rows = []
    for name, values in seconds.items():
        base = seconds[name.split(',')[0]]
        ratio, low, high = spread([t / b for t, b in zip(values, base, strict=True)])
        rows.append(f'| {pair.name} | {name} | {1000 * spread(values)[0]:.0f} | {ratio:.2f} ({low:.2f}-{high:.2f}) |')
    return rows


def measure_optimizers(pair: Pair, rounds: int, repeats: int = 5) -> list[str]:
    """Time an update of each optimizer of DFPT-KD in torch's three implementations, and return rows of a table."""
    steps = Steps(pair, 'd')
    steps.forward('d')['loss'].backward()
    rows = []
    for role, optimizer in zip(('SGD of the student', 'AdamW of the prompt path'), steps.optimizers['d'], strict=True):
        runs: dict[str, Callable[[], Any]] = {}
        for name in ('loop', 'foreach', 'fused'):
            parameters = [nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]['params']]
            for copied, original in zip(parameters, optimizer.param_groups[0]['params'], strict=True):
                copied.grad = original.grad.clone()
            settings = {key: optimizer.defaults[key] for key in ('lr', 'momentum') if key in optimizer.defaults}
            chosen: dict[str, Any] = {key: key == name for key in ('foreach', 'fused')}
            runs[name] = functools.partial(_repeat, type(optimizer)(parameters, **settings, **chosen).step, repeats)
        milliseconds = [f'{1000 * spread(values)[0] / repeats:.2f}' for values in interleaved(runs, rounds, 2).values()]
        rows.append(f'| {pair.name} | {role} | {" | ".join(milliseconds)} |')
    return rows


def _repeat(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pairs', nargs='*', default=['quickstart', 'resnet50-resnet18', 'resnet56-resnet20'])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--optimizers', action='store_true', help='time updates alone instead')
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [pair for pair in all_pairs(batch=4, size=96) if pair.name in args.pairs]
    if args.optimizers:
        print('| pair | update, CPU ms | loop | foreach | fused |\n|---|---|---:|---:|---:|')
        for pair in pairs:
            print('\n'.join(measure_optimizers(pair, args.rounds)), flush=True)
        return
    lines = ['| pair | step | CPU ms | time / without |', '|---|---|---:|---:|']
    for pair in pairs:
        lines += measure(pair, args.rounds)
        print('\n'.join(lines), flush=True)
    header = f'# What options save\n\nMade by `python -m benchmarks.options`, {args.rounds} rounds, 1 thread, CPU.\n\n'
    (RESULTS / 'options.md').write_text(header + '\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
