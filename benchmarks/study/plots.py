"""The plots of `docs/STUDY.md`."""
from __future__ import annotations

import dataclasses
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.study.analysis import CONTRASTS, DUAL, TITLES, Study
from timm_dfpt.reports.intervals import summarise

__all__ = ['Figure', 'figures']

# Okabe and Ito's colours, which the colour-blind can distinguish.
_BLUE, _ORANGE, _GREEN, _BLACK = '#0072B2', '#D55E00', '#009E73', '#000000'
_COLOURS = {'kd': _BLACK, 'dfpt': _BLUE, 'dfpt+': _ORANGE}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot that is worth drawing.

    Args:
        caption: What it shows.
        draw: Returns it as a matplotlib figure.
    """

    caption: str
    draw: Callable[[], Any]

    def save(self, path: Path) -> None:
        """Write it as a PNG whose bytes depend on nothing but what is drawn."""
        figure = self.draw()
        drawn = io.BytesIO()
        figure.savefig(drawn, format='png', dpi=100)
        _pyplot().close(figure)
        # 64 colours are all that is drawn, shades of edges aside, in a third of the bytes.
        image = Image.open(drawn).convert('RGB').quantize(64, dither=Image.Dither.NONE)
        image.save(path, format='PNG', optimize=True)


def figures(study: Study) -> dict[str, Figure]:
    """Return the plots that the records are enough for, by file name."""
    found: dict[str, Figure] = {}
    regimes = study.regimes('final')
    compared = [name for name in regimes if study.difference(name, 'dfpt', 'kd')]
    if compared:
        found['differences.png'] = Figure(
            'Paired differences of test accuracy with 95% intervals, by regime', partial(_differences, study, compared)
        )
    groups = _same_recipe(study, compared)
    if groups:
        found['gap.png'] = Figure(
            'What KD gains over scratch, and what DFPT-KD gains over KD, against the capacity gap',
            partial(_gap, study, groups),
        )
    priced = [name for name in regimes if study.dearer_kd(name)]
    if priced:
        found['cost.png'] = Figure('Test accuracy against training time, by arm', partial(_cost, study, priced))
    for regime in regimes:
        variants = [arm for arm in study.arms(regime) if arm not in DUAL and study.base(regime, arm)]
        if len(variants) > 1:
            found[f'variants-{regime}.png'] = Figure(
                f'{regime}: variants of the method, test accuracy less that of what they vary',
                partial(_variants, study, regime, variants),
            )
        arms = [arm for arm in DUAL if any(len(_validated(r)) > 1 for r in study.arms(regime).get(arm, ()))]
        if arms:
            found[f'inside-{regime}.png'] = Figure(
                f'{regime}: both paths and the student over the epochs, mean over the seeds',
                partial(_inside, study, regime, arms),
            )
    return found


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot

    return pyplot


def _axes(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Any, list[Any]]:
    figure, axes = _pyplot().subplots(
        rows, columns, figsize=(width * columns, height * rows), layout='constrained', squeeze=False, **shared
    )
    for each in axes.flat:
        each.grid(alpha=0.3)
    return figure, list(axes.flat)


def _bar(summary: Mapping[str, Any]) -> list[float]:
    """Mean and half width of the interval, 0 for a single seed."""
    mean, interval = summary['mean'], summary['interval']
    return [mean, interval[1] - mean if interval else 0.0]


def _forest(axes: Any, rows: Mapping[str, Mapping[str, Any] | None], colour: str) -> None:
    for y, summary in enumerate(rows.values()):
        if summary is not None:
            mean, half = _bar(summary)
            axes.errorbar(mean, y, xerr=half, fmt='o', color=colour, capsize=3)
            axes.annotate(f'n={summary["n"]}', (mean, y), (0, 5), textcoords='offset points', ha='center', fontsize=8)
    axes.axvline(0, color=_BLACK, linewidth=1)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(ylim=(len(rows) - 0.5, -0.6), xlabel='points of test top-1')


def _differences(study: Study, regimes: Sequence[str]) -> Any:
    figure, panels = _axes(1, len(CONTRASTS), 3.6, 1.2 + 0.4 * len(regimes), sharey=True, sharex=True)
    for axes, (arm, base), colour in zip(panels, CONTRASTS, (_BLUE, _GREEN, _ORANGE), strict=True):
        _forest(axes, {regime: study.difference(regime, arm, base) for regime in regimes}, colour)
        axes.set_title(f'{TITLES[arm]} - {TITLES[base]}', fontsize=10)
    return figure


def _variants(study: Study, regime: str, arms: Sequence[str]) -> Any:
    figure, (axes,) = _axes(1, 1, 7.5, 1.2 + 0.32 * len(arms))
    bases = {arm: study.base(regime, arm) or 'dfpt' for arm in arms}
    rows = {f'{arm}  (- {base})': study.difference(regime, arm, base) for arm, base in bases.items()}
    _forest(axes, rows, _BLUE)
    axes.set_title(regime, fontsize=10)
    return figure


def _same_recipe(study: Study, regimes: Sequence[str]) -> dict[str, list[str]]:
    """Group regimes of the same data and recipe, which differ in teacher or student; single ones say nothing."""
    groups: dict[str, list[str]] = {}
    for regime in regimes:
        values = study.plan.values['regimes'].get(regime, {})
        recipe = [values.get(key) for key in ('data', 'epochs', 'options')]
        # A teacher that is worse than the student alone is not ahead of it by any gap.
        if (study.gap(regime) or 0) > 0 and study.difference(regime, 'kd', 'scratch'):
            groups.setdefault(str(recipe), []).append(regime)
    return {f'{names[0]} and alike': names for names in groups.values() if len(names) > 1}


def _gap(study: Study, groups: Mapping[str, Sequence[str]]) -> Any:
    figure, panels = _axes(2, len(groups), 5.5, 3, sharex='col')
    for column, regimes in enumerate(groups.values()):
        upper, lower = panels[column], panels[column + len(groups)]
        gaps = {regime: study.gap(regime) or 0.0 for regime in regimes}
        width = max(gaps.values()) - min(gaps.values())
        _against_gap(study, upper, gaps, 'kd', 'scratch', 'o', _BLACK)
        for shift, (arm, marker, colour) in ((-0.005, ('dfpt', 's', _BLUE)), (0.005, ('dfpt+', '^', _ORANGE))):
            # Moved a little to the side, or the bars would hide each other.
            moved = {regime: gap + shift * width for regime, gap in gaps.items()}
            _against_gap(study, lower, moved, arm, 'kd', marker, colour)
        lower.axhline(0, color=_BLACK, linewidth=1)
        lower.set_xlabel('teacher - student alone, validation (points)')
        names = upper.secondary_xaxis('top')
        names.set_xticks(list(gaps.values()), list(gaps), rotation=30, ha='left', fontsize=8)
        for axes in (upper, lower):
            axes.set_ylabel('points of test top-1')
            axes.legend(fontsize=8)
    return figure


def _against_gap(
    study: Study, axes: Any, gaps: Mapping[str, float], arm: str, base: str, marker: str, colour: str
) -> None:
    points = [(gap, study.difference(regime, arm, base)) for regime, gap in gaps.items()]
    found = [(gap, *_bar(difference)) for gap, difference in points if difference]
    if found:
        x, y, half = zip(*found, strict=True)
        axes.errorbar(x, y, yerr=half, fmt=marker, color=colour, capsize=3, label=f'{TITLES[arm]} - {TITLES[base]}')


def _cost(study: Study, regimes: Sequence[str]) -> Any:
    figure, panels = _axes(1, len(regimes), 6.5, 3.8)
    markers = 'osD^vP*X<>'
    for axes, regime in zip(panels, regimes, strict=True):
        # Variants cost what the arm costs that they vary; a student without a teacher is far below all others.
        arms = [arm for arm in study.arms(regime) if ' ' not in arm and arm != 'scratch']
        for i, arm in enumerate(arms):
            records = study.arms(regime)[arm]
            mean, half = _bar(summarise([record['test_top1'] for record in records]))
            axes.errorbar(
                study.ratio(regime, arm, 'wall_s'), mean, yerr=half, fmt=markers[i % len(markers)], capsize=3,
                color=_COLOURS.get(records[0]['config']['method'], _GREEN),
                label=f'{arm}, {records[0]["epochs"]} epochs',
            )  # fmt: skip
        axes.set(xlabel='training time / kd', ylabel='test top-1 %, mean and 95% interval')
        axes.set_title(regime, fontsize=10)
        axes.legend(fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))
    return figure


def _validated(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [point for point in record['curve'] if 'val' in point]


def _inside(study: Study, regime: str, arms: Sequence[str]) -> Any:
    figure, panels = _axes(2, 3, 3.9, 3.1)
    *measured, losses, legend = panels
    metrics = {
        'top1': 'top-1 %', 'kl_to_student': 'KL(path || student), nats', 'entropy': 'entropy, nats',
        'confidence': 'confidence',
    }  # fmt: skip
    styles = {'prompt_path': '-', 'teacher': '--', 'student': ':'}
    for axes, (key, title) in zip(measured, metrics.items(), strict=True):
        for arm in arms:
            records = study.arms(regime)[arm]
            for who, style in styles.items():
                if key == 'kl_to_student' and who == 'student':
                    continue
                curves = [{p['epoch']: p['val'][who][key] for p in _validated(record)} for record in records]
                _line(axes, curves, _COLOURS[arm], style)
        axes.set_title(f'{title}, validation', fontsize=10)
    for arm in arms:
        for key, style in (('student_prompt_loss', '-'), ('student_teacher_loss', '--')):
            curves = [{p['epoch']: p['train'][key] for p in r['curve'] if key in p['train']}
                      for r in study.arms(regime)[arm]]
            _line(losses, curves, _COLOURS[arm], style)
    losses.set_title('training terms, T^2 KL(path || student)', fontsize=10)
    losses.set_yscale('log')
    for axes in (*measured, losses):
        axes.set_xlabel('epoch')
    names = {'prompt_path': 'prompt path', 'teacher': 'original path', 'student': 'student'}
    for arm in arms:
        for who, style in styles.items():
            legend.plot([], [], color=_COLOURS[arm], linestyle=style, label=f'{TITLES[arm]}: {names[who]}')
    legend.axis('off')
    legend.legend(loc='center', fontsize=9, title='mean over seeds; band: +- SD')
    figure.suptitle(regime, fontsize=11)
    return figure


def _line(axes: Any, curves: Sequence[Mapping[int, float]], colour: str, style: str) -> None:
    epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = [[curve[epoch] for curve in curves] for epoch in epochs]
    means = [statistics.fmean(each) for each in values]
    axes.plot(epochs, means, color=colour, linestyle=style, linewidth=1.4)
    if len(curves) > 1:
        spread = [statistics.stdev(each) for each in values]
        ends = [[mean + sign * sd for mean, sd in zip(means, spread, strict=True)] for sign in (-1, 1)]
        axes.fill_between(epochs, *ends, color=colour, alpha=0.12, linewidth=0)
