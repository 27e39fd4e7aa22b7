"""Figures of a page: SVG that takes its colors and fonts from the page, and the same as PNG for a model card."""
from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..hub.files import atomic
from .calibration import Reliability
from .names import shown

__all__ = [
    'COLORS', 'Drawing', 'Line', 'class_figure', 'interval_figure', 'line_figure', 'reliability_figure', 'save_png',
    'svg',
]  # fmt: skip

INK, GRID = '#1f2429', '#d9dde2'
# Distinct for all kinds of color vision, on light and on dark ground; after Okabe and Ito (2008).
COLORS = ('#0f6cbd', '#c2571a', '#5b6470', '#1a8f6e', '#a8489a', '#8a6d00', '#4a5bd0', '#b3324b')
_FEW = 10
_MARKERS = 'osDv^P*X'
_STYLES = {
    'font.family': ['DejaVu Sans'], 'font.size': 9, 'text.color': INK, 'axes.labelcolor': INK, 'axes.edgecolor': GRID,
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'axes.titlesize': 9, 'grid.color': GRID,
    'grid.linewidth': 0.6, 'axes.axisbelow': True, 'xtick.color': INK, 'ytick.color': INK, 'xtick.major.size': 0,
    'ytick.major.size': 0, 'ytick.minor.size': 0, 'lines.linewidth': 1.6, 'legend.frameon': False,
    'legend.fontsize': 8, 'svg.fonttype': 'none', 'svg.hashsalt': 'timm_dfpt', 'text.parse_math': False,
    'figure.constrained_layout.use': True, 'figure.facecolor': 'none', 'axes.facecolor': 'none',
}  # fmt: skip

Draw = Callable[[Any], None]
"""Draws into a matplotlib figure."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn.

    Args:
        draw: Draws it.
        caption: What it is.
        size: Width and height in inches.
    """

    draw: Draw
    caption: str
    size: tuple[float, float] = (5.0, 3.1)


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib  # costs 0.3 s

    with matplotlib.rc_context(), warnings.catch_warnings():
        # Of scripts that its font lacks; browsers have others.
        warnings.filterwarnings('ignore', message='.*[Gg]lyph')
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLES)
        yield


def _figure(drawing: Drawing) -> Any:
    from matplotlib.figure import Figure  # costs 0.3 s

    figure = Figure(figsize=drawing.size)
    drawing.draw(figure)
    return figure


def svg(drawing: Drawing) -> str:
    """Return a figure as an SVG element for a page."""
    file = io.StringIO()
    with _style():
        metadata = dict.fromkeys(('Date', 'Creator', 'Format', 'Type'))
        _figure(drawing).savefig(file, format='svg', metadata=metadata)
    text = file.getvalue()
    text = text[text.index('<svg') :]
    # Its rules would be those of the whole page, which has them for figures.
    text = re.sub(r'<(metadata|style)\b.*?</\1>', '', text, flags=re.DOTALL)
    # Names cannot look like tags here: in them < and > are escaped.
    text = re.sub(r'<g id="[^"<>]*">', '<g>', text)
    element = f'<svg viewBox="\\1" role="img" style="max-width: {116 * drawing.size[0]:.0f}px">'
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', element, text, count=1)
    text = re.sub(r'<!--.*?-->\s*', '', text, flags=re.DOTALL)
    return re.sub(r'(?<= style=")[^"]*(?=")', lambda found: _themed(found[0]), text)


def _themed(style: str) -> str:
    names = {INK: 'ink', GRID: 'grid', **{color: f's{i}' for i, color in enumerate(COLORS)}}
    style = re.sub(r'#[0-9a-f]{6}', lambda found: f'var(--{names[found[0]]})' if found[0] in names else found[0], style)
    return style.replace("'DejaVu Sans'", 'var(--font)')


def save_png(drawing: Drawing, path: Path) -> None:
    """Write a figure as a PNG file on white ground.

    Raises:
        OSError: If it cannot be written.
    """
    with _style(), atomic(path) as temporary:
        # Without metadata two equal runs write equal files.
        _figure(drawing).savefig(temporary, format='png', dpi=130, facecolor='white', metadata={'Software': None})


class Line:
    """A curve over the epochs.

    Args:
        label: What it is.
        epochs: Its epochs.
        values: A value for each of them.
        low: Lower end of a band about it, if there is one.
        high: Upper end.
    """

    def __init__(
        self,
        label: str,
        epochs: Sequence[float],
        values: Sequence[float],
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
    ) -> None:
        self.label, self.epochs, self.values, self.low, self.high = label, epochs, values, low, high


def line_figure(lines: Sequence[Line], ylabel: str, log: bool = False, colors: Mapping[str, int] | None = None) -> Draw:
    """Return a figure of curves over the epochs.

    Args:
        lines: The curves.
        ylabel: Label of the axis of values.
        log: Whether that axis is logarithmic where values differ by more than a factor of 10, and allow it.
        colors: Numbers in `COLORS` by label; by default in the order of the curves.
    """
    def draw(figure: Any) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter  # costs 0.3 s

        axes = figure.add_subplot()
        for i, line in enumerate(lines):
            color = COLORS[(colors or {}).get(line.label, i) % len(COLORS)]
            marker = 'o' if len(line.epochs) == 1 else None
            dashes = ('-', '--', ':', '-.')[i // len(COLORS) % 4]
            axes.plot(line.epochs, line.values, dashes, color=color, label=shown(line.label, 40), marker=marker)
            if line.low is not None and line.high is not None:
                axes.fill_between(line.epochs, line.low, line.high, color=color, alpha=0.15, linewidth=0)
        values = [value for line in lines for value in line.values]
        if log and min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale('log')
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel='epoch', ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc='outside upper left', ncols=2)

    return draw


def class_figure(names: Sequence[str], values: Mapping[str, Sequence[float]], colors: Mapping[str, int]) -> Draw:
    """Return a figure of the accuracy of models by class.

    Args:
        names: Names of the classes, from above.
        values: By model percents, one of each class; NaN where there is none.
        colors: Numbers in `COLORS` by model.
    """
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        rows = range(len(names))
        for i in rows:
            row = [each[i] for each in values.values() if each[i] == each[i]]
            if row:
                axes.plot([min(row), max(row)], [i, i], color=GRID, linewidth=3, zorder=1, solid_capstyle='round')
        for model, each in values.items():
            number = colors[model] % len(COLORS)
            label = shown(model.replace('_', ' '), 40)
            axes.scatter(each, rows, s=26, marker=_MARKERS[number], color=COLORS[number], label=label, zorder=2)
        axes.set_yticks(rows, [shown(name, 24) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel('accuracy %')
        axes.grid(visible=False, axis='y')
        figure.legend(loc='outside upper center', ncols=min(4, len(values)))

    return draw


def reliability_figure(lines: Mapping[str, Reliability], colors: Mapping[str, int]) -> Draw:
    """Return a reliability diagram; what fewer than ten images say is left out.

    Args:
        lines: What to draw, by label.
        colors: Numbers in `COLORS` by label.
    """
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], '--', color=INK, linewidth=0.8, label='as sure as right')
        for label, found in lines.items():
            filled = found.counts >= min(_FEW, float(found.counts.max()))
            number = colors[label] % len(COLORS)
            sizes = 8 + 90 * found.counts[filled] / found.counts.sum()
            x, y = found.confidence[filled].numpy(), found.accuracy[filled].numpy()
            axes.plot(x, y, color=COLORS[number], label=shown(label, 40), linewidth=1.2)
            axes.scatter(x, y, s=sizes.numpy(), color=COLORS[number], marker=_MARKERS[number], zorder=2)
        axes.set(xlabel='confidence', ylabel='share that is right', xlim=(0, 1.02), ylim=(0, 1.02), aspect='equal')
        figure.legend(loc='outside upper left', ncols=2)

    return draw


def interval_figure(rows: Mapping[str, tuple[float, tuple[float, float] | None]], xlabel: str) -> Draw:
    """Return a figure of values with intervals, such as differences to a reference.

    Args:
        rows: Value and interval by name, from above.
        xlabel: Label of the axis of values.
    """
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, linewidth=0.8)
        for i, (value, interval) in enumerate(rows.values()):
            if interval is not None:
                axes.plot(interval, [i, i], color=COLORS[0], solid_capstyle='round')
            axes.plot([value], [i], 'o', color=COLORS[0])
        axes.set_yticks(range(len(rows)), [shown(name, 24) for name in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(xlabel)
        axes.grid(visible=False, axis='y')

    return draw
