"""A comparison to be read: the table, and the plot."""
from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import save_figure
from .trainer import METRICS_FILE

__all__ = ['markdown_table', 'plot_comparison']


def markdown_table(result: Mapping[str, Any]) -> str:
    """Return a comparison (`compare.json`) as Markdown: what was compared, the table, and how to read it."""
    split, reference, seeds = result['eval_split'], result['reference'], result['seeds']
    sizes = result['dataset_sizes']
    shown = ', '.join(str(seed) for seed in seeds)
    lines = [
        f'Student `{result["student"]}` on `{_last_part(result["dataset"])}` ({sizes["train"]:,} images to train on, '
        f'{sizes[split]:,} to {"test" if split == "test" else "validate"} on), {result["epochs"]} epochs '
        f'({result["steps"]:,} steps), seeds {shown}, last epoch.',
    ]
    teacher = result['teacher']
    if teacher is not None:
        lines.append(f'Teacher: {split} top-1 {teacher["metrics"]["top1"]:.2f}%.')
    lines += ['', *_rows(result), '']
    if len(seeds) > 1:
        lines.append(
            f'Mean +- standard deviation over the seeds. Differences to {reference} are paired: the students of a seed '
            "start from the same weights and see the same batches. In brackets the 95% interval by Student's t over "
            f'{len(seeds)} seeds; it is not corrected for there being several arms.'
        )
    else:
        lines.append('One seed: no spread, and no difference that would mean anything.')
    lines.append(
        'ms and FLOPs a step are of a student trained alone, teacher included (FLOPs counted by torch, two a '
        'multiply-accumulate, forward and backward); ms depend on the machine and on what else runs there.'
    )
    lines += ['', '```', result['command'], '```']
    return '\n'.join(lines)


def _rows(result: Mapping[str, Any]) -> list[str]:
    split, reference = result['eval_split'], result['reference']
    splits = list(dict.fromkeys((split, 'val')))
    head = ['arm', 'options']
    for each in splits:
        head += [f'{each} top-1 %', f'{each} - {reference}']
    head += ['ms a step', 'GFLOPs a step']
    rows = [head, ['---', '---', *['---:'] * (len(head) - 2)]]
    for name, arm in result['arms'].items():
        options = ', '.join(f'{key}={value}' for key, value in arm['options'].items())
        row = [name, options]
        for each in splits:
            row += [_spread(arm[each]), _difference(arm[each].get('difference'))]
        rows.append([*row, f'{arm["step"]["ms"]:.1f}', f'{arm["step"]["flops"] / 1e9:.2f}'])
    return ['| ' + ' | '.join(row) + ' |' for row in rows]


def _spread(summary: Mapping[str, Any]) -> str:
    return f'{summary["mean"]:.2f}' + (f' +- {summary["sd"]:.2f}' if summary['sd'] is not None else '')


def _difference(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return ''
    interval = summary['interval']
    return f'{summary["mean"]:+.2f}' + (f' [{interval[0]:+.2f}, {interval[1]:+.2f}]' if interval else '')


def _last_part(dataset: str) -> str:
    # Of a local folder only the name: where it lies says nothing to others.
    return Path(dataset).name if Path(dataset).exists() else dataset


def plot_comparison(result: Mapping[str, Any], run_dirs: Sequence[Path], path: Path) -> None:
    """Draw the validation accuracy over the epochs (mean over the seeds), and every student's last accuracy.

    Args:
        result: The comparison.
        run_dirs: Run folders of its seeds.
        path: The PNG to write.
    """
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    split = result['eval_split']
    runs = [
        [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding='utf-8').splitlines()]
        for folder in run_dirs
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
    for name in result['arms']:
        validated = [[line for line in lines if 'val' in line[name]] for lines in runs]
        curves = [[line[name]['val']['student']['top1'] for line in lines] for lines in validated]
        epochs = [line['epoch'] for line in validated[0]]
        left.plot(epochs, [statistics.fmean(v) for v in zip(*curves, strict=True)], label=name)
    left.set(xlabel='epoch', ylabel='top-1 %', title='validation, mean over the seeds')
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(fontsize='small')
    names = list(result['arms'])
    for i, seed in enumerate(result['seeds']):
        values = [arm[split]['values'][i] for arm in result['arms'].values()]
        right.plot(range(len(names)), values, marker='o', linewidth=0.6, alpha=0.7, label=f'seed {seed}')
    means = [arm[split]['mean'] for arm in result['arms'].values()]
    right.plot(range(len(names)), means, linestyle='none', marker='_', markersize=24, color='black', label='mean')
    right.set_xticks(range(len(names)), names, rotation=20)
    right.set(ylabel='top-1 %', title=f'{split}, last epoch')
    if len(result['seeds']) <= 10:
        right.legend(fontsize='small')
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=90)
