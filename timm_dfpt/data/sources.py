"""Where images come from: a folder of images, `save_to_disk`, parquet files or the Hub, opened with `datasets`."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folders import open_folder
from .listing import Folder, list_folder
from .paths import is_hidden, printable, similar_path
from .splits import role_of

if TYPE_CHECKING:
    from datasets import Dataset

    from .files import FileTable

__all__ = ['open_dataset']

# What timm calls its readers of datasets that are read from their beginning to their end.
_HUB_STREAMS = ('hfds', 'hfids')
_STREAMS = (*_HUB_STREAMS, 'wds', 'tfds')
_PARQUET = '.parquet'
# What `datasets` calls the splits whose names it finds in those of files.
_USUAL = {'train': 'train', 'val': 'validation', 'test': 'test'}


def open_dataset(
    dataset: str,
    *,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    named_splits: Mapping[str, str | None],
    target_key: str | None = None,
    unlabelled: bool = False,
) -> Mapping[str, Dataset | FileTable]:
    """Open a dataset, whatever it is, as one table per split.

    Args:
        dataset: A local folder of images (see `open_folder`); a folder that `save_to_disk` has written, or of such
            folders by split; a local parquet file, or a folder of them in the layout of `datasets`; else the id of a
            dataset on the Hub.
        dataset_config: Configuration of a Hub or parquet dataset that has several.
        dataset_revision: Revision on the Hub.
        named_splits: For `train`, `val` and `test` the split that the user named, or `None`.
        target_key: Column of the labels, if the user named one.
        unlabelled: Whether a folder need not have class folders.

    Returns:
        Split name to table: of `datasets`, which a folder of images does without unless it has a metadata file. Paths
        in columns are as `pack_path` writes them.

    Raises:
        FileNotFoundError: If `dataset` neither exists here nor on the Hub.
        PermissionError: If `datasets` has no folder to write to.
        ValueError: If a folder holds no classes, a class folder is empty, or the dataset cannot be read.
    """
    path = Path(dataset).expanduser()
    if not path.exists():
        reader, _, rest = dataset.partition('/')
        if reader in _STREAMS and rest:
            raise ValueError(
                f"dataset={printable(dataset)!r}: timm's streaming readers are not supported, since exact resumption "
                'needs images by their index: give '
                f'{"the id of the dataset on the Hub" if reader in _HUB_STREAMS else "a folder of images or parquet"}, '
                'see "Data larger than a disk" in docs/DATA.md.'
            )
        if dataset.startswith(('.', '/', '~', '\\')) or dataset.count('/') > 1 or dataset.endswith('.parquet'):
            raise FileNotFoundError(
                f'dataset={printable(dataset)!r}: there is no such file or folder{similar_path(dataset, _PARQUET)}. '
                'Check the path, or give the id of a dataset on the Hub.'
            )
        _ask_hub(dataset, dataset_revision)
        return _load(dataset, dataset_config, revision=dataset_revision)
    if printable(str(path)) != str(path):
        raise ValueError(
            f'dataset={printable(str(path))!r}: the path is not valid UTF-8: rename the folder, or give a link to it.'
        )
    if dataset_revision is not None:
        raise ValueError(
            f'dataset_revision={dataset_revision!r} is for datasets on the Hub, and {dataset!r} is a local one: leave '
            '--dataset-revision out.'
        )
    if path.is_file():
        if path.suffix != '.parquet':
            raise ValueError(f'dataset={dataset!r}: a single file must be parquet (*.parquet).')
        return {'train': _read_parquet(path)}
    listed = list_folder(str(path))
    files = list(_parquet_files(path)) if _has_parquet(listed) else []
    if files:
        if glob.escape(str(path)) != str(path):
            raise ValueError(f'dataset={dataset!r}: `datasets` treats [, ] and * as wildcards: rename the folder.')
        _check_same_classes(files)
        data_files = None if dataset_config or _has_configs(path) else _files_by_split(path, files)
        return _load(str(path), dataset_config, cache_dir=_cache_of(path), data_files=data_files)
    if dataset_config is not None:
        raise ValueError(
            f'dataset_config={dataset_config!r}: {dataset!r} is a local folder without configurations: leave '
            '--dataset-config out.'
        )
    saved = _open_saved(listed)
    return saved if saved else open_folder(listed, named_splits, target_key, unlabelled)


def _load(path: str, config_name: str | None, **kwargs: Any) -> dict[str, Dataset]:
    from datasets import load_dataset  # costs 0.5 s
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    asked = f'dataset={path!r}'
    if kwargs.get('revision') is not None:
        asked += f' with --dataset-revision {kwargs["revision"]}'
    if config_name is not None:
        asked += f' with --dataset-config {config_name}'
    try:
        splits = load_dataset(path, config_name, **kwargs)
    except (DatasetNotFoundError, ConnectionError) as error:
        _check_cache()
        raise FileNotFoundError(
            f'{asked} is not a local file or folder{similar_path(path, _PARQUET)} and could not be loaded from the '
            f'Hub: {_one_line(error)}'
        ) from error
    except (DatasetsError, OSError, ValueError) as error:
        _check_cache()
        several = config_name is None and 'onfig name is missing' in str(error)
        hint = '; name one with --dataset-config' if several else ''
        raise ValueError(f'{asked} could not be read: {_one_line(error)}{hint}') from error
    return {str(name): split for name, split in splits.items()}


def _ask_hub(dataset: str, revision: str | None) -> None:
    """Ask the Hub once whether it has a dataset, which `datasets` asks six times where there is no answer.

    Raises:
        FileNotFoundError: If it has not, or there is neither an answer nor anything of it in the cache of `datasets`.
    """
    import datasets  # costs 0.5 s
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return
    problem = f'dataset={dataset!r} is not a local file or folder{similar_path(dataset, _PARQUET)}'
    try:
        HfApi(library_name='timm_dfpt').dataset_info(dataset, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except errors.HFValidationError as error:
        raise FileNotFoundError(f'{problem}, nor the id of a dataset on the Hub: {_one_line(error)}') from error
    except errors.RepositoryNotFoundError as error:
        if isinstance(error, errors.GatedRepoError):
            return
        raise FileNotFoundError(
            f'{problem}, and there is no such dataset on the Hub, or it is private: check the spelling, or log in with '
            '`hf auth login`.'
        ) from error
    except errors.HfHubHTTPError:
        return  # `datasets` knows what to say of it, or waits until the Hub is less busy
    except errors.HTTPError as error:
        if not Path(datasets.config.HF_DATASETS_CACHE, dataset.replace('/', '___')).is_dir():
            raise FileNotFoundError(
                f'{problem}, and the Hub cannot be asked for it: no answer from {constants.ENDPOINT} '
                f'({_one_line(error)}). Check the path, or the network.'
            ) from error


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split())


def _check_cache() -> None:
    """Raise what is behind an error of `datasets` if it has no folder to write to."""
    import datasets  # costs 0.5 s

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise PermissionError(
            f'{str(cache)!r}, the cache of `datasets`, is not writable: set the environment variable HF_HOME to a '
            'folder that is.'
        )


def _has_parquet(folder: Folder, depth: int = 3) -> bool:
    if any(name.endswith('.parquet') for name in folder.others):
        return True
    return depth > 1 and any(_has_parquet(each, depth - 1) for each in folder.folders.values())


def _parquet_files(path: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        parquet = [name for name in sorted(files) if name.endswith('.parquet') and not is_hidden(name)]
        yield from (Path(folder, name) for name in parquet if name != 'metadata.parquet')


def _has_configs(path: Path) -> bool:
    """Say whether the card of a dataset names its files."""
    card = path / 'README.md'
    return card.is_file() and re.search(r'^configs:', card.read_text(errors='replace'), re.MULTILINE) is not None


def _files_by_split(path: Path, files: list[Path]) -> dict[str, list[str]] | None:
    """Sort files by the names of splits in theirs, in any spelling; `None` where there are none."""
    splits: dict[str, list[str]] = {}
    found = False
    for file in files:
        relative = file.relative_to(path).with_suffix('')
        parts = [*relative.parts[:-1], *re.split(r'[-.]', relative.name), *re.split(r'[^A-Za-z]+', relative.name)]
        names = [part for part in parts if role_of(part)]
        found = found or bool(names)
        name = re.sub(r'\W+', '_', names[0] if names else relative.name)
        role = str(role_of(name))
        # As `datasets` calls them, which those who name a split expect; `eval` may be either.
        name = name if 'eval' in name.casefold() else _USUAL.get(role, name)
        splits.setdefault(name, []).append(glob.escape(str(file.relative_to(path))))
    order = [*_USUAL.values(), *sorted(splits)]
    return dict(sorted(splits.items(), key=lambda item: order.index(item[0]))) if found else None


def _is_saved(folder: Folder) -> bool:
    return {'state.json', 'dataset_info.json'} <= set(folder.others)


def _open_saved(listed: Folder) -> dict[str, Dataset] | None:
    """Open what `save_to_disk` has written, if it has."""
    whole = _is_saved(listed) or 'dataset_dict.json' in listed.others
    parts = {name: folder.path for name, folder in listed.folders.items() if _is_saved(folder)}
    if not (whole or parts):
        return None
    from datasets import Dataset, DatasetDict, load_from_disk  # costs 0.5 s
    from datasets.exceptions import DatasetsError

    try:
        if whole:
            loaded = load_from_disk(listed.path)
            splits: Mapping[Any, Dataset] = loaded if isinstance(loaded, DatasetDict) else {'train': loaded}
        else:
            splits = {name: Dataset.load_from_disk(path) for name, path in parts.items()}
    except (DatasetsError, OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f'dataset={listed.path!r} could not be read: {_one_line(error)}: save it again.') from error
    return {str(name): split.with_format(None) for name, split in splits.items()}


def _cache_of(path: Path) -> str:
    """Return a cache folder for the files as they are now.

    For a folder whose card names its files, `datasets` takes the path alone for the key, and keeps returning what was
    there when it was first read.
    """
    import datasets  # costs 0.5 s

    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob('*') if file.is_file()):
        status = file.stat()
        digest.update(os.fsencode(f'{file.relative_to(path)}\0{status.st_size}\0{status.st_mtime_ns}\0'))
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f'local-{digest.hexdigest()[:16]}')


def _read_parquet(path: Path) -> Dataset:
    from datasets import Dataset  # costs 0.5 s
    from datasets.exceptions import DatasetsError

    try:
        # `load_dataset('parquet')` would do the same and report the use of its module to the Hub.
        return Dataset.from_parquet(glob.escape(str(path)))
    except (DatasetsError, OSError, ValueError) as error:
        _check_cache()
        raise ValueError(f'dataset={str(path)!r} could not be read: {_one_line(error)}') from error


def _check_same_classes(files: list[Path]) -> None:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]  # costs 0.04 s
    from datasets import ClassLabel, Features

    seen: dict[str, tuple[list[str], Path]] = {}
    for file in files:
        try:
            features = Features.from_arrow_schema(pq.read_schema(file))
        except (OSError, ValueError) as error:
            raise ValueError(f'{str(file)!r} could not be read: {error}') from error
        for column, feature in features.items():
            if isinstance(feature, ClassLabel):
                names, first = seen.setdefault(column, (feature.names, file))
                # `datasets` takes the names of one file for all, and would give the others wrong ones in silence.
                if names != feature.names:
                    raise ValueError(
                        f'the classes of {column!r} differ between {str(first)!r} and {str(file)!r}: give all files '
                        'the same classes.'
                    )
