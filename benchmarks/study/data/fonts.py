"""Which fonts of a folder can be used as image data, and which of them are one family.

A folder of fonts is not a dataset yet: there are symbol fonts in which 'A' is an arrow, small capitals in which 'a' is
an 'A', and the same design under several names, which would put training images into the test split. All three are
found from rasters alone, by rules that need no list of names:

- A font is dropped if a character is missing, is blank or looks exactly like another one, or if the font looks exactly
  like an earlier one.
- A font is dropped if fewer than `MIN_AGREEMENT` of its letters and digits resemble most the same character in other
  folders' fonts.
- Fonts of one folder are a family, as are two folders with fonts that resemble each other by more than `SAME_DESIGN`.
"""

from __future__ import annotations

import dataclasses
import logging
import string
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

__all__ = ['ALPHANUMERIC', 'EM', 'Font', 'Glyph', 'draw_glyph', 'find_families', 'scan_fonts', 'split_families']

_logger = logging.getLogger(__name__)

ALPHANUMERIC = string.digits + string.ascii_uppercase + string.ascii_lowercase

# Size of the em square in pixels at which glyphs are drawn. One size for everything: FreeType refuses some fonts at
# some sizes, so that what passes the scan at this size is sure to draw later.
EM = 64

# Looked at on the fonts of texlive-fonts-extra. Agreement has two peaks, small capitals (0.50 to 0.69) and text fonts
# (0.85 and more). The pairs of folders above this resemblance are one design, from STEP and XITS (1.00) and Erewhon and
# Heuristica (0.97) to Doulos and Nimbus (0.93, both Times); below, different ones begin (Noto and Source Sans, 0.92).
MIN_AGREEMENT = 0.7
SAME_DESIGN = 0.93

# Fonts of a family that others are compared with; without a bound 83 sizes of one design cost as much as 83 designs.
_REFERENCES = 8

_LENGTH = 2000


@dataclasses.dataclass(frozen=True)
class Glyph:
    """A character drawn at `EM` pixels per em.

    Attributes:
        mask: Coverage `[H, W]` of the ink's bounding box, uint8.
        top: Row of the top edge, counted downwards from the baseline.
    """

    mask: np.ndarray
    top: int


@dataclasses.dataclass(frozen=True)
class Font:
    """A usable font.

    Attributes:
        name: Path relative to the folder that was scanned, with forward slashes; what random numbers are seeded with.
        path: The file.
        extent: Height of the line or width of the widest character, the larger of both, in pixels at `EM`.
        middle: Row of the middle of the line, counted downwards from the baseline, in pixels at `EM`.
    """

    name: str
    path: Path
    extent: float
    middle: float

    @property
    def folder(self) -> str:
        """Name of the folder of the file: the fonts that were published together."""
        return self.path.parent.name


def draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> Glyph | None:
    """Draw one character, or return None where there is no ink."""
    mask, (_, top) = font.getmask2(character, mode='L', anchor='ls')
    width, height = mask.size
    pixels = np.frombuffer(bytes(mask), np.uint8).reshape(height, width)
    return Glyph(pixels, top) if pixels.any() else None


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    """Open a font at `EM` pixels per em, without the optional layout engine, which would depend on the machine."""
    return ImageFont.truetype(str(path), EM, layout_engine=ImageFont.Layout.BASIC)


def _draw_all(path: Path, characters: str) -> list[Glyph] | str:
    """Draw all characters of a font, or say in a few words why it cannot be used."""
    try:
        font = open_font(path)
        # No font has a glyph for a noncharacter of Unicode, so this is what it shows for a missing one.
        missing = draw_glyph(font, '\U0010fffe')
        drawn = [draw_glyph(font, character) for character in characters]
    except OSError:
        return 'not readable by FreeType'
    glyphs = [glyph for glyph in drawn if glyph is not None and not _same(glyph, missing)]
    if len(glyphs) < len(characters):
        return 'a character is missing or blank'
    if len({(glyph.top, glyph.mask.shape, glyph.mask.tobytes()) for glyph in glyphs}) < len(characters):
        return 'two characters look the same'
    return glyphs


def _same(glyph: Glyph, other: Glyph | None) -> bool:
    return other is not None and glyph.top == other.top and np.array_equal(glyph.mask, other.mask)


def _thumbnail(mask: np.ndarray, size: int = 16) -> np.ndarray:
    """Scale a mask `[H, W]` to fit a square `[size, size]`, centred, its proportions kept."""
    image = Image.fromarray(mask)
    width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BOX)
    square = Image.new('L', (size, size))
    square.paste(image, ((size - width) // 2, (size - height) // 2))
    return np.asarray(square)


def _unit_integers(vectors: np.ndarray) -> np.ndarray:
    """Centre vectors `[..., D]` and scale them to length `_LENGTH`, in whole numbers.

    Sums of their products are exact in float32 (below 2**24), whatever the order of summation: no borderline font may
    be in or out depending on the machine's linear algebra library.
    """
    vectors = vectors.astype(np.float64)
    vectors = vectors - vectors.mean(-1, keepdims=True)
    return np.rint(_LENGTH * vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def _agreement(thumbnails: np.ndarray, folders: np.ndarray) -> np.ndarray:
    """Share of characters that resemble most the same character in other folders' fonts.

    Args:
        thumbnails: `[N, C, 16, 16]` for N fonts and C characters.
        folders: Names `[N]`.

    Returns:
        Shares `[N]`.
    """
    fonts, characters = thumbnails.shape[:2]
    # Half the resolution: the resemblance should not depend on the weight of the strokes.
    small = thumbnails.reshape(fonts, characters, 8, 2, 8, 2).mean((3, 5)).reshape(fonts, characters, 64)
    small = _unit_integers(small)
    best = np.full((fonts, characters), -np.inf)
    match = np.full((fonts, characters), -1)
    for folder in np.unique(folders):
        references = small[folders == folder][:_REFERENCES].reshape(-1, 64)
        resemblance = small.reshape(-1, 64) @ references.T
        nearest = resemblance.argmax(1)
        value = resemblance[np.arange(len(nearest)), nearest].reshape(fonts, characters)
        better = (value > best) & (folders != folder)[:, None]
        best = np.where(better, value, best)
        match = np.where(better, (nearest % characters).reshape(fonts, characters), match)
    return (match == np.arange(characters)).mean(1)


def scan_fonts(
    root: Path, characters: str, min_agreement: float = MIN_AGREEMENT
) -> tuple[list[Font], np.ndarray, Counter[str]]:
    """Find the usable fonts of a folder.

    Args:
        root: Folder to search for `*.otf` and `*.ttf`, at any depth.
        characters: The classes; letters and digits must be among them, they decide the last rule.
        min_agreement: Least share of letters and digits that resemble their own kind in other folders' fonts.

    Returns:
        The fonts in the order of their names, thumbnails of their letters and digits `[N, 62, 16, 16]`, and how many
        fonts were dropped for which reason.

    Raises:
        ValueError: If the folder holds no font file or no usable one, or if `characters` lacks a letter or digit.
    """
    if not set(ALPHANUMERIC) <= set(characters):
        raise ValueError(f'characters={characters!r} must contain all letters and digits')
    paths = sorted(path for path in root.rglob('*') if path.suffix.lower() in ('.otf', '.ttf'))
    if not paths:
        raise ValueError(f'fonts={str(root)!r}: there is no .otf or .ttf file in this folder or below')
    alphanumeric = [characters.index(character) for character in ALPHANUMERIC]
    dropped: Counter[str] = Counter()
    fonts: list[Font] = []
    thumbnails: list[np.ndarray] = []
    seen: set[bytes] = set()
    for path in paths:
        glyphs = _draw_all(path, characters)
        if isinstance(glyphs, str):
            dropped[glyphs] += 1
            continue
        raster = b''.join(glyph.mask.tobytes() for glyph in glyphs)
        if raster in seen:
            dropped['looks exactly like another font'] += 1
            continue
        seen.add(raster)
        top = min(glyph.top for glyph in glyphs)
        bottom = max(glyph.top + glyph.mask.shape[0] for glyph in glyphs)
        width = max(glyph.mask.shape[1] for glyph in glyphs)
        name = path.relative_to(root).as_posix()
        fonts.append(Font(name, path, extent=max(bottom - top, width), middle=(top + bottom) / 2))
        thumbnails.append(np.stack([_thumbnail(glyphs[index].mask) for index in alphanumeric]))
    stacked = np.stack(thumbnails) if thumbnails else np.empty((0, len(ALPHANUMERIC), 16, 16))
    keep = _agreement(stacked, np.array([font.folder for font in fonts])) >= min_agreement
    dropped['symbols, small capitals or unusual shapes'] = int((~keep).sum())
    if not keep.any():
        raise ValueError(
            f'fonts={str(root)!r}: no font can be used ({dict(dropped)}); text fonts from at least two folders are '
            'needed, because fonts are compared with those of other folders'
        )
    return [font for font, kept in zip(fonts, keep, strict=True) if kept], stacked[keep], dropped


def find_families(
    fonts: list[Font], thumbnails: np.ndarray, same_design: float = SAME_DESIGN
) -> dict[str, list[Font]]:
    """Group fonts by folder, and folders that share a design.

    Args:
        fonts: N fonts.
        thumbnails: Their letters and digits `[N, 62, 16, 16]`.
        same_design: Mean correlation of two fonts' thumbnails above which their folders are one family.

    Returns:
        Fonts by family; a family is named after its folders.
    """
    flat = _unit_integers(thumbnails.reshape(len(fonts), len(ALPHANUMERIC), -1)).reshape(len(fonts), -1)
    # Character by character, because the sum over all 62 would be too large to be exact in float32.
    resemblance = np.zeros((len(fonts), len(fonts)))
    for part in np.split(flat, len(ALPHANUMERIC), axis=1):
        resemblance += part @ part.T
    similar = resemblance > same_design * _LENGTH**2 * len(ALPHANUMERIC)
    group = {font.folder: {font.folder} for font in fonts}
    for first, second in np.argwhere(similar):
        merged = group[fonts[first].folder] | group[fonts[second].folder]
        for folder in merged:
            group[folder] = merged
    families: dict[str, list[Font]] = {}
    for font in fonts:
        families.setdefault('+'.join(sorted(group[font.folder])), []).append(font)
    return families


def split_families(families: dict[str, list[Font]]) -> dict[str, dict[str, list[Font]]]:
    """Deal families out: in the order of their number of fonts, to train, validation, test, train, train, and again.

    Three fifths of the families go to training and each split gets large and small ones. The rule has no seed: a split
    changes only if the fonts do.

    Args:
        families: Fonts by family.

    Returns:
        Families of `train`, `validation` and `test`.

    Raises:
        ValueError: If there are fewer than three families.
    """
    if len(families) < 3:
        raise ValueError(f'three splits need at least 3 font families, found {sorted(families)}; add fonts')
    order = sorted(families, key=lambda name: (-len(families[name]), name))
    turns = ('train', 'validation', 'test', 'train', 'train')
    splits: dict[str, dict[str, list[Font]]] = {'train': {}, 'validation': {}, 'test': {}}
    for index, name in enumerate(order):
        splits[turns[index % len(turns)]][name] = families[name]
    return splits
