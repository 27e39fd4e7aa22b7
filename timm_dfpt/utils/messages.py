"""What error messages have in common."""
from __future__ import annotations

import reprlib
from typing import Any

__all__ = ['clip', 'shorten', 'without_traceback']

_SHOWN = 80
_MAX_MESSAGE = 2000
# Values of others may be large, deep or contain themselves: only so much of them is read.
_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 30
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 2 * _SHOWN


def shorten(value: Any) -> str:
    """Return `value` as a message shows it: whole where it is short, else its beginning."""
    try:
        shown = _REPR.repr(value)
    except ValueError:
        # Python writes no integer of more than 4300 digits.
        return f'an object of type {type(value).__name__} that is too large to be shown'
    return shown if len(shown) <= _SHOWN else f'{shown[:_SHOWN]}...'


def clip(message: str) -> str:
    """Return a message without its middle if it is too long to be read; the remedy stands at its end."""
    cut = len(message) - _MAX_MESSAGE
    return message if cut <= 0 else f'{message[:1500]} [{cut:,} characters left out] {message[-500:]}'


def without_traceback(text: str) -> str:
    """Return the message of an error that torch hands on from a process of a loader as the text of its traceback."""
    return text.strip().splitlines()[-1].partition(': ')[2] if 'in DataLoader worker process' in text else text
