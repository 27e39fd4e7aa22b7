"""What of local paths may be published: their last part."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

__all__ = ['public']


def public(value: Any, local: bool = False) -> Any:
    """Return a value without the folders of this machine: only the last part of absolute paths is kept.

    Args:
        value: Text, a list or mapping of such values (keys stay as they are), or anything else, which is returned.
        local: Shorten relative paths, too, where they exist here or follow `local-dir:`.
    """
    if isinstance(value, Mapping):
        return {key: public(item, local) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item, local) for item in value]
    if not isinstance(value, str):
        return value
    prefix = 'local-dir:' if value.startswith('local-dir:') else ''
    path = value.removeprefix(prefix)
    for flavour in (PurePosixPath(path), PureWindowsPath(path)):
        if flavour.is_absolute() or path.startswith('~'):
            return prefix + flavour.name
    return prefix + Path(path).name if local and (prefix or Path(path).exists()) else value
