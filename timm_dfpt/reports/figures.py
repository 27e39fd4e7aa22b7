"""Figures of a page, of a run folder and of a model card: curves, classes, calibration, intervals."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from .calibration import Reliability
from .canvas import COLORS, GRID, INK, Canvas, Draw, Drawing, Point, save, svg, text_width
from .names import shown

__all__ = [
    'COLORS', 'Draw', 'Drawing', 'Line', 'Scale', 'class_figure', 'interval_figure', 'line_figure',
    'reliability_figure', 'save', 'side_by_side', 'svg',
]  # fmt: skip

_FEW = 10
_DASHES: tuple[Sequence[float], ...] = ((), (6, 2.5), (1.5, 2), (6, 2, 1.5, 2))
_ROW = 13.0


class Scale:
    """The range of an axis.

    Args:
        values: What is to be seen on it.
        log: Whether it is logarithmic.
        integer: Whether there are whole numbers alone.
        tight: Whether it ends with the values.
    """

    def __init__(
        self, values: Sequence[float], log: bool = False, integer: bool = False, tight: bool = False
    ) -> None:
        known = [math.log10(value) if log else value for value in values if math.isfinite(value)] or [0.0]
        self.log, self.integer = log, integer
        low, high = min(known), max(known)
        if low == high:
            margin = 0.5 if integer or log else 0.1 * abs(low) or 1.0
        else:
            margin = 0.0 if tight else 0.05 * (high - low)
        self.low, self.high = low - margin, high + margin

    def share(self, value: float) -> float:
        """Return where a value is, from 0 to 1."""
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def ticks(self, most: int = 7) -> list[tuple[float, str]]:
        """Return round values with their labels, about as many as there is space for."""
        if self.log and self.high - self.low > 0.7:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            for factors in ((1, 2, 5), (1, 3), (1,)):
                found = [factor * 10.0**power for power in powers for factor in factors]
                found = [value for value in found if self.low <= math.log10(value) <= self.high]
                if len(found) <= most:
                    break
            return [(value, f'{value:g}') for value in found[:: -(-len(found) // most) or 1]]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        step = _round_step((high - low) / most)
        step = max(1.0, step) if self.integer else step
        first = math.ceil(low / step - 1e-9)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        digits += round(step * 10**digits, 6) % 1 != 0
        values = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
        return [(value, f'{value + 0.0:.{digits}f}') for value in values]


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


class _Axes:
    """A rectangle of a canvas in which values have their places.

    Args:
        canvas: The canvas.
        box: Its left, upper, right and lower end.
        x: Values from left to right.
        y: Values from below to above.
    """

    def __init__(self, canvas: Canvas, box: tuple[float, float, float, float], x: Scale, y: Scale) -> None:
        self.canvas, self.box, self.x, self.y = canvas, box, x, y

    def at(self, x: float, y: float) -> Point:
        left, top, right, bottom = self.box
        return left + (right - left) * self.x.share(x), bottom - (bottom - top) * self.y.share(y)

    def points(self, x: Sequence[float], y: Sequence[float]) -> list[Point]:
        return [self.at(*pair) for pair in zip(x, y, strict=True) if all(map(math.isfinite, pair))]

    def frame_x(self, label: str) -> None:
        left, top, right, bottom = self.box
        for value, name in self.x.ticks(max(2, int((right - left) / 45))):
            place, _ = self.at(value, 10**self.y.low if self.y.log else self.y.low)
            self.canvas.line([(place, top), (place, bottom)], GRID, 0.6)
            self.canvas.text((place, bottom + 13), name, 'middle')
        self.canvas.text(((left + right) / 2, bottom + 28), label, 'middle')

    def frame_y(self, label: str) -> None:
        left, top, right, bottom = self.box
        for value, name in self.y.ticks(max(2, int((bottom - top) / 26))):
            _, place = self.at(10**self.x.low if self.x.log else self.x.low, value)
            self.canvas.line([(left, place), (right, place)], GRID, 0.6)
            self.canvas.text((left - 5, place + 3), name, 'end')
        self.canvas.text((10, (top + bottom) / 2), label, 'middle', upright=True)


@dataclasses.dataclass(frozen=True)
class _Entry:
    label: str
    color: str
    dashes: Sequence[float] = ()
    marker: int | None = None
    line: bool = True


def _legend(canvas: Canvas, entries: Sequence[_Entry]) -> float:
    """Write the legend in columns at the upper end; returns the height that it takes."""
    if not entries:
        return 6.0
    widest = max(text_width(entry.label, 8) for entry in entries) + 34
    columns = max(1, min(len(entries), 4, int(canvas.width / widest)))
    rows = -(-len(entries) // columns)
    for i, entry in enumerate(entries):
        x, y = 4 + i // rows * canvas.width / columns, 12 + i % rows * _ROW
        if entry.line:
            canvas.line([(x, y - 3), (x + 22, y - 3)], entry.color, dashes=entry.dashes)
        if entry.marker is not None:
            canvas.marker(entry.marker, (x + 11, y - 3), entry.color)
        canvas.text((x + 27, y), entry.label, size=8)
    return rows * _ROW + 10


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
    def draw(canvas: Canvas) -> None:
        entries, numbers = [], [(colors or {}).get(line.label, i) for i, line in enumerate(lines)]
        for i, (line, number) in enumerate(zip(lines, numbers, strict=True)):
            marker = 0 if len(line.epochs) == 1 else None
            dashes = _DASHES[i // len(COLORS) % len(_DASHES)]
            entries.append(_Entry(shown(line.label, 40), COLORS[number % len(COLORS)], dashes, marker))
        ends = [end for line in lines for end in (line.values, line.low or (), line.high or ())]
        values = [value for end in ends for value in end]
        wide = log and bool(values) and min(values) > 0 and max(values) > 10 * min(values)
        x = Scale([epoch for line in lines for epoch in line.epochs], integer=True)
        y = Scale(values, log=wide)
        top = _legend(canvas, entries)
        left = 24 + max(text_width(name) for _, name in y.ticks())
        axes = _Axes(canvas, (left, top, canvas.width - 10, canvas.height - 34), x, y)
        axes.frame_x('epoch')
        axes.frame_y(ylabel)
        for line, entry in zip(lines, entries, strict=True):
            if line.low is not None and line.high is not None:
                back = axes.points(line.epochs, line.low)[::-1]
                canvas.area([*axes.points(line.epochs, line.high), *back], entry.color, 0.15)
        for line, entry in zip(lines, entries, strict=True):
            points = axes.points(line.epochs, line.values)
            if entry.marker is None:
                canvas.line(points, entry.color, dashes=entry.dashes)
            for point in points if entry.marker is not None else ():
                canvas.marker(entry.marker or 0, point, entry.color, 3)

    return draw


def class_figure(names: Sequence[str], values: Mapping[str, Sequence[float]], colors: Mapping[str, int]) -> Draw:
    """Return a figure of the accuracy of models by class.

    Args:
        names: Names of the classes, from above.
        values: By model percents, one of each class; NaN where there is none.
        colors: Numbers in `COLORS` by model.
    """
    def draw(canvas: Canvas) -> None:
        numbers = {model: colors[model] % len(COLORS) for model in values}
        entries = [
            _Entry(shown(model.replace('_', ' '), 40), COLORS[number], marker=number, line=False)
            for model, number in numbers.items()
        ]
        axes = _rows_of(canvas, entries, names, Scale([value for each in values.values() for value in each]))
        axes.frame_x('accuracy %')
        for i in range(len(names)):
            row = [each[i] for each in values.values() if math.isfinite(each[i])]
            if row:
                canvas.line([axes.at(min(row), i), axes.at(max(row), i)], GRID, 3)
        for model, number in numbers.items():
            for point in axes.points(values[model], range(len(names))):
                canvas.marker(number, point, COLORS[number], 2.8)

    return draw


def _rows_of(canvas: Canvas, entries: Sequence[_Entry], names: Sequence[str], x: Scale) -> _Axes:
    """Return axes with a row for each name, from above, and write the names."""
    short = [shown(name, 24) for name in names]
    top = _legend(canvas, entries)
    left = 12 + max(text_width(name) for name in short)
    y = Scale([len(names) - 0.5, -0.5], tight=True)
    # From above: what is higher has the smaller number.
    y.low, y.high = y.high, y.low
    axes = _Axes(canvas, (left, top, canvas.width - 10, canvas.height - 34), x, y)
    for i, name in enumerate(short):
        canvas.text((left - 6, axes.at(x.low, i)[1] + 3), name, 'end')
    return axes


def reliability_figure(lines: Mapping[str, Reliability], colors: Mapping[str, int]) -> Draw:
    """Return a reliability diagram; bins of fewer than ten images are left out.

    Args:
        lines: What to draw, by label.
        colors: Numbers in `COLORS` by label.
    """
    def draw(canvas: Canvas) -> None:
        numbers = {label: colors[label] % len(COLORS) for label in lines}
        entries = [_Entry('as sure as right', INK, _DASHES[1])]
        entries += [_Entry(shown(label, 40), COLORS[number], marker=number) for label, number in numbers.items()]
        top = _legend(canvas, entries)
        side = min(canvas.width - 56, canvas.height - 34 - top)
        whole = Scale([0, 1.02], tight=True)
        axes = _Axes(canvas, (46, top, 46 + side, top + side), whole, whole)
        axes.frame_x('confidence')
        axes.frame_y('share that is right')
        canvas.line([axes.at(0, 0), axes.at(1, 1)], INK, 0.8, _DASHES[1])
        for label, found in lines.items():
            filled = found.counts >= min(_FEW, float(found.counts.max()))
            shares = (found.counts[filled] / found.counts.sum()).tolist()
            points = axes.points(found.confidence[filled].tolist(), found.accuracy[filled].tolist())
            canvas.line(points, COLORS[numbers[label]], 1.2)
            for point, share in zip(points, shares, strict=True):
                canvas.marker(numbers[label], point, COLORS[numbers[label]], 1.6 + 4 * math.sqrt(share))

    return draw


def interval_figure(
    rows: Mapping[str, tuple[float, tuple[float, float] | None]], xlabel: str, from_zero: bool = True
) -> Draw:
    """Return a figure of values with intervals, such as differences to a reference.

    Args:
        rows: Value and interval by name, from above.
        xlabel: Label of the axis of values.
        from_zero: Whether 0 is what they are compared with.
    """
    def draw(canvas: Canvas) -> None:
        ends = [end for value, interval in rows.values() for end in (value, *(interval or ()))]
        axes = _rows_of(canvas, [], list(rows), Scale([0.0, *ends] if from_zero else ends))
        axes.frame_x(xlabel)
        if from_zero:
            canvas.line([axes.at(0, -0.5), axes.at(0, len(rows) - 0.5)], INK, 0.8)
        for i, (value, interval) in enumerate(rows.values()):
            if interval is not None:
                canvas.line([axes.at(end, i) for end in interval], COLORS[0])
            canvas.marker(0, axes.at(value, i), COLORS[0], 3)

    return draw


def side_by_side(title: str, panels: Mapping[str, Draw]) -> Draw:
    """Return a figure of several under one title.

    Args:
        title: The title of all.
        panels: What to draw, by its title.
    """
    def draw(canvas: Canvas) -> None:
        if title:
            canvas.text((canvas.width / 2, 16), shown(title, 100), 'middle', 11)
        width = canvas.width / len(panels)
        for i, (name, panel) in enumerate(panels.items()):
            canvas.text(((i + 0.5) * width, 34), shown(name, 60), 'middle', 10)
            panel(canvas.part(i * width + 6, 40, width - 12, canvas.height - 40))

    return draw
