"""What a training step costs, side by side: plain distillation against DFPT-KD, in time, FLOPs and memory.

    python -m benchmarks.step                          # the table, kept in benchmarks/results/step.md
    python -m benchmarks.step resnet50-resnet18 --size 224 --rounds 15
    python -m benchmarks.step --compile                # compiled, kept in benchmarks/results/step-compiled.md
    python -m benchmarks.step --freeze                 # before and after the freeze, in results/step-freeze.md
    python -m benchmarks.step --parts                  # by what is trained, in results/step-parts.md
    python -m benchmarks.step --plot                   # cost against batch size and teacher depth
    python -m benchmarks.step resnet50-resnet18 --profile

One process and one thread; every round times each way once, in rotating order, and ratios are taken within a round.
Weights are random, which costs the same. The floor is the arithmetic that DFPT-KD cannot do without,
`F_T + 2 (F_T - F_pre) + 3 F_phi + 3 F_S`, where plain distillation costs `F_T + 3 F_S` (F_T and F_S: forward of teacher
and student, F_pre: of the teacher before the first block, F_phi: of the blocks; all counted, none estimated).
"""
from __future__ import annotations

import argparse
import collections
import functools
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch

from timm_dfpt.teacher.blocks import FusionBlock, PromptBlock

from .measure import interleaved, spread
from .ways import RESULTS, USUAL, WAYS, Pair, Steps, all_pairs, cifar_pair, count_floor

_FREEZE = ('quickstart', 'resnet50-resnet18', 'convnext_tiny-mobilenetv3_small_100', 'vit_small-mobilenetv3_small_100')
# Of the profile: kinds of operators by what is found in the names of an operator and of its callers; the first applies.
_STEP, _BLOCK, _BACKWARD = 'one step', 'a block', 'autograd::engine'
_KINDS = {
    'blocks, forward': '^$',
    'blocks, backward': '^$',
    'optimizers': 'Optimizer',
    'convolutions, backward': f'(?i)conv.*{_BACKWARD}',
    'convolutions, forward': '(?i)conv',
    'BatchNorm': '(?i)batch_?norm',
    'Python between the operators': f'^{_STEP}$',
    'all other: activations, pooling, additions, losses': '',
}


def measure(
    pair: Pair, rounds: int, ways: Sequence[str] = USUAL, compile_backend: str | None = None
) -> dict[str, Any]:
    """Measure ways of taking a step, (a) among them, on one pair."""
    steps = Steps(pair, ways, compile_backend)
    floor = count_floor(pair)
    for way in ways:
        steps.step(way)  # compiles, and makes the optimizer states, which are not to be counted below
    counts: dict[str, Any] = {}
    if compile_backend is None:
        # Compiled code is not visible to these counters.
        counts = {
            'flops': {way: steps.flops(way) for way in ways},
            'saved': {way: steps.saved(way) for way in ways},
            'peak': {way: steps.peak(way) for way in ways},
        }
    seconds = interleaved({way: functools.partial(steps.step, way) for way in ways}, rounds)
    return {'pair': pair.name, 'shape': pair.shape, 'floor': floor, 'seconds': seconds, **counts}


def _rows(result: dict[str, Any]) -> list[str]:
    floor, seconds = result['floor'], result['seconds']
    rows = []
    for way in seconds:
        ms, low, high = (1000 * value for value in spread(seconds[way]))
        ratio, ratio_low, ratio_high = spread([t / base for t, base in zip(seconds[way], seconds['a'], strict=True)])
        cells = [f'{ms:.0f} ({low:.0f}-{high:.0f})', f'{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})']
        if 'flops' in result:
            flops = result['flops'][way]
            cells += [f'{flops / 1e9:.2f}', f'{flops / result["flops"]["a"]:.2f}']
        demanded = {'a': 1.0, 'b': 1.0, 'd': floor.dfpt / floor.kd}.get(way)
        cells += [f'{demanded:.2f}', f'**{ratio / demanded:.2f}**' if way == 'd' else f'{ratio / demanded:.2f}'] if (
            demanded
        ) else ['', '']
        if 'flops' in result:
            cells += [f'{result[key][way] / 2**20:.0f}' for key in ('saved', 'peak')]
        rows.append(f'| {result["pair"] if way == "a" else ""} | {way} | ' + ' | '.join(cells) + ' |')
    return rows


def table(results: Sequence[dict[str, Any]], rounds: int, how: str) -> str:
    """Return the table in Markdown."""
    counted = 'flops' in results[0]
    columns = ['pair', 'way', 'CPU ms a step', 'time / (a)']
    columns += ['GFLOP', 'FLOPs / (a)'] if counted else []
    columns += ['floor / (a)', 'time over floor']
    columns += ['MiB kept for backward', 'MiB at peak'] if counted else []
    lines = [
        f'# Cost of a step, {how}',
        '',
        f'timm {timm.__version__}, torch {torch.__version__}, {platform.machine()} CPU, 1 thread, float32, {rounds} '
        'rounds: median (quartiles). Made by `python -m benchmarks.step`. A step is forward, backward and optimizers.',
        '',
        *(f'- ({way}) {WAYS[way]}' for way in results[0]['seconds']),
        '',
        'Batches: ' + ', '.join(f'{r["pair"]} {"x".join(map(str, r["shape"]))}' for r in results) + '.',
        '',
        '| ' + ' | '.join(columns) + ' |',
        '|---|---|' + '---:|' * (len(columns) - 2),
    ]
    for result in results:
        lines += _rows(result)
    return '\n'.join(lines) + '\n'


def plot(rounds: int) -> None:
    """Plot how the cost of a step grows with the batch and with the teacher's depth."""
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    batches = [(batch, cifar_pair('resnet56', 'resnet20', batch)) for batch in (4, 8, 16, 32, 64)]
    depths = [(depth, cifar_pair(f'resnet{depth}', 'resnet20', 32)) for depth in (20, 32, 44, 56, 110)]
    lines = ['| pair | batch | (a) ms | (c) / (a) | (d) / (a) | floor / (a) |', '|---|---:|---:|---:|---:|---:|']
    for axis, pairs, label in ((axes[0], batches, 'batch size'), (axes[1], depths, "teacher's depth")):
        medians: dict[str, list[float]] = {way: [] for way in 'acd'}
        floors: list[float] = []
        for _, pair in pairs:
            steps, floor = Steps(pair, 'acd'), count_floor(pair)
            seconds = interleaved({way: functools.partial(steps.step, way) for way in 'acd'}, rounds)
            for way in 'acd':
                medians[way].append(1000 * spread(seconds[way])[0])
            floors.append(medians['a'][-1] * floor.dfpt / floor.kd)
            base = medians['a'][-1]
            ratios = [f'{value / base:.2f}' for value in (medians['c'][-1], medians['d'][-1], floors[-1])]
            lines.append(f'| {pair.name} | {pair.shape[0]} | {base:.0f} | {" | ".join(ratios)} |')
            print(lines[-1], flush=True)
        xs = [x for x, _ in pairs]
        for way in 'acd':
            axis.plot(xs, medians[way], marker='o', label=f'({way}) {WAYS[way]}')
        axis.plot(xs, floors, 'k--', label="floor: (a) x its FLOP ratio")
        axis.set(xlabel=label, ylabel='CPU ms a step', ylim=0)
    axes[0].set_title('resnet56 -> resnet20')
    axes[1].set_title('resnet-N -> resnet20, batch 32')
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / 'step-growth.png', dpi=110)
    text = '# Growth of the cost of a step\n\nMade by `python -m benchmarks.step --plot`.\n\n' + '\n'.join(lines) + '\n'
    (RESULTS / 'step-growth.md').write_text(text, encoding='utf-8')


def profile(pair: Pair, rounds: int) -> None:
    """Print where the time of (a) and (d) goes: by kind of operator, those of the blocks by themselves."""
    steps = Steps(pair, 'ad')
    wrapped: Any = steps.tasks['d'].teacher
    for module in wrapped.prompt_path.modules():
        if isinstance(module, (PromptBlock, FusionBlock)):
            module.forward = _recorded(module.forward)  # type: ignore[method-assign]
    milliseconds: dict[str, list[collections.Counter[str]]] = {'a': [], 'd': []}
    for turn in range(-1, rounds):
        for way in 'ad':
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities) as profiler, torch.profiler.record_function(_STEP):
                steps.step(way)
            if turn >= 0:
                milliseconds[way].append(_by_kind(profiler.events()))
    print(f'| {pair.name}, ms | {WAYS["a"]} | {WAYS["d"]} |\n|---|---:|---:|')
    medians = {
        kind: [statistics.median(counter[kind] for counter in milliseconds[way]) for way in 'ad'] for kind in _KINDS
    }
    for kind, (a, d) in {**medians, 'sum': map(sum, zip(*medians.values(), strict=True))}.items():
        print(f'| {kind} | {a:.1f} | {d:.1f} |')


def _recorded(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(_BLOCK):
            return forward(*args, **kwargs)

    return call


def _by_kind(events: Any) -> collections.Counter[str]:
    """Sum the profiler's events of a step, in milliseconds without what they call."""

    def ancestry(event: Any) -> list[str]:
        return [event.name, *ancestry(event.cpu_parent)] if event.cpu_parent else [event.name]

    callers = [(event, ancestry(event)) for event in events]
    # What the backward calls has the numbers of what the forward called.
    numbers = {event.sequence_nr for event, names in callers if _BLOCK in names and event.sequence_nr >= 0}

    def own(event: Any) -> bool:
        backward = event.name.startswith(_BACKWARD) and event.sequence_nr in numbers
        return event.name == _BLOCK or backward or (event.cpu_parent is not None and own(event.cpu_parent))

    total: collections.Counter[str] = collections.Counter()
    for event, names in callers:
        text = ' '.join(names)
        if own(event):
            kind = 'blocks, backward' if _BACKWARD in text else 'blocks, forward'
        else:
            kind = next(kind for kind, pattern in _KINDS.items() if re.search(pattern, text))
        total[kind] += event.self_cpu_time_total / 1000
    return total


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pairs', nargs='*', help='names of pairs (default: all, and the table is kept)')
    parser.add_argument('--rounds', type=int, default=5, help='times each way is timed')
    parser.add_argument('--batch', type=int, default=4, help='batch size of the pairs with 1000 classes')
    parser.add_argument('--size', type=int, default=96, help='image size of these pairs')
    parser.add_argument('--ways', default=USUAL, help='letters of the ways to measure, a among them')
    parser.add_argument('--compile', action='store_true', help='compile with inductor')
    parser.add_argument('--freeze', action='store_true', help='measure before and after the freeze of the prompt path')
    parser.add_argument('--parts', action='store_true', help='measure by what of the prompt path is trained')
    parser.add_argument('--plot', action='store_true', help='plot cost against batch size and depth instead')
    parser.add_argument('--profile', action='store_true', help='print where the time goes instead')
    args = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    if args.plot:
        plot(args.rounds)
        return
    known = {pair.name: pair for pair in all_pairs(args.batch, args.size)}
    usual, kind, how = list(known), '', 'eager'
    if args.compile:
        usual, kind, how = ['quickstart', 'resnet32x4-resnet8x4'], '-compiled', 'compiled with inductor'
    elif args.freeze:
        usual, kind, how = list(_FREEZE), '-freeze', 'before and after the freeze of the prompt path'
        args.ways = 'adefghijk'
    elif args.parts:
        usual, kind, how = list(_FREEZE), '-parts', 'by what of the prompt path is trained'
        args.ways = 'adgeilmno'
    names = args.pairs or usual
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f'{unknown[0]!r} is no pair; there are {", ".join(known)}')
    if 'a' not in args.ways or not set(args.ways) <= set(WAYS):
        parser.error(f'--ways must be some of {"".join(WAYS)}, a among them, got {args.ways!r}')
    if args.profile:
        for name in names:
            profile(known[name], args.rounds)
        return
    results = []
    for name in names:
        results.append(measure(known[name], args.rounds, args.ways, 'inductor' if args.compile else None))
        print('\n'.join(_rows(results[-1])), flush=True)
        text = table(results, args.rounds, how)
        if not args.pairs:
            # After each pair: a table of some of them is better than none.
            (RESULTS / f'step{kind}.md').write_text(text, encoding='utf-8')
    print(text)


if __name__ == '__main__':
    main()
