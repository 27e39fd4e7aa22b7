"""A progress bar for what is done to many files, shown only where that takes a while."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm.auto import tqdm

__all__ = ['progress_bar']

_DELAY = 3.0  # seconds


def progress_bar(what: str, unit: str, total: int | None = None) -> Any:
    """Return a bar of tqdm, with the time that is left where the total is known.

    Args:
        what: What is done, such as `listing`.
        unit: What is counted.
        total: How many there are.
    """
    # Launchers say so before there are processes that know each other.
    main = os.environ.get('RANK', '0') == '0'
    hidden = not main or sys.stderr is None
    return tqdm(desc=what, unit=f' {unit}', total=total, delay=_DELAY, disable=hidden, dynamic_ncols=True)
