"""Make the study's many-class dataset: characters drawn from fonts, split by font family.

The fonts are any folder of OTF and TTF files, for instance Debian's package, which need not be installed:

    apt-get download texlive-fonts-extra && dpkg -x texlive-fonts-extra_*.deb fonts
    python -m benchmarks.study.data.glyphs --fonts fonts --output DIR

Every image is a function of the seed, the font, the character and the number of the copy. Rows take turns through the
classes, and fewer per class are the first rows of more: `train[:1984]` are the first 32 of each of 62 classes, the same
images as with `--train-per-class 32`.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageFont

from benchmarks.study.data.fonts import (
    ALPHANUMERIC,
    Font,
    draw_glyph,
    find_families,
    open_font,
    scan_fonts,
    split_families,
)
from train.quickstart.make_data import encode_png

__all__ = ['CHARACTERS', 'make_glyphs', 'render']

_logger = logging.getLogger(__name__)

# By number of classes. All of ASCII is what most fonts agree on; Greek would leave half of the families.
CHARACTERS = {
    62: ALPHANUMERIC,
    94: ALPHANUMERIC + ''.join(chr(code) for code in range(33, 127) if not chr(code).isalnum()),
}

_CARD = """\
---
license: other
task_categories:
- image-classification
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
  - split: validation
    path: data/validation-*.parquet
  - split: test
    path: data/test-*.parquet
---
# Glyphs: {classes} characters from {fonts} fonts

Grey images of {size} x {size} pixels, one character each, drawn by `benchmarks/study/data/glyphs.py` (seed {seed}) with
{distortions}. No font family is in two splits.

| split | images | per class | families | fonts |
|---|---|---|---|---|
{table}

Rows take turns through the classes: the first {classes} n rows of a split are n images of each class.

## Fonts
Used: {fonts}. Dropped, with the reason:

{dropped}

The fonts of one folder are a family, and folders with a design in common are one family. Families are dealt out in the
order of their number of fonts, to train, validation, test, train, train, and again. Within a split every class draws
from all families equally often.

{families}

## Licences
The fonts have different licenses (many the SIL Open Font License or the GUST Font License; some others), which stand in
the packages that they came from. The images are meant for the machine that made them and are not redistributed: make
them again where they are needed.
"""

_DISTORTIONS = 'random size, rotation, position, contrast (dark on light and light on dark) and noise'
_PLAIN = 'random size, position and contrast (dark on light and light on dark), upright and without noise'


def render(
    font: ImageFont.FreeTypeFont, metrics: Font, character: str, size: int, rng: np.random.Generator,
    plain: bool = False,
) -> np.ndarray:
    """Draw a character as a distorted grey image.

    The line height of the font, not the character, is fitted to the image, and the character keeps its place on the
    line: size and position are what distinguishes 'o' from 'O'.

    Args:
        font: The opened font.
        metrics: Its extent and middle.
        character: A character that the font has.
        size: Side of the image in pixels.
        rng: Source of the distortions: size 0.7 to 1 of the image, rotation within 15 degrees, shift within 1/16 of the
            image, grey levels of ink and paper at least 64 apart, Gaussian noise of a standard deviation of 0 to 0.15
            of their difference.
        plain: Upright and without noise: what a teacher from elsewhere may have learnt.

    Returns:
        uint8 image `[size, size]`.
    """
    glyph = draw_glyph(font, character)
    if glyph is None:
        raise ValueError(f'{metrics.name} has no ink for {character!r}')
    canvas = 2 * size
    step = metrics.extent / (canvas * rng.uniform(0.7, 1.0))
    angle = 0.0 if plain else np.deg2rad(rng.uniform(-15, 15))
    shift_x, shift_y = rng.uniform(-canvas / 16, canvas / 16, 2)
    cos, sin = step * np.cos(angle), step * np.sin(angle)
    # A border, so that the interpolation at the edge of the ink fades to paper.
    mask = np.pad(glyph.mask, 1)
    from_x, from_y = canvas / 2 + shift_x, canvas / 2 + shift_y
    to_x, to_y = mask.shape[1] / 2, metrics.middle - glyph.top + 1
    matrix = (
        cos, sin, to_x - cos * from_x - sin * from_y,
        -sin, cos, to_y + sin * from_x - cos * from_y,
    )  # fmt: skip
    # Twice the size, then the mean of each 2 x 2: Pillow's transform does not filter when it shrinks.
    drawn = Image.fromarray(mask).transform(
        (canvas, canvas), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC
    )
    coverage = np.asarray(drawn.reduce(2), np.float64) / 255
    ink, paper = rng.uniform(0, 255, 2)
    while abs(ink - paper) < 64:
        ink, paper = rng.uniform(0, 255, 2)
    # In proportion to the contrast, or thin strokes in pale ink would be gone and their labels with them.
    noise = 0.0 if plain else rng.normal(0, rng.uniform(0, 0.15) * abs(ink - paper), coverage.shape)
    return np.clip(np.rint(paper + (ink - paper) * coverage + noise), 0, 255).astype(np.uint8)


def _draw_fonts(families: dict[str, list[Font]], rng: np.random.Generator) -> Iterator[tuple[Font, int]]:
    """Yield fonts and the number of the copy for ever, each family once in a round, its fonts in turn."""
    shuffled = [[fonts[index] for index in rng.permutation(len(fonts))] for fonts in families.values()]
    for turn in itertools.count():
        for index in rng.permutation(len(shuffled)):
            fonts = shuffled[index]
            yield fonts[turn % len(fonts)], turn // len(fonts)


def _render_split(
    families: dict[str, list[Font]], characters: str, per_class: int, size: int, seed: int, plain: bool
) -> list[np.ndarray]:
    """Draw `per_class` images of every class; row `i` is of class `i % len(characters)`."""
    by_font: dict[Font, list[tuple[int, str, int]]] = {}
    for label, character in enumerate(characters):
        draws = _draw_fonts(families, np.random.default_rng([seed, ord(character)]))
        for number, (font, copy) in enumerate(itertools.islice(draws, per_class)):
            by_font.setdefault(font, []).append((number * len(characters) + label, character, copy))
    images: dict[int, np.ndarray] = {}
    for font, jobs in by_font.items():
        opened = open_font(font.path)
        for row, character, copy in jobs:
            rng = np.random.default_rng([seed, zlib.crc32(font.name.encode()), ord(character), copy])
            images[row] = render(opened, font, character, size, rng, plain)
    return [images[row] for row in range(len(images))]


def _write_card(
    output: Path,
    splits: dict[str, dict[str, list[Font]]],
    per_class: dict[str, int],
    dropped: Counter[str],
    classes: int,
    size: int,
    seed: int,
    plain: bool,
) -> None:
    fonts = {split: sum(map(len, families.values())) for split, families in splits.items()}
    table = '\n'.join(
        f'| {split} | {per_class[split] * classes} | {per_class[split]} | {len(families)} | {fonts[split]} |'
        for split, families in splits.items()
    )
    names = '\n'.join(
        f'- {split}: ' + ', '.join(f'{name} ({len(members)})' for name, members in sorted(families.items()))
        for split, families in splits.items()
    )
    card = _CARD.format(
        classes=classes, fonts=sum(fonts.values()), size=size, seed=seed, table=table, families=names,
        distortions=_PLAIN if plain else _DISTORTIONS,
        dropped='\n'.join(f'- {reason}: {count}' for reason, count in sorted(dropped.items())),
    )  # fmt: skip
    (output / 'README.md').write_text(card, encoding='utf-8')


def make_glyphs(
    fonts: Path,
    output: Path,
    classes: int = 62,
    train_per_class: int = 200,
    eval_per_class: int = 100,
    size: int = 32,
    seed: int = 0,
    plain: bool = False,
) -> None:
    """Write `train`, `validation` and `test` as parquet, and a `README.md` with the counts.

    Args:
        fonts: Folder of OTF and TTF files, at any depth; a folder of files is taken for a family.
        output: Folder to write, created if needed; `datasets.load_dataset(str(output))` reads it.
        classes: Number of classes, a key of `CHARACTERS`.
        train_per_class: Training images of each class.
        eval_per_class: Validation images of each class, and test images.
        size: Side of the images in pixels.
        seed: Seed of the choice of fonts and of the distortions, not of the split into families.
        plain: Without rotation and noise; see `render`.

    Raises:
        ValueError: If an argument is out of range, or the fonts do not suffice for three splits.
    """
    if classes not in CHARACTERS:
        raise ValueError(f'classes={classes} must be one of {sorted(CHARACTERS)}')
    for name, value in (('train_per_class', train_per_class), ('eval_per_class', eval_per_class)):
        if value < 1:
            raise ValueError(f'{name}={value} must be at least 1')
    if size < 8:
        raise ValueError(f'size={size} must be at least 8 pixels: characters are not legible below')
    characters = CHARACTERS[classes]
    usable, thumbnails, dropped = scan_fonts(fonts, characters)
    splits = split_families(find_families(usable, thumbnails))
    _logger.info('%d usable fonts, dropped: %s', len(usable), dict(dropped))
    per_class = {'train': train_per_class, 'validation': eval_per_class, 'test': eval_per_class}
    features = Features({'image': ImageFeature(), 'label': ClassLabel(names=list(characters))})
    (output / 'data').mkdir(parents=True, exist_ok=True)
    for split, families in splits.items():
        images = _render_split(families, characters, per_class[split], size, seed, plain)
        rows = {
            'image': [{'bytes': encode_png(image), 'path': None} for image in images],
            'label': [row % classes for row in range(len(images))],
        }
        Dataset.from_dict(rows, features=features).to_parquet(output / 'data' / f'{split}-00000-of-00001.parquet')
        _logger.info('%s: %d images from %d families', split, len(images), len(families))
    _write_card(output, splits, per_class, dropped, classes, size, seed, plain)


def main() -> None:
    """Command line of `make_glyphs`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--fonts', type=Path, required=True, help='folder of OTF and TTF files, at any depth')
    parser.add_argument('--output', type=Path, required=True, help='folder for the parquet files and the card')
    parser.add_argument('--classes', type=int, default=62, choices=sorted(CHARACTERS),
                        help='62: letters and digits; 94: all of ASCII (%(default)s)')  # fmt: skip
    parser.add_argument('--train-per-class', type=int, default=200, help='training images per class (%(default)s)')
    parser.add_argument('--eval-per-class', type=int, default=100,
                        help='validation images per class, and test images (%(default)s)')  # fmt: skip
    parser.add_argument('--size', type=int, default=32, help='side of the images in pixels (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='seed of fonts and distortions (%(default)s)')
    parser.add_argument('--plain', action='store_true', help='upright and without noise')
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    make_glyphs(
        args.fonts, args.output, args.classes, args.train_per_class, args.eval_per_class, args.size, args.seed,
        args.plain,
    )  # fmt: skip


if __name__ == '__main__':
    main()
