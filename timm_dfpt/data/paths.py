"""Names of files as they are on disk, which need not be UTF-8, in tables and messages, which must be."""

from __future__ import annotations

import difflib
import os

__all__ = ['is_hidden', 'pack_path', 'printable', 'similar_path', 'unpack_path']

# No path has this character, hence it marks one whose bytes are written as characters.
_MARK = '\0'
# Folders that file managers, archives and file servers leave behind; they hold copies and previews of images.
_HIDDEN = {
    '__macosx', '__pycache__', '@eadir', '@tmp', '@recycle', '#recycle', '#snapshot', '$recycle.bin', 'lost+found',
    'system volume information',
}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Say whether a file or folder of this name is not meant to be seen, and holds no images of its own."""
    return name.startswith('.') or name.casefold() in _HIDDEN


def pack_path(path: str) -> str:
    """Write a path so that it is valid unicode, and `unpack_path` gives back the same bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return _MARK + os.fsencode(path).decode('latin-1')
    return path


def unpack_path(path: str) -> str:
    """Undo `pack_path`."""
    return os.fsdecode(path[1:].encode('latin-1')) if path.startswith(_MARK) else path


def printable(path: str) -> str:
    """Write a path for display: bytes that are not UTF-8 as `\\xe9`."""
    return os.fsencode(path).decode(errors='backslashreplace')


def similar_path(path: str, suffix: str | None = None) -> str:
    """Say what is here instead of a folder that is not.

    Args:
        path: The folder.
        suffix: That of files which it could be instead.

    Returns:
        A folder whose name comes close, or else from where on the path is wrong, in parentheses behind a space; empty
        where neither is known.
    """
    folder, name = os.path.split(os.path.normpath(os.path.expanduser(path)))
    if not os.path.isdir(folder or '.'):
        return ''
    with os.scandir(folder or '.') as entries:
        listed = sorted(each.name for each in entries if each.is_dir() or (suffix and each.name.endswith(suffix)))
    close = difflib.get_close_matches(name, [each for each in listed if not is_hidden(each)], 1)
    if close:
        return f' (did you mean {printable(os.path.join(folder, close[0]))!r}?)'
    return f' (the folder {printable(folder)!r} has no {printable(name)!r})' if folder else ''
