"""Results for people: tables and verdicts of a run and of a comparison, and what models cost."""
from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..hub.markdown import markdown_table
from ..hub.privacy import public
from ..reports.intervals import difference_text, spread_text
from ..tasks.evaluation import SCORES, score_of
from ..tasks.methods import METHODS

__all__ = [
    'arms_cells', 'attempt', 'closing_cells', 'closing_table', 'comparison_notes', 'comparison_text', 'epoch_line',
    'measure_cost', 'student_of', 'verdicts',
]  # fmt: skip

_T = TypeVar('_T')
# Of measuring the speed of a model.
_SECONDS = 0.05

_logger = logging.getLogger(__name__)


def measure_cost(
    forward: Callable[[torch.Tensor], torch.Tensor],
    parameters: Sequence[nn.Parameter],
    example: torch.Tensor,
    files: Sequence[Path],
) -> dict[str, float | None]:
    """Measure what a model costs.

    Args:
        forward: The model.
        parameters: Its parameters.
        example: A batch `[B, C, H, W]` in the batch size that the speed is measured with.
        files: The files it is kept in.

    Returns:
        `params`, `macs` (multiply-accumulates per image, counted by torch), `size_bytes` on disk, `images_per_s` on
        this machine (median of up to five batches, as many as 0.05 s have begun); `None` for what cannot be measured.
    """
    def flops() -> int:
        # torch's counter fails on parameters that are passed to a module without being differentiated.
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            with FlopCounterMode(display=False) as counter:
                forward(example[:1])
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
        return counter.get_total_flops()

    def speed() -> float:
        # The evaluation before has warmed up what there is.
        times: list[float] = []
        while len(times) < 5 and sum(times) < _SECONDS:
            start = time.perf_counter()
            forward(example)
            if example.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return len(example) / statistics.median(times)

    with torch.no_grad():
        counted = attempt('counting the MACs of a model', flops)
        return {
            'params': sum(p.numel() for p in {id(p): p for p in parameters}.values()),
            'macs': None if counted is None else counted // 2,
            'size_bytes': sum(f.stat().st_size for f in files if f.is_file()),
            'images_per_s': attempt('measuring the speed of a model', speed),
        }


def attempt(what: str, act: Callable[[], _T]) -> _T | None:
    """Do an optional part of a run; return `None`, with a warning, if it fails.

    Args:
        what: What is done, to begin the message with.
        act: Does it.
    """
    try:
        return act()
    except Exception as error:  # noqa: BLE001
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        _logger.warning(
            f'{what} failed ({reason}); everything else in the run folder is complete, and --resume tries again.'
        )
        return None


def epoch_line(line: Mapping[str, Any], epochs: int) -> str:
    """Return what a run prints at the end of an epoch, from its line of `metrics.jsonl`."""
    parts = [f'epoch {line["epoch"]:>{len(str(epochs))}}/{epochs}']
    for name, values in line.items():
        if not isinstance(values, Mapping):
            continue
        shown: dict[str, list[str]] = {}
        for who, metrics in values.get('val', {}).items():
            score = score_of(metrics)
            if score is not None:
                shown.setdefault(SCORES[score].removesuffix(' %'), []).append(f'{who} {metrics[score]:.2f}')
        scores = ''.join(f', val {title} {", ".join(who)}' for title, who in shown.items())
        parts.append(f'{name}: loss {values["train"]["loss"]:.3f}{scores}')
    return ' | '.join(parts)


def student_of(method: str) -> str:
    """Return what the student of a baseline is called."""
    return f'student of {method}' if METHODS[method].needs_teacher else 'student alone'


def closing_table(summary: Mapping[str, Any]) -> str:
    """Return the models of a run side by side, as Markdown."""
    head, rows = closing_cells(summary)
    return markdown_table(head, rows, pad=True)


def closing_cells(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the models of a run side by side: titles of columns, and rows."""
    split = summary['eval_split']
    models = dict(summary['models'])
    models |= {student_of(method): model for method, model in summary.get('baselines', {}).items()}
    rows = [(_row_title(name, model), model) for name, model in models.items()]
    for name, model in models.items():
        if 'weights' in model:
            # Student and moving average, of which one is published.
            both = [(f'{name}, {model["weights"]}', model), (f'{name}, {model["other"]["weights"]}', model['other'])]
            at = next(i for i, (_, each) in enumerate(rows) if each is model)
            rows[at : at + 1] = [(f'{both[0][0]}, published ({model["name"]})', model), both[1]]
    for name, model in models.items():
        if 'cost_as_trained' in model:
            at = next(i for i, (_, each) in enumerate(rows) if each is model)
            rows[at] = (f'{rows[at][0]}, deployed', model)
            rows.insert(at + 1, (f'{name}, as trained', {**model, 'cost': model['cost_as_trained']}))
    by = [score for score in SCORES if any(score_of(model['metrics']) == score for model in models.values())]
    columns: list[tuple[str, Callable[[Any], str]]] = [
        (f'{split} {SCORES[score]}', partial(_score_cell, score)) for score in by or ['top1']
    ]
    if any('top5' in (model['metrics'] or {}) for model in models.values()):
        columns.append((f'{split} top-5 %', lambda m: _cell(m['metrics'], 'top5', '.2f')))
    columns += [
        ('parameters', lambda m: _cell(m.get('cost'), 'params', ',')),
        ('MACs', lambda m: _si(m.get('cost'), 'macs')),
        ('on disk', lambda m: _si(m.get('cost'), 'size_bytes', 'B')),
        ('images/s', lambda m: _cell(m.get('cost'), 'images_per_s', ',.0f')),
    ]
    cells = [[name, *(cell(model) for _, cell in columns)] for name, model in rows]
    return ['model', *(title for title, _ in columns)], cells


def _row_title(name: str, model: Mapping[str, Any]) -> str:
    head = ', head fitted' if _is_fitted(model) else ''
    size = f' at {model["input_size"][0]} x {model["input_size"][1]}' if model.get('input_size') else ''
    return f'{name}{head} ({model["name"]}{size})'


def _is_fitted(model: Mapping[str, Any]) -> bool:
    return bool(model.get('head')) and model['head']['how'] == 'fitted'


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """Say of each baseline in words how the student compares with it, and what one run can show."""
    lines = []
    split, measured = summary['eval_split'], summary['models']['student']['metrics']
    count = summary['dataset_sizes'][split]
    fitted = ' from the fitted teacher' if _is_fitted(summary['models'].get('teacher', {})) else ''
    for method, model in summary.get('baselines', {}).items():
        if any('top1' not in (metrics or {}) for metrics in (measured, model['metrics'])):
            # What agrees with its teacher need not be right, and teachers differ.
            continue
        baseline = f'{method}{fitted}' if METHODS[method].needs_teacher else 'the student alone'
        student, other = measured['top1'], model['metrics']['top1']
        difference = student - other
        share = (student + other) / 200
        # Two independent samples: what the finite number of images alone leaves open. Seeds come on top.
        interval = 196 * math.sqrt(2 * share * (1 - share) / count)
        if abs(difference) <= interval:
            verdict = 'not significant'
        else:
            verdict = f'{"above" if difference > 0 else "below"} it in this one run; other seeds may differ'
        lines.append(
            f'{summary["method"]} against {baseline}, {split} top-1: {student:.2f} against {other:.2f}, '
            f'{difference:+.2f} points (95% CI for test-set sampling: +-{interval:.2f}): {verdict}'
        )
    return lines


def _cell(values: Mapping[str, Any] | None, key: str, form: str) -> str:
    value = (values or {}).get(key)
    return '-' if value is None else f'{value:{form}}'


def _score_cell(score: str, model: Mapping[str, Any]) -> str:
    return _cell(model['metrics'], score, '.2f')


def _si(values: Mapping[str, Any] | None, key: str, of: str = '') -> str:
    value = (values or {}).get(key)
    if value is None:
        return '-'
    for unit in ('', 'k', 'M', 'G'):
        if abs(value) < 1000:
            return f'{value:.0f} {unit}{of}' if not unit else f'{value:.1f} {unit}{of}'
        value /= 1000
    return f'{value:.1f} T{of}'


def comparison_text(result: Mapping[str, Any]) -> str:
    """Return a comparison (`compare.json`) as Markdown: what was compared, the table, and how to read it."""
    split, seeds = result['eval_split'], result['seeds']
    sizes = result['dataset_sizes']
    shown = ', '.join(str(seed) for seed in seeds)
    lines = [
        f'Student `{result["student"]}` on `{public(result["dataset"], local=True)}` ({sizes["train"]:,} images to '
        f'train on, {sizes[split]:,} to {"test" if split == "test" else "validate"} on), {result["epochs"]} epochs '
        f'({result["steps"]:,} steps), seeds {shown}, last epoch.',
    ]
    teacher = result['teacher']
    if teacher is not None and 'top1' in (teacher['metrics'] or {}):
        lines.append(f'Teacher: {split} top-1 {teacher["metrics"]["top1"]:.2f}%.')
    lines += ['', _arms_table(result), '', *comparison_notes(result), '', '```', result['command'], '```']
    return '\n'.join(lines)


def comparison_notes(result: Mapping[str, Any]) -> list[str]:
    """Explain the table of a comparison."""
    lines, seeds, reference = [], result['seeds'], result['reference']
    if len(seeds) > 1:
        lines.append(
            f'Mean +- standard deviation over the seeds. Differences to {reference} are paired: the students of a '
            "seed start from the same weights and see the same batches. In brackets the 95% interval by Student's t "
            f'over {len(seeds)} seeds; it is not corrected for multiple comparisons.'
        )
    else:
        lines.append('One seed: spread and significance of differences cannot be estimated.')
    lines.append(
        'ms and FLOPs per step are of a student trained alone, teacher included (FLOPs counted by torch, two per '
        'multiply-accumulate, forward and backward); ms depend on the machine and its load.'
    )
    return lines


def _arms_table(result: Mapping[str, Any]) -> str:
    head, rows = arms_cells(result)
    return markdown_table(head, rows, text_columns=2)


def arms_cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the arms of a comparison side by side: titles of columns, and rows."""
    split, reference = result['eval_split'], result['reference']
    splits = list(dict.fromkeys((split, 'val')))
    head = ['arm', 'options']
    for each in splits:
        scores = {arm[each]['score'] for arm in result['arms'].values()}
        head += [f'{each} {SCORES[scores.pop()] if len(scores) == 1 else "score"}', f'{each} - {reference}']
    head += ['ms per step', 'GFLOPs per step']
    rows = []
    for name, arm in result['arms'].items():
        options = ', '.join(f'{key}={value}' for key, value in arm['options'].items())
        row = [name, options]
        for each in splits:
            score = f' ({SCORES[arm[each]["score"]]})' if f'{each} score' in head else ''
            row += [spread_text(arm[each]) + score, difference_text(arm[each].get('difference'), none='')]
        ms, flops = arm['step']['ms'], arm['step']['flops']
        rows.append([*row, '-' if ms is None else f'{ms:.1f}', '-' if flops is None else f'{flops / 1e9:.2f}'])
    return head, rows
