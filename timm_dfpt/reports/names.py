"""Names from data and files as a page can show them: visible, of one line, of a bounded length."""
from __future__ import annotations

import re
import unicodedata

__all__ = ['shown']

# They change the direction of what follows them, beyond the name itself.
_DIRECTIONS = re.compile('[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]')
_HIDDEN = ('Cc', 'Cs', 'Zl', 'Zp')


def shown(name: object, most: int = 60) -> str:
    """Return a name without control characters and line breaks, and without its middle if it is too long.

    It is not escaped: that is what a template does.

    Args:
        name: The name.
        most: The largest number of characters.
    """
    # No more of a long name is processed than could be shown.
    text = str(name)
    text = text if len(text) <= 4 * most else text[: 2 * most] + text[-2 * most :]
    text = ' '.join(_DIRECTIONS.sub('\ufffd', text).split())
    text = ''.join('\ufffd' if unicodedata.category(char) in _HIDDEN else char for char in text) or '(blank)'
    if len(text) <= most:
        return text
    end = most // 3
    return f'{text[: most - end - 1]}\u2026{text[-end:]}'
