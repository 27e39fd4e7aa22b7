"""What is in a folder, at every depth: names only, no file is opened or asked for its size."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from .paths import is_hidden
from .progress import progress_bar

__all__ = ['Folder', 'list_folder']

_EXTENSIONS = tuple(IMG_EXTENSIONS)


@dataclasses.dataclass(eq=False)
class Folder:
    """A folder and what is visible in it.

    Args:
        path: Its path.
        real: The same without links.
        images: Names of the images, sorted.
        links: Those of them that are links.
        others: Names of the other files, sorted.
        folders: Folders in it, by name.
        filled: Whether there is an image in it, at any depth.
    """

    path: str
    real: str
    images: list[str]
    links: set[str]
    others: list[str]
    folders: dict[str, Folder]
    filled: bool = False

    @property
    def parts(self) -> dict[str, Folder]:
        """The folders in it that hold images."""
        return {name: folder for name, folder in self.folders.items() if folder.filled}

    def walk(self) -> Iterator[Folder]:
        """Yield the folder and all below it."""
        yield self
        for folder in self.folders.values():
            yield from folder.walk()


def list_folder(path: str) -> Folder:
    """List a folder, in an order that is the same on every machine.

    Names that begin with a point, and the folders that systems leave behind, are left out; links are followed.

    Args:
        path: The folder.
    """
    with progress_bar('listing', 'images') as bar:
        return _list(path, os.path.realpath(path), (), bar)


def _list(path: str, real: str, above: tuple[str, ...], bar: Any) -> Folder:
    images, links, others, folders = [], set(), [], []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if entry.is_dir():
                if not is_hidden(name):
                    folders.append((name, entry.is_symlink()))
            elif name.lower().endswith(_EXTENSIONS):
                if name[0] != '.':
                    images.append(name)
                    if entry.is_symlink():
                        links.add(name)
            elif not is_hidden(name):
                others.append(name)
    images.sort()
    bar.update(len(images))
    found = Folder(path, real, images, links, sorted(others), {})
    for name, is_link in sorted(folders):
        child = os.path.join(path, name)
        inside = os.path.realpath(child) if is_link else os.path.join(real, name)
        # A link to a folder around it has no end.
        if inside not in (real, *above):
            found.folders[name] = _list(child, inside, (real, *above), bar)
    found.filled = bool(images) or any(folder.filled for folder in found.folders.values())
    return found
