"""A page of one file: sections of text, tables, figures and images, with no script and nothing to be loaded."""
from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .figures import Drawing, svg
from .names import shown

__all__ = ['Block', 'Image', 'Page', 'Section', 'code', 'figures', 'gallery', 'matrix', 'render', 'table', 'text']

_TEMPLATES = Path(__file__).parent / 'templates'


@dataclasses.dataclass(frozen=True)
class Image:
    """A small image with a caption.

    Args:
        jpeg: The encoded image.
        lines: Its caption.
    """

    jpeg: bytes
    lines: Sequence[str]

    @property
    def uri(self) -> str:
        """The image as an address that holds it."""
        return 'data:image/jpeg;base64,' + base64.b64encode(self.jpeg).decode()


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a section; see the functions that make them."""

    kind: Literal['text', 'table', 'figures', 'gallery', 'matrix', 'code']
    title: str = ''
    note: str = ''
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text_columns: int = 1
    drawings: Sequence[Drawing] = ()
    images: Sequence[Image] = ()
    shades: Sequence[Sequence[float]] = ()
    closed: bool = False

    @property
    def svgs(self) -> list[tuple[str, str]]:
        """The drawings as SVG, with their captions."""
        return [(svg(drawing), drawing.caption) for drawing in self.drawings]


def text(note: str) -> Block:
    """Return a paragraph."""
    return Block('text', note=note)


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = '',
    note: str = '',
    text_columns: int = 1,
    closed: bool = False,
) -> Block:
    """Return a table.

    Args:
        head: Titles of the columns.
        rows: Cells.
        title: Title above it.
        note: What to know about it.
        text_columns: Number of columns of text; those of numbers follow.
        closed: Whether a reader has to open it.
    """
    return Block('table', title, note, head, rows, text_columns, closed=closed)


def figures(*drawings: Drawing) -> Block:
    """Return figures in a row."""
    return Block('figures', drawings=drawings)


def gallery(title: str, images: Sequence[Image], note: str = '') -> Block:
    """Return images in a grid."""
    return Block('gallery', title, note, images=images)


def matrix(names: Sequence[str], counts: Sequence[Sequence[int]], title: str, note: str) -> Block:
    """Return a square table of counts, its cells the darker the larger their share of the row."""
    shades = [[count / max(1, sum(row)) for count in row] for row in counts]
    head = [shown(name, 16) for name in names]
    rows = zip(names, counts, strict=True)
    cells = [[shown(name, 24), *(str(count) if count else '' for count in row)] for name, row in rows]
    return Block('matrix', title, note, ['', *head], cells, shades=shades)


def code(title: str, content: str, closed: bool = False) -> Block:
    """Return text that keeps its lines."""
    return Block('code', title, content, closed=closed)


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a page.

    Args:
        key: Its anchor.
        title: Its title.
        blocks: What is in it.
    """

    key: str
    title: str
    blocks: Sequence[Block]

    @property
    def drawing(self) -> Drawing | None:
        """The first figure, if there is one."""
        return next((drawing for block in self.blocks for drawing in block.drawings), None)


@dataclasses.dataclass(frozen=True)
class Page:
    """A page.

    Args:
        title: Its title.
        kind: What kind of page it is, in two words.
        summary: What it is about, in a sentence or two.
        tiles: The most important numbers: of each its name, the number, and what to compare it with.
        sections: Its sections; those without blocks are left out.
        footer: The last line.
    """

    title: str
    kind: str
    summary: str
    tiles: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]
    footer: str


def render(page: Page) -> str:
    """Return a page as HTML, everything in it escaped but the figures, which `figures.svg` has drawn."""
    import jinja2  # costs 0.1 s

    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sections = [section for section in page.sections if section.blocks]
    return environment.get_template('page.html').render(page=page, sections=sections)
