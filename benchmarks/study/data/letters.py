"""Make the images of the quickstart of new classes: the small letters of the study's glyphs; for its teacher the rest.

The fonts are those of Debian's package, which need not be installed:

    apt-get download texlive-fonts-extra && dpkg -x texlive-fonts-extra_*.deb fonts
    python -m benchmarks.study.data.letters --fonts fonts --output train/quickstart_new_classes/data
    python -m benchmarks.study.data.letters --fonts fonts --teacher --output output/capitals-and-digits

The teacher's images are the 36 capitals and digits, so that it has seen none of the letters, but their fonts.
"""
from __future__ import annotations

import argparse
import io
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from PIL import Image

from benchmarks.study.data.glyphs import CHARACTERS, make_glyphs
from train.quickstart.make_data import write_split

__all__ = ['make_characters', 'make_letters', 'make_teacher_images']

# Noise does not compress: with 256 levels of grey the images would be twice as large.
_GREY_LEVELS = 16


def make_letters(fonts: Path, output: Path) -> None:
    """Write the 26 small letters in 16 levels of grey: 32 of each to train on, 20 to validate on, 50 to test on."""
    per_class = {'train': 32, 'validation': 20, 'test': 50}
    make_characters(fonts, output, [c for c in CHARACTERS[62] if c.islower()], per_class, _GREY_LEVELS)


def make_teacher_images(fonts: Path, output: Path) -> None:
    """Write the 36 capitals and digits of the same fonts: 200 of each to train on, 100 to validate and to test on."""
    per_class = {'train': 200, 'validation': 100, 'test': 100}
    make_characters(fonts, output, [c for c in CHARACTERS[62] if not c.islower()], per_class, 256)


def make_characters(
    fonts: Path, output: Path, characters: Sequence[str], per_class: dict[str, int], grey_levels: int
) -> None:
    """Write `train`, `validation` and `test` images of some of the 62 characters, which become the classes.

    Args:
        fonts: Folder of OTF and TTF files, at any depth.
        output: Folder to write, created if needed.
        characters: The characters; the number of a class is the place of its character.
        per_class: Images of each character by split, the first that `make_glyphs` makes with seed 0.
        grey_levels: Levels of grey, evenly spaced from black to white.
    """
    labels = [characters.index(c) if c in characters else -1 for c in CHARACTERS[62]]
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        evaluated = max(per_class['validation'], per_class['test'])
        make_glyphs(fonts, Path(folder), 62, per_class['train'], evaluated)
        for split, count in per_class.items():
            (path,) = Path(folder).rglob(f'{split}-*.parquet')
            # Rows take turns through the classes.
            rows = pq.read_table(path).slice(0, 62 * count)
            kept = [row for row in range(len(rows)) if labels[row % 62] >= 0]
            images = [np.asarray(Image.open(io.BytesIO(rows['image'][row]['bytes'].as_py()))) for row in kept]
            step = 255 / (grey_levels - 1)
            grey = np.rint(np.rint(np.stack(images) / step) * step).astype(np.uint8)
            write_split(output / path.name, grey, np.array([labels[row % 62] for row in kept]), list(characters))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--fonts', type=Path, required=True, help='folder of OTF and TTF files, at any depth')
    parser.add_argument('--output', type=Path, required=True, help='folder for the parquet files')
    parser.add_argument('--teacher', action='store_true', help='make the images of the teacher: capitals and digits')
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    (make_teacher_images if args.teacher else make_letters)(args.fonts, args.output)


if __name__ == '__main__':
    main()
