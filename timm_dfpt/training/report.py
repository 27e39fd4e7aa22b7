"""What a run leaves behind to be read: the closing table, `summary.json` and `curves.png`."""
from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..hub.files import atomic, write_text

__all__ = ['closing_table', 'measure_cost', 'plot_curves', 'save_figure', 'verdicts', 'write_summary']

SUMMARY_FORMAT = 1


def measure_cost(
    forward: Callable[[torch.Tensor], torch.Tensor],
    parameters: Sequence[nn.Parameter],
    example: torch.Tensor,
    files: Sequence[Path],
) -> dict[str, float]:
    """Measure what a model costs.

    Args:
        forward: The model.
        parameters: Its parameters.
        example: A batch `[B, C, H, W]` in the batch size that the speed is measured with.
        files: The files it is kept in.

    Returns:
        `params`, `macs` (multiply-accumulates an image, counted by torch), `size_bytes` on disk, `images_per_s` on this
        machine (median of five batches).
    """
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            forward(example[:1])
        times = []
        for _ in range(6):
            start = time.perf_counter()
            forward(example)
            if example.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return {
        'params': sum(p.numel() for p in {id(p): p for p in parameters}.values()),
        'macs': counter.get_total_flops() // 2,
        'size_bytes': sum(f.stat().st_size for f in files if f.is_file()),
        # The first batch warms caches up.
        'images_per_s': len(example) / statistics.median(times[1:]),
    }


def closing_table(summary: Mapping[str, Any]) -> str:
    """Return the models of a run side by side, as Markdown."""
    split = summary['eval_split']
    models = dict(summary['models'])
    models |= {f'student of {method}': model for method, model in summary.get('baselines', {}).items()}
    columns = [(f'{split} top-1 %', lambda m: f'{m["metrics"]["top1"]:.2f}')]
    if any('top5' in model['metrics'] for model in models.values()):
        columns.append((f'{split} top-5 %', lambda m: f'{m["metrics"]["top5"]:.2f}'))
    columns += [
        ('parameters', lambda m: f'{m["cost"]["params"]:,}'),
        ('MACs', lambda m: _si(m['cost']['macs'])),
        ('on disk', lambda m: f'{_si(m["cost"]["size_bytes"])}B'),
        ('images/s', lambda m: f'{m["cost"]["images_per_s"]:,.0f}'),
    ]
    rows = [['model', *(title for title, _ in columns)]]
    for name, model in models.items():
        rows.append([f'{name} ({model["name"]})', *(cell(model) for _, cell in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['| ' + ' | '.join(_pad(cell, widths[i], i) for i, cell in enumerate(row)) + ' |' for row in rows]
    rule = '|' + '|'.join('-' * (width + 1) + (':' if i else '-') for i, width in enumerate(widths)) + '|'
    return '\n'.join([lines[0], rule, *lines[1:]])


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """Say of each baseline in words how the student compares with it, and what one run can tell."""
    lines = []
    split, student = summary['eval_split'], summary['models']['student']['metrics']['top1']
    count = summary['dataset_sizes'][split]
    for method, model in summary.get('baselines', {}).items():
        other = model['metrics']['top1']
        difference = student - other
        share = (student + other) / 200
        # Two independent samples: what the finite number of images alone leaves open. Seeds come on top.
        interval = 196 * math.sqrt(2 * share * (1 - share) / count)
        if abs(difference) <= interval:
            verdict = 'no difference that one run of this size could show'
        else:
            verdict = f'{"above" if difference > 0 else "below"} it in this one run; other seeds may say otherwise'
        lines.append(
            f'{summary["method"]} against {method}, {split} top-1: {student:.2f} against {other:.2f}, '
            f'{difference:+.2f} points (95% of the image sampling: +-{interval:.2f}): {verdict}'
        )
    return lines


def _pad(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def _si(value: float) -> str:
    for unit in ('', 'k', 'M', 'G'):
        if abs(value) < 1000:
            return f'{value:.0f} {unit}' if not unit else f'{value:.1f} {unit}'
        value /= 1000
    return f'{value:.1f} T'


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`."""
    write_text(path, json.dumps({'format_version': SUMMARY_FORMAT, **summary}, indent=2) + '\n')


def plot_curves(metrics_file: Path, path: Path, title: str) -> None:
    """Draw the loss terms and the accuracies over the epochs of `metrics.jsonl`.

    Args:
        metrics_file: One JSON object an epoch.
        path: The PNG to write.
        title: Title of the figure.
    """
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in metrics_file.read_text(encoding='utf-8').splitlines()]
    if not lines:
        return
    epochs = [line['epoch'] for line in lines]
    learners = [name for name, value in lines[0].items() if isinstance(value, dict)]
    main = learners[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout='constrained')
    for key in lines[0][main]['train']:
        if key.endswith('loss'):
            label = key.removesuffix('_loss').replace('task', 'labels').replace('_', ' learns from ', 1)
            left.plot(epochs, [line[main]['train'][key] for line in lines], label=label)
    left.set(xlabel='epoch', ylabel='nats (terms unweighted)', yscale='log', title='training loss')
    left.legend(fontsize='small')
    for learner in learners:
        validated = [line for line in lines if 'val' in line[learner]]
        for who in validated[0][learner]['val']:
            label = who.replace('_', ' ') if learner == main else f'{who.replace("_", " ")} ({learner})'
            top1 = [line[learner]['val'][who]['top1'] for line in validated]
            right.plot([line['epoch'] for line in validated], top1, label=label)
    right.set(xlabel='epoch', ylabel='top-1 %', title='validation accuracy')
    right.legend(fontsize='small')
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        for curve in axes.lines:
            if len(curve.get_xdata()) == 1:
                curve.set_marker('o')
    figure.suptitle(title)
    save_figure(figure, path, dpi=110)


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a matplotlib figure as a PNG, whole or not at all, and close it.

    Raises:
        OSError: It cannot be written.
    """
    from matplotlib import pyplot as plt

    with atomic(path) as temporary:
        # Without metadata two equal runs write equal files.
        figure.savefig(temporary, format='png', dpi=dpi, metadata={'Software': None})
    plt.close(figure)
