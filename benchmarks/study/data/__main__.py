"""Make all datasets that `study.yaml` names from two of Debian's packages, which need not be installed.

    apt-get download texlive-fonts-extra dataset-fashion-mnist
    dpkg -x texlive-fonts-extra_*.deb fonts && dpkg -x dataset-fashion-mnist_*.deb fashion
    python -m benchmarks.study.data --fonts fonts --fashion fashion --output DIR/data

Every byte follows from the packages: the same fonts give the same images.
"""
from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.data.fashion import make_fashion
from benchmarks.study.data.glyphs import make_glyphs

_IDX = 'train-images-idx3-ubyte.gz'


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--fonts', type=Path, required=True, help='folder of OTF and TTF files, at any depth')
    parser.add_argument('--fashion', type=Path, required=True, help='folder of the idx.gz files, at any depth')
    parser.add_argument('--output', type=Path, required=True, help='folder of the datasets')
    args = parser.parse_args(argv)
    found = next(args.fashion.rglob(_IDX), None)
    if found is None:
        parser.error(f'--fashion {args.fashion}: there is no {_IDX} in it; unpack dataset-fashion-mnist there')
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    make_fashion(found.parent, args.output / 'fashion')
    make_fashion(found.parent, args.output / 'fashion2k', train_count=2000)
    make_glyphs(args.fonts, args.output / 'glyphs32', train_per_class=32)
    make_glyphs(args.fonts, args.output / 'glyphs-upright', train_per_class=200, plain=True)


if __name__ == '__main__':
    main()
