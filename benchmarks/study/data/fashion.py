"""Make the study's Fashion-MNIST: all 70,000 images as parquet, in the layout of `datasets`.

The source is the four idx files of the official distribution, for instance from Debian's package, which need not be
installed:

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb fashion
    python -m benchmarks.study.data.fashion --source fashion/usr/share/datasets/fashion-mnist --output DIR

The 60,000 official training images are split into 50,000 for training and 10,000 for validation, every class equally
frequent in both; the test split is the official one. Rows keep the official order, which is shuffled, so that a slice
such as `train[:10000]` is a random subset.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train.quickstart.make_data import read_idx, stratified, write_split

__all__ = ['make_fashion']


def make_fashion(source: Path, output: Path, seed: int = 0, train_count: int | None = None) -> None:
    """Write `train`, `validation` and `test` as one parquet file each.

    Args:
        source: Folder of the four idx.gz files.
        output: Folder to write, created if needed; `datasets.load_dataset(str(output))` reads it.
        seed: Seed of the choice of the validation images.
        train_count: Keep only so many training images, every class equally often; all 50,000 if not given.

    Raises:
        FileNotFoundError: If `source` lacks one of the files.
        ValueError: If a file is not an idx file.
    """
    train_images = read_idx(source / 'train-images-idx3-ubyte.gz')
    train_labels = read_idx(source / 'train-labels-idx1-ubyte.gz')
    test_images = read_idx(source / 't10k-images-idx3-ubyte.gz')
    test_labels = read_idx(source / 't10k-labels-idx1-ubyte.gz')
    train, validation = stratified(train_labels, [len(train_labels) * 5 // 6, len(train_labels) // 6], seed)
    if train_count is not None:
        (kept,) = stratified(train_labels[train], [train_count], seed)
        train = train[kept]
    output.mkdir(parents=True, exist_ok=True)
    write_split(output / 'train-00000-of-00001.parquet', train_images[train], train_labels[train])
    write_split(output / 'validation-00000-of-00001.parquet', train_images[validation], train_labels[validation])
    write_split(output / 'test-00000-of-00001.parquet', test_images, test_labels)


def main() -> None:
    """Command line of `make_fashion`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--source', type=Path, required=True, help='folder of the four idx.gz files')
    parser.add_argument('--output', type=Path, required=True, help='folder for the parquet files')
    parser.add_argument('--seed', type=int, default=0, help='seed of the choice of the validation images')
    parser.add_argument('--train-images', type=int, help='keep so many training images (default: all 50,000)')
    args = parser.parse_args()
    make_fashion(args.source, args.output, args.seed, args.train_images)


if __name__ == '__main__':
    main()
