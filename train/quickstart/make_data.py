"""Make the quickstart dataset: a stratified subset of Fashion-MNIST as parquet, in the layout of `datasets`.

The source is the four idx files of the official distribution, for instance from Debian's package:

    apt-get install dataset-fashion-mnist
    python train/quickstart/make_data.py

The choice of images is a function of `--seed` alone and the pixels are the official ones; the PNG bytes around them may
differ between versions of Pillow's zlib.
"""

from __future__ import annotations

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import ClassLabel, Features, Image
from PIL import Image as PILImage

# The names of the official README, in the order of the label numbers.
CLASS_NAMES = [
    'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot',
]  # fmt: skip


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes.

    Args:
        path: A file such as `train-images-idx3-ubyte.gz`.

    Returns:
        uint8 array, `[N]` for labels, `[N, 28, 28]` for images.

    Raises:
        ValueError: If the file is not an idx file of unsigned bytes or is cut short.
    """
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b'\x00\x00\x08':
        raise ValueError(f'{path} is not an idx file of unsigned bytes')
    shape = np.frombuffer(data, '>u4', count=data[3], offset=4).astype(int)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != shape.prod():
        raise ValueError(f'{path} holds {values.size} values, its header promises {shape.prod()}')
    return values.reshape(shape)


def stratified(labels: np.ndarray, counts: list[int], seed: int) -> list[np.ndarray]:
    """Draw disjoint subsets in which every class is equally frequent.

    Args:
        labels: Class numbers `[N]`.
        counts: Size of each subset, a multiple of the number of classes.
        seed: Seed of the choice.

    Returns:
        For each subset the chosen rows, in ascending order.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    parts: list[list[np.ndarray]] = [[] for _ in counts]
    for label in range(len(CLASS_NAMES)):
        rows = rng.permutation(np.flatnonzero(labels == label))
        start = 0
        for part, count in zip(parts, counts, strict=True):
            size = count // len(CLASS_NAMES)
            part.append(rows[start : start + size])
            start += size
    return [np.sort(np.concatenate(part)) for part in parts]


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode a grey image `[H, W]` (uint8) as the smallest PNG that Pillow can write."""
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format='png', optimize=True)
    return buffer.getvalue()


def write_split(path: Path, images: np.ndarray, labels: np.ndarray, names: list[str] = CLASS_NAMES) -> None:
    """Write grey images `[N, H, W]` and labels `[N]` of named classes as one parquet file."""
    # The schema carries the features in its metadata, which is how `datasets` knows images from bytes when it reads.
    schema = Features({'image': Image(), 'label': ClassLabel(names=names)}).arrow_schema
    rows = {'image': [{'bytes': encode_png(image), 'path': None} for image in images], 'label': labels}
    table = pa.Table.from_pydict(rows, schema=schema)
    pq.write_table(table, path, compression='zstd', compression_level=19, use_dictionary=False)
    print(f'{path}: {len(labels)} images, {path.stat().st_size / 1e6:.2f} MB')


def main() -> None:
    """Read the official files, choose the rows, write three parquet files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--source',
        type=Path,
        default=Path('/usr/share/datasets/fashion-mnist'),
        help='folder of the four idx gz files (default: where the Debian package puts them)',
    )
    parser.add_argument('--output', type=Path, default=Path(__file__).parent / 'data', help='folder for the parquet')
    parser.add_argument('--seed', type=int, default=0, help='seed of the choice of images')
    args = parser.parse_args()
    if not (args.source / 'train-images-idx3-ubyte.gz').is_file():
        parser.error(f'--source {args.source}: no train-images-idx3-ubyte.gz there; install dataset-fashion-mnist')

    images = read_idx(args.source / 'train-images-idx3-ubyte.gz')
    labels = read_idx(args.source / 'train-labels-idx1-ubyte.gz')
    train, validation = stratified(labels, [10_000, 2_000], args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    write_split(args.output / 'train-00000-of-00001.parquet', images[train], labels[train])
    write_split(args.output / 'validation-00000-of-00001.parquet', images[validation], labels[validation])
    write_split(
        args.output / 'test-00000-of-00001.parquet',
        read_idx(args.source / 't10k-images-idx3-ubyte.gz'),
        read_idx(args.source / 't10k-labels-idx1-ubyte.gz'),
    )


if __name__ == '__main__':
    main()
