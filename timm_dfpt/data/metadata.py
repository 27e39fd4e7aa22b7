"""Folders of images whose labels are in a metadata file, as in the ImageFolder of `datasets`."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from .paths import pack_path, printable
from .splits import role_of

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ['LABEL_COLUMNS', 'find_metadata', 'open_metadata']

_logger = logging.getLogger(__name__)

LABEL_COLUMNS = ('label', 'labels', 'target', 'class')
_NAMES = ('metadata.csv', 'metadata.jsonl', 'metadata.parquet')
_FILE_COLUMN = 'file_name'


def find_metadata(
    names: Collection[str], folder: str | None = None, target_key: str | None = None, has_classes: bool = False
) -> str | None:
    """Return the name of the metadata file, if there is one with labels.

    Args:
        names: Names of the files in the folder.
        folder: The folder; `None` to use names only.
        target_key: Column of the labels, if the user named one.
        has_classes: Whether there are folders that could be classes, too: then the file must have a column of labels.
    """
    name = next((each for each in _NAMES if each in names), None)
    if name is None or folder is None:
        return name
    columns = _read(os.path.join(folder, name)).column_names
    labels = {target_key} if target_key else set(LABEL_COLUMNS)
    if has_classes and not labels & set(columns):
        message = '%s has no label column (it has %s): the class folders are used as labels'
        _logger.warning(message, printable(f'{folder}/{name}'), columns)
        return None
    return name


def open_metadata(folder: str, images: Collection[str], split_by_folder: bool = False) -> dict[str, Dataset]:
    """Open the images that a metadata file names.

    Args:
        folder: The folder of the file.
        images: All images in the folder, relative to it.
        split_by_folder: Take the folders of the images for splits, if all have the name of one.

    Returns:
        The column `image`, by path, and the columns of the file, by split: `train`, unless folders are splits.

    Raises:
        ValueError: If the file cannot be read, or names an image that is not there.
    """
    from datasets import Dataset, Features, Image  # costs 0.5 s

    name = find_metadata(os.listdir(folder))
    table = _read(os.path.join(folder, str(name)))
    files = [os.path.normpath(str(file)) for file in table.column(_FILE_COLUMN).to_pylist()]
    paths = [os.path.join(folder, file) for file in files]
    missing = [
        (file, path)
        for file, path in zip(files, paths, strict=True)
        if os.path.isabs(file) or file.split(os.sep)[0] == '..' or (file not in images and not os.path.isfile(path))
    ]
    where = printable(os.path.join(folder, str(name)))
    if missing:
        raise ValueError(
            f'{where!r} names {missing[0][0]!r}, which is not in its folder ({len(missing)} such rows): correct these '
            'rows, or add the images.'
        )
    unnamed = len(set(images) - set(files))
    if unnamed:
        _logger.warning('%d images of %r are not listed in %s and are ignored', unnamed, printable(folder), name)
    table = table.drop_columns(_FILE_COLUMN)
    features = Features({'image': Image(decode=False), **Features.from_arrow_schema(table.schema)})
    cells = [{'bytes': None, 'path': pack_path(path)} for path in paths]
    dataset = Dataset.from_dict({**table.to_pydict(), 'image': cells}, features=features)
    tops = [file.split(os.sep)[0] for file in files]
    if not split_by_folder or not all(map(role_of, tops)):
        return {'train': dataset}
    return {top: dataset.select([row for row, each in enumerate(tops) if each == top]) for top in sorted(set(tops))}


def _read(path: str) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped]  # costs 0.04 s
    import pyarrow.csv  # type: ignore[import-untyped]
    import pyarrow.json  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        if path.endswith('.csv'):
            table = pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(newlines_in_values=True))
        else:
            table = pa.json.read_json(path) if path.endswith('.jsonl') else pa.parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(f'{printable(path)!r} could not be read: {error}') from error
    if _FILE_COLUMN not in table.column_names:
        raise ValueError(
            f'{printable(path)!r} has no column {_FILE_COLUMN!r}, it has {table.column_names}; rename the one with '
            'the names of the images.'
        )
    return table
