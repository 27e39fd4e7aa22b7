"""What options of several commands take."""
from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ['at_least', 'new_file']


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of an option that takes integers from `least` up."""

    def integer(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f'must be at least {least}, got {number}')
        return number

    return integer


def new_file(text: str) -> Path:
    """Return the path of a file to write, which replaces nothing.

    Raises:
        ArgumentTypeError: If there is something of that name, or no folder to write to.
    """
    path = Path(text).expanduser()
    # Replacing would lose an image that was named by mistake, and with the rights of root even /dev/stdout.
    if path.exists() or path.is_symlink():
        raise argparse.ArgumentTypeError(f'{text!r} exists: name another file, or remove it')
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(
            f'{text!r}: {str(path.parent)!r} is not a folder that can be written to: create it, or name another file'
        )
    return path
