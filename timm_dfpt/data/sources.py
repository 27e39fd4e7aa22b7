"""Where images come from: a folder of class folders, parquet files or the Hub, opened with `datasets` by split."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, make_dataset

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ['SPLIT_NAMES', 'open_dataset']

_logger = logging.getLogger(__name__)

# What the splits are called in the wild, the usual name first.
SPLIT_NAMES = {
    'train': ('train', 'training'),
    'val': ('validation', 'val', 'valid', 'dev'),
    'test': ('test', 'testing'),
}


def open_dataset(
    dataset: str,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    named_splits: tuple[str, ...] = (),
) -> dict[str, Dataset]:
    """Open a data set, whatever it is, as one `datasets.Dataset` per split.

    Args:
        dataset: A local folder of class folders, with or without split folders (`train`, `val`, ...) above them; a
            local parquet file, or a folder of them in the layout of `datasets`; else the id of a data set on the Hub.
        config_name: Configuration of a Hub or parquet data set that has several.
        revision: Revision on the Hub.
        named_splits: Names that the user gave to splits; they mark folders of these names as split folders.

    Returns:
        Split name to data set. Images of a folder are referred to by path, class names are those of all its splits.

    Raises:
        FileNotFoundError: If `dataset` neither exists here nor on the Hub.
        ValueError: If a folder holds no classes, a class folder is empty, or the data set cannot be read.
    """
    path = Path(dataset).expanduser()
    if not path.exists():
        if dataset.startswith(('.', '/', '~', '\\')) or dataset.count('/') > 1 or dataset.endswith('.parquet'):
            raise FileNotFoundError(f'dataset={dataset!r}: no such file or folder')
        return _load(dataset, config_name, revision=revision)
    if revision is not None:
        raise ValueError(f'revision={revision!r} is for a data set on the Hub, and {dataset!r} is a local one')
    if path.is_file():
        if path.suffix != '.parquet':
            raise ValueError(f'dataset={dataset!r}: a single file must be parquet (*.parquet)')
        return {'train': _read_parquet(path)}
    if any(path.glob('*.parquet')) or any(path.glob('*/*.parquet')):
        if glob.escape(str(path)) != str(path):
            raise ValueError(f'dataset={dataset!r}: `datasets` takes [, ] and * for wildcards; rename the folder')
        _check_same_classes(path)
        return _load(str(path), config_name, cache_dir=_cache_of(path))
    if config_name is not None:
        raise ValueError(f'config_name={config_name!r}: {dataset!r} is a folder of images, which has no configurations')
    return _open_folder(path, named_splits)


def _load(path: str, config_name: str | None, **kwargs: object) -> dict[str, Dataset]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        splits = load_dataset(path, config_name, **kwargs)
    except (DatasetNotFoundError, ConnectionError) as error:
        message = f'dataset={path!r} is no local file or folder and could not be loaded from the Hub: {error}'
        raise FileNotFoundError(message) from error
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        raise ValueError(f'dataset={path!r} could not be read: {error}') from error
    return {str(name): split for name, split in splits.items()}


def _cache_of(path: Path) -> str:
    """Return a cache folder for the files as they are now.

    For a folder whose card names its files, `datasets` takes the path alone for the key, and goes on giving what lay
    there when it first looked.
    """
    import datasets

    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob('*') if file.is_file()):
        status = file.stat()
        digest.update(os.fsencode(f'{file.relative_to(path)}\0{status.st_size}\0{status.st_mtime_ns}\0'))
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f'local-{digest.hexdigest()[:16]}')


def _read_parquet(path: Path) -> Dataset:
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    try:
        # `load_dataset('parquet')` would do the same and report the use of its module to the Hub.
        return Dataset.from_parquet(glob.escape(str(path)))
    except (DatasetsError, ValueError) as error:
        raise ValueError(f'dataset={str(path)!r} could not be read: {error}') from error


def _check_same_classes(path: Path) -> None:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
    from datasets import ClassLabel, Features

    seen: dict[str, tuple[list[str], Path]] = {}
    for file in sorted(path.rglob('*.parquet')):
        try:
            features = Features.from_arrow_schema(pq.read_schema(file))
        except (OSError, ValueError) as error:
            raise ValueError(f'{str(file)!r} could not be read: {error}') from error
        for column, feature in features.items():
            if isinstance(feature, ClassLabel):
                names, first = seen.setdefault(column, (feature.names, file))
                # `datasets` takes the names of one file for all, and would give the others wrong ones in silence.
                if names != feature.names:
                    raise ValueError(f'the classes of {column!r} differ between {str(first)!r} and {str(file)!r}')


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith('.'))


def _open_folder(path: Path, named_splits: tuple[str, ...]) -> dict[str, Dataset]:
    folders = _folders(path)
    known = {name for names in SPLIT_NAMES.values() for name in names}
    # Classes may be called like splits ("train" is a vehicle too), hence all of the folders must be splits.
    has_splits = bool(folders) and (
        bool(set(named_splits) & set(folders))
        or (set(folders) <= known and any(_folders(path / name) for name in folders))
    )
    splits = {name: path / name for name in folders} if has_splits else {'train': path}
    classes = sorted({name for split in splits.values() for name in _folders(split)})
    if not classes:
        raise ValueError(f'dataset={str(path)!r}: expected one sub folder of images per class, found none')
    return {name: _read_folder(split, classes) for name, split in splits.items()}


def _read_folder(path: Path, classes: list[str]) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Image

    others: list[str] = []

    def is_image(file: str) -> bool:
        taken = has_file_allowed_extension(file, IMG_EXTENSIONS)
        if not taken and not os.path.basename(file).startswith('.'):
            others.append(file)
        return taken

    numbers = {name: i for i, name in enumerate(classes)}
    samples = make_dataset(str(path), numbers, is_valid_file=is_image, allow_empty=True)
    filled = {label for _, label in samples}
    empty = [name for i, name in enumerate(classes) if i not in filled and (path / name).is_dir()]
    if empty:
        raise ValueError(
            f'class folder {str(path / empty[0])!r} holds no image ({len(empty)} such folders); '
            f'add images ({", ".join(IMG_EXTENSIONS)}) or remove it'
        )
    if others:
        _logger.warning(
            '%d files in the class folders of %r are left out, the first is %r: convert them if they are images (%s)',
            len(others), str(path), min(others), ', '.join(IMG_EXTENSIONS),
        )  # fmt: skip
    names = [os.fsencode(name).decode(errors='replace') for name in classes]
    if names != classes:
        raise ValueError(f'{str(path)!r} has a class folder whose name is not UTF-8; rename it')
    features = Features({'image': Image(decode=False), 'label': ClassLabel(names=classes)})
    images = [{'bytes': None, 'path': file} for file, _ in samples]
    return Dataset.from_dict({'image': images, 'label': [label for _, label in samples]}, features=features)
