"""Shapes of a figure, written as SVG for pages and run folders, or drawn by matplotlib as PNG for model cards.

A run draws at its end, and matplotlib alone would take longer than all else there: 0.9 s of CPU time to import it and
to draw five figures, against 0.01 s for text.
"""
from __future__ import annotations

import dataclasses
import math
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Literal

from ..hub.files import atomic, write_text

__all__ = ['COLORS', 'GRID', 'INK', 'MARKERS', 'Canvas', 'Draw', 'Drawing', 'Point', 'save', 'svg', 'text_width']

INK, GRID = '#1f2429', '#d9dde2'
# Distinct for all kinds of color vision, on light and on dark ground; after Okabe and Ito (2008).
COLORS = ('#0f6cbd', '#c2571a', '#5b6470', '#1a8f6e', '#a8489a', '#8a6d00', '#4a5bd0', '#b3324b')
_NAMES = {INK: 'ink', GRID: 'grid', **{color: f's{i}' for i, color in enumerate(COLORS)}}
_DPI = 130

Point = tuple[float, float]
Anchor = Literal['start', 'middle', 'end']


def _polygon(corners: int, first: float, inner: float = 1.0) -> list[Point]:
    turns = [first + 2 * math.pi * i / corners for i in range(corners)]
    radii = [1.0 if i % 2 == 0 else inner for i in range(corners)]
    return [(r * math.cos(turn), r * math.sin(turn)) for r, turn in zip(radii, turns, strict=True)]


# Outlines about (0, 0), of radius 1: circle, square, diamond, triangles, pentagon, star, cross.
MARKERS = (
    _polygon(16, 0), _polygon(4, math.pi / 4), _polygon(4, 0), _polygon(3, math.pi / 2), _polygon(3, -math.pi / 2),
    _polygon(5, -math.pi / 2), _polygon(10, -math.pi / 2, 0.45), _polygon(8, 0, 0.35),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Path:
    points: Sequence[Point]
    stroke: str = ''
    width: float = 0.0
    dashes: Sequence[float] = ()
    fill: str = ''
    opacity: float = 1.0


@dataclasses.dataclass(frozen=True)
class _Text:
    at: Point
    text: str
    size: float
    anchor: Anchor
    upright: bool


class Canvas:
    """What a figure is drawn on, in points (1/72 inch) from the upper left.

    Args:
        width: Its width.
        height: Its height.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.shapes: list[_Path | _Text] = []
        self._origin = (0.0, 0.0)

    def part(self, x: float, y: float, width: float, height: float) -> Canvas:
        """Return a rectangle of the canvas as a canvas."""
        part = Canvas(width, height)
        part.shapes, part._origin = self.shapes, self._moved((x, y))
        return part

    def line(self, points: Sequence[Point], color: str, width: float = 1.6, dashes: Sequence[float] = ()) -> None:
        """Draw a line through points, dashed by lengths of strokes and gaps."""
        self.shapes.append(_Path([self._moved(point) for point in points], color, width, dashes))

    def area(self, points: Sequence[Point], color: str, opacity: float = 1.0) -> None:
        """Fill what a line through points goes round."""
        self.shapes.append(_Path([self._moved(point) for point in points], fill=color, opacity=opacity))

    def marker(self, number: int, at: Point, color: str, radius: float = 2.5) -> None:
        """Draw one of `MARKERS`."""
        outline = MARKERS[number % len(MARKERS)]
        self.area([(at[0] + radius * x, at[1] + radius * y) for x, y in outline], color)

    def text(self, at: Point, text: str, anchor: Anchor = 'start', size: float = 9.0, upright: bool = False) -> None:
        """Write text on a base line that begins, has its middle or ends at a point; upright: from below to above."""
        self.shapes.append(_Text(self._moved(at), text, size, anchor, upright))

    def _moved(self, point: Point) -> Point:
        return point[0] + self._origin[0], point[1] + self._origin[1]


Draw = Callable[[Canvas], None]
"""Draws a figure."""


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

    def canvas(self) -> Canvas:
        """Return the drawn figure."""
        canvas = Canvas(72 * self.size[0], 72 * self.size[1])
        self.draw(canvas)
        return canvas


def text_width(text: str, size: float = 9.0) -> float:
    """Estimate the width of a text in points: each reader has another font."""
    return size * sum(1.0 if unicodedata.east_asian_width(char) in 'WF' else 0.62 for char in text)


def svg(drawing: Drawing) -> str:
    """Return a figure as an SVG element for a page, which gives it its colors and its font."""
    canvas = drawing.canvas()
    head = f'<svg viewBox="0 0 {canvas.width:g} {canvas.height:g}" role="img" '
    head += f'style="max-width: {116 * drawing.size[0]:.0f}px">'
    return '\n'.join([head, *_elements(canvas, lambda color: f'var(--{_NAMES[color]})', 'var(--font)'), '</svg>'])


def save(drawing: Drawing, path: Path) -> None:
    """Write a figure to a file on white ground, as its name ends: `.svg` or `.png`.

    Raises:
        OSError: If it cannot be written.
    """
    if path.suffix == '.svg':
        canvas = drawing.canvas()
        size = f'width="{canvas.width:g}pt" height="{canvas.height:g}pt"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {canvas.width:g} {canvas.height:g}" {size}>'
        elements = _elements(canvas, lambda color: color, 'sans-serif')
        ground = '<rect width="100%" height="100%" fill="white"/>'
        write_text(path, '\n'.join([head, ground, *elements, '</svg>', '']))
    else:
        _save_png(drawing, path)


def _elements(canvas: Canvas, color: Callable[[str], str], font: str) -> list[str]:
    elements = []
    for shape in canvas.shapes:
        if isinstance(shape, _Path):
            points = ' '.join(f'{x:.1f},{y:.1f}' for x, y in shape.points)
            if shape.fill:
                style = f'fill: {color(shape.fill)}' + (f'; opacity: {shape.opacity:g}' if shape.opacity < 1 else '')
                elements.append(f'<polygon points="{points}" style="{style}"/>')
                continue
            dashes = f'; stroke-dasharray: {" ".join(f"{d:g}" for d in shape.dashes)}' if shape.dashes else ''
            style = f'fill: none; stroke: {color(shape.stroke)}; stroke-width: {shape.width:g}{dashes}'
            elements.append(f'<polyline points="{points}" style="{style}; stroke-linejoin: round"/>')
        else:
            x, y = shape.at
            turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if shape.upright else ''
            style = f'font: {shape.size:g}px {font}; text-anchor: {shape.anchor}; fill: {color(INK)}'
            elements.append(f'<text x="{x:.1f}" y="{y:.1f}"{turn} style="{style}">{escape(shape.text)}</text>')
    return elements


def _save_png(drawing: Drawing, path: Path) -> None:
    import matplotlib  # costs 0.3 s
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Polygon

    canvas = drawing.canvas()
    ends = {'start': 'left', 'middle': 'center', 'end': 'right'}
    with matplotlib.rc_context(), warnings.catch_warnings(), atomic(path) as temporary:
        # Of scripts that its font lacks; browsers have others.
        warnings.filterwarnings('ignore', message='.*[Gg]lyph')
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({'font.family': ['DejaVu Sans'], 'text.parse_math': False})
        figure = Figure(figsize=drawing.size, dpi=_DPI, facecolor='white')
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, canvas.width), ylim=(canvas.height, 0))
        for order, shape in enumerate(canvas.shapes):
            if isinstance(shape, _Text):
                options = {'ha': ends[shape.anchor], 'va': 'baseline', 'color': INK, 'fontsize': shape.size}
                upright = {'rotation': 90, 'rotation_mode': 'anchor'} if shape.upright else {}
                axes.text(*shape.at, shape.text, **options, **upright)
            elif shape.fill:
                look = {'facecolor': shape.fill, 'alpha': shape.opacity, 'linewidth': 0}
                axes.add_patch(Polygon(shape.points, zorder=order, **look))
            else:
                x, y = zip(*shape.points, strict=True)
                dashes = (0, tuple(d / shape.width for d in shape.dashes)) if shape.dashes else '-'
                look = {'color': shape.stroke, 'linewidth': shape.width, 'linestyle': dashes}
                axes.add_line(Line2D(x, y, zorder=order, **look))
        # Without metadata two equal runs write equal files.
        figure.savefig(temporary, format='png', dpi=_DPI, facecolor='white', metadata={'Software': None})
