"""What of local paths may be published: their last part."""
from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

from .sources import LOCAL_DIR

__all__ = ['public', 'public_command']

_HUB_ID = re.compile(r'\s*hf[-_]hub:\w', re.IGNORECASE)
# An address, a home, a relative path with dots, a drive, an absolute path.
_START = r'(?:[\w+.\-]{2,}:[\\/]+|~[\w.\-]*(?=[\\/])|\.{1,2}(?=[\\/])|[A-Za-z]:(?=[\\/])|(?=[\\/]\S))'
_PATH = re.compile(_START)
# In the middle of text it ends where a value of YAML or Python does.
_INNER_PATH = re.compile(r'(?<![\w/\\.~])' + _START + r'[^\'",;{}\[\]()<>|]*')
_STRUCTURE = re.compile(r'[\s\'"=,;{}\[\]()<>|]')
_FILE = re.compile(r'[^\s:]*[\\/][^\s:]*\.(ya?ml|jsonl?|parquet|safetensors|bin|pth?|ckpt|png|jpe?g|csv|txt)')


def public(value: Any, local: bool = False) -> Any:
    """Return a value without the folders of this machine: of every path only the last part is kept.

    Args:
        value: Text, a list or mapping of such values (keys stay as they are), or anything else, which is returned.
        local: Shorten relative paths of two parts, too, where they exist here: they could be ids on the Hub.
    """
    if isinstance(value, Mapping):
        return {key: public(item, local) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item, local) for item in value]
    if isinstance(value, os.PathLike):
        return _last_part(str(os.fspath(value)))
    return _public_text(value, local) if isinstance(value, str) else value


def _public_text(text: str, local: bool) -> str:
    if _HUB_ID.match(text):
        return text
    if text.strip().lower().startswith(LOCAL_DIR):
        return LOCAL_DIR + _last_part(text.strip()[len(LOCAL_DIR) :])
    if _PATH.match(text.strip()) or _FILE.fullmatch(text) or (local and os.path.exists(text)):
        return _last_part(text)
    inner = _INNER_PATH.sub(lambda found: _last_part(found[0]), text)
    # No id on the Hub has two slashes, or a backslash.
    several = inner.count('/') > 1 or '\\' in inner
    return _last_part(inner) if several and not _STRUCTURE.search(inner) else inner


def _last_part(path: str) -> str:
    # What follows ? in an address may be a token.
    plain = path.partition('?')[0] if '://' in path else path
    return re.split(r'[\\/]+', plain.rstrip('\\/ '))[-1]


def public_command(command: str, renamed: Mapping[str, str]) -> str:
    """Return a command line without the folders of this machine.

    Args:
        command: The command line.
        renamed: What values in it are called in public, where that is known.
    """
    shown = []
    for word in shlex.split(command):
        option, equals, value = word.partition('=') if word.startswith('--') else ('', '', word)
        if word.startswith('--') and not equals:
            shown.append(word)
        else:
            shown.append(option + equals + str(renamed.get(value, public(value))))
    return shlex.join(shown)
