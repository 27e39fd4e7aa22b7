"""Figures of a run and of a comparison, from the lines of their `metrics.jsonl`."""
from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..reports.figures import Drawing, Line, interval_figure, line_figure, save, side_by_side
from ..tasks.evaluation import SCORES, score_of
from .report import student_of

__all__ = ['curves_of_seeds', 'loss_terms', 'over_seeds', 'plot_comparison', 'plot_curves', 'score_lines']

_SIZE = (11.0, 4.2)


def plot_curves(lines: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the loss terms and the accuracies over the epochs of `metrics.jsonl`.

    Args:
        lines: Those of `metrics.jsonl`, one per epoch.
        path: The `.svg` or `.png` to write.
        title: Title of the figure.

    Raises:
        OSError: If it cannot be written.
    """
    main = next(name for name, value in lines[0].items() if isinstance(value, Mapping))
    terms = [Line(label, *values) for label, values in loss_terms(lines, main).items()]
    scores, label = score_lines(lines)
    panels = {
        'training loss': line_figure(terms, 'nats (terms unweighted)', log=True),
        'validation': line_figure(scores, label),
    }
    save(Drawing(side_by_side(title, panels), title, _SIZE), path)


def score_lines(lines: Sequence[Mapping[str, Any]]) -> tuple[list[Line], str]:
    """Return the curves of what was measured on the validation data, and what that is."""
    learners = [name for name, value in lines[0].items() if isinstance(value, Mapping)]
    scores: list[Line] = []
    titles: dict[str, None] = {}
    for learner in learners:
        validated = [line for line in lines if 'val' in line[learner]]
        for who in validated[0][learner]['val'] if validated else ():
            other = student_of(learner) if who == 'student' else f'{who} of {learner}'
            label = who if learner == learners[0] else other
            score = score_of(validated[0][learner]['val'][who])
            if score is not None:
                titles[SCORES[score]] = None
                values = [line[learner]['val'][who][score] for line in validated]
                scores.append(Line(label.replace('_', ' '), [line['epoch'] for line in validated], values))
    return scores, ', '.join(titles)


def loss_terms(lines: Sequence[Mapping[str, Any]], learner: str) -> dict[str, tuple[list[int], list[float]]]:
    """Return the loss terms of a learner by name: epochs of `metrics.jsonl`, and values."""
    terms = {}
    # Terms of a prompt path that is frozen after some epochs end there.
    for key in dict.fromkeys(key for line in lines for key in line[learner]['train'] if key.endswith('loss')):
        label = key.removesuffix('_loss').replace('task', 'labels').replace('_', ' learns from ', 1)
        known = [line for line in lines if key in line[learner]['train']]
        if not any(line[learner]['train'][key] for line in known):
            # That of labels where there are none.
            continue
        terms[label] = [line['epoch'] for line in known], [line[learner]['train'][key] for line in known]
    return terms


def curves_of_seeds(runs: Sequence[Sequence[Mapping[str, Any]]], arms: Sequence[str]) -> tuple[list[Line], str]:
    """Return for each arm the mean over the seeds, with the range, of what its student had, and what that is."""
    lines, titles = [], dict[str, None]()
    for arm in arms:
        validated = [[line for line in run if 'val' in line[arm]] for run in runs]
        score = score_of(validated[0][0][arm]['val']['student'])
        if score is None:
            continue
        titles[SCORES[score]] = None
        curves = [[line[arm]['val']['student'][score] for line in run] for run in validated]
        lines.append(over_seeds(curves, arm, [line['epoch'] for line in validated[0]]))
    return lines, ', '.join(titles)


def over_seeds(curves: Sequence[Sequence[float]], label: str, epochs: Sequence[float]) -> Line:
    """Return the mean of curves, with the range from the lowest to the highest where there are several."""
    columns = list(zip(*curves, strict=True))
    means = [statistics.fmean(column) for column in columns]
    if len(curves) == 1:
        return Line(label, epochs, means)
    return Line(label, epochs, means, [min(column) for column in columns], [max(column) for column in columns])


def plot_comparison(result: Mapping[str, Any], runs: Sequence[Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw the validation accuracy over the epochs, and the students' last accuracy: means, and ranges over the seeds.

    Args:
        result: The comparison.
        runs: Of each seed the lines of `metrics.jsonl`.
        path: The `.svg` or `.png` to write.

    Raises:
        OSError: If it cannot be written.
    """
    split = result['eval_split']
    curves, label = curves_of_seeds(runs, list(result['arms']))
    last = {
        name: (arm[split]['mean'], (min(arm[split]['values']), max(arm[split]['values'])))
        for name, arm in result['arms'].items()
    }
    panels = {
        'validation, mean and range over the seeds': line_figure(curves, label),
        f'{split}, last epoch': interval_figure(last, label, from_zero=False),
    }
    save(Drawing(side_by_side('', panels), '', _SIZE), path)
