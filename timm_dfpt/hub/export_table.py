"""The files that a student was exported to, as a table."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .markdown import markdown_table

__all__ = ['export_cells', 'exports_table']


def exports_table(rows: Sequence[Mapping[str, Any]], pad: bool = False) -> str:
    """Return the rows of `summary.json`'s `exports` as Markdown; see `timm_dfpt.deploy.measure.export_student_files`.

    Args:
        rows: The rows. Values that could not be measured are missing or `None`.
        pad: Fill cells up with blanks.
    """
    head, cells = export_cells(rows)
    # What would end a cell.
    cells = [[cell.replace('|', '\\|').replace('\n', ' ') for cell in row] for row in cells]
    return markdown_table(head, cells, text_columns=2, pad=pad)


def export_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the rows of `summary.json`'s `exports` as titles of columns and cells; see `exports_table`."""
    head = [
        'format', 'file', 'on disk', 'largest difference', 'same class %', 'val top-1 %', 'images/s', 'note'
    ]  # fmt: skip
    cells = []
    for row in rows:
        cells.append(
            [
                str(row['format']),
                str(row.get('file') or '-'),
                _form(row, 'bytes', lambda size: f'{size / 1e6:.2f} MB'),
                _form(row, 'largest_difference', lambda share: f'{share:.1e}' if share else '0'),
                _form(row, 'agreement', lambda share: f'{share:.2f}'),
                _form(row, 'top1', lambda share: f'{share:.2f}'),
                _form(row, 'images_per_second', lambda speed: f'{speed:,.0f}'),
                str(row.get('note') or ''),
            ]
        )
    return head, cells


def _form(row: Mapping[str, Any], key: str, form: Any) -> str:
    value = row.get(key)
    return '-' if value is None else str(form(value))
