"""Tables in Markdown, and colors in the code of cards."""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ['html_color', 'markdown_table']


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1, pad: bool = False) -> str:
    """Return a table in Markdown.

    Args:
        head: Titles of the columns.
        rows: Cells; they are taken as they are, so that those from outside must be escaped.
        text_columns: Number of columns of text, flush left. Those after them are numbers, flush right.
        pad: Fill cells up with blanks, for a table that is read as plain text.
    """
    lines = [head, *rows]
    widths = [max(map(len, column)) if pad else 0 for column in zip(*lines, strict=True)]
    rule = ['-' * max(3, w) if i < text_columns else '-' * max(3, w - 1) + ':' for i, w in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        columns = enumerate(zip(cells, widths, strict=True))
        return f'| {" | ".join(c.ljust(w) if i < text_columns else c.rjust(w) for i, (c, w) in columns)} |'

    return '\n'.join(map(line, [head, rule, *rows]))


def html_color(background: Any) -> str | None:
    """Return a color `#rrggbb`, `None` for anything else."""
    # It comes from a file and goes into code.
    return background if re.fullmatch(r'#[0-9a-f]{6}', str(background)) else None
