"""`timm-dfpt predict`: the most likely classes of images, as a table."""
from __future__ import annotations

import argparse
import contextlib
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.columns import find_image_column, images_of
from ..data.files import ImageFiles
from ..data.image_split import ImageSplit
from ..data.images import BadImageError, parse_color
from ..data.listing import list_folder
from ..data.paths import printable
from ..data.sources import open_dataset
from ..hub.files import atomic
from ..job.stopping import exit_code
from .arguments import at_least, new_file
from .classifiers import HELP, Classifier, open_classifier

__all__ = ['Prediction', 'find_images', 'main', 'predict']


class Prediction(NamedTuple):
    """What a model says of an image.

    Args:
        file: The image: its path, or split and row of a dataset.
        classes: The most likely classes, the first the most; none of an image that cannot be read.
        error: Why it cannot be read, empty if it can.
    """

    file: str
    classes: Sequence[tuple[str, float]] = ()
    error: str = ''


def find_images(names: Sequence[str], split: str | None = None, background: str | None = None) -> list[ImageSplit]:
    """Find images, in the order of the names.

    Args:
        names: Image files, folders, of which all images at any depth are taken, and datasets as `open_dataset` takes
            them.
        split: The split of datasets; all of them by default.
        background: Color behind transparent images.

    Raises:
        FileNotFoundError: If there is no such file, folder or dataset.
        ValueError: If a folder holds no images, a dataset has no such split, or the color is not one.
    """
    if background is not None:
        parse_color(background)
    found: list[tuple[str, Any]] = []
    for name in names:
        path = Path(name).expanduser()
        is_image = path.is_file() and path.suffix != '.parquet'
        listed = list_folder(str(path)) if path.is_dir() else None
        if split is not None and (is_image or (listed is not None and listed.filled)):
            raise ValueError(
                f'split={split!r} is for datasets in tables, and {name!r} is {"a file" if is_image else "a folder"}: '
                'leave --split out, or name the folder of the split.'
            )
        if is_image:
            found.append(('', ImageFiles([(str(path.parent), [path.name])])))
            continue
        if listed is not None and listed.filled:
            found.append(('', ImageFiles((folder.path, folder.images) for folder in listed.walk())))
            continue
        if listed is not None and not any(folder.others for folder in listed.walk()):
            raise ValueError(f'IMAGES: the folder {name!r} holds no image.')
        tables = open_dataset(
            name, named_splits={'train': None, 'val': None, 'test': None}, unlabelled=True
        )  # fmt: skip
        if split is not None and split not in tables:
            raise ValueError(f'split={split!r} is unknown; {name!r} has the splits {list(tables)}.')
        for title, table in tables.items():
            if split in (None, title):
                found.append((title, images_of(table, find_image_column(table, None))))
    return [
        ImageSplit(title, images, torch.full((_count(images),), -1), background) for title, images in found
    ]  # fmt: skip


def _count(images: Any) -> int:
    return len(images) if isinstance(images, ImageFiles) else len(images.dataset)


@torch.no_grad()
def predict(classifier: Classifier, splits: Sequence[ImageSplit], top_k: int, batch_size: int) -> Iterator[Prediction]:
    """Yield what a model says of images, in their order.

    Args:
        classifier: The model.
        splits: The images.
        top_k: Classes per image, at most as many as the model has.
        batch_size: Images that are run at a time.
    """
    device = next((p.device for p in classifier.module.parameters()), None) if classifier.module is not None else None
    for split in splits:
        images = classifier.images(split)
        for start in range(0, len(split), batch_size):
            rows = range(start, min(start + batch_size, len(split)))
            inputs: dict[int, torch.Tensor] = {}
            errors: dict[int, str] = {}
            for row in rows:
                try:
                    inputs[row] = images[row][0]
                except BadImageError as error:
                    # What is before the reason names the image, which has a column of its own.
                    errors[row] = ' '.join(str(error.__cause__ or error).split())
            classes: dict[int, list[tuple[str, float]]] = {}
            if inputs:
                logits = classifier.forward(torch.stack(list(inputs.values())).to(device))
                top = logits.float().softmax(dim=1).topk(top_k, dim=1)
                for row, shares, numbers in zip(inputs, top.values.tolist(), top.indices.tolist(), strict=True):
                    labels = [classifier.class_names[number] for number in numbers]
                    classes[row] = list(zip(labels, shares, strict=True))
            for row in rows:
                path = split.images.path(row)
                file = printable(path) if path and not split.name else f'{split.name}/{row}'
                yield Prediction(file, classes.get(row, ()), errors.get(row, ''))


def main(argv: Sequence[str] | None = None, program: str = 'timm-dfpt predict') -> int:
    """Predict from the command line.

    Args:
        argv: Arguments; `None` for those of the process.
        program: What the command was called as, for its help.

    Returns:
        The exit code: 0, 1 after an error reported in one line, or 128 and the number of a signal to stop.
    """
    parser = argparse.ArgumentParser(
        program, allow_abbrev=False,
        description='Write the most likely classes of images, with their probabilities, as CSV. An image that cannot '
        'be read is a row with the reason in the column error.',
    )  # fmt: skip
    add = parser.add_argument
    add('model', metavar='MODEL', help=HELP)
    add('images', metavar='IMAGES', nargs='+', help='image files, folders (with all below), or datasets')
    add('--top-k', type=at_least(1), default=5, metavar='INT', help='classes per image (>= 1; default: 5)')
    add('--output', type=new_file, metavar='CSV', help='new file to write (default: the standard output)')
    add('--split', metavar='NAME', help='split of a dataset (default: all)')
    add('--batch-size', type=at_least(1), default=32, metavar='INT', help='images at a time (>= 1; default: 32)')
    add('--background', metavar='COLOR', help='color behind transparent images (default: as in training)')
    add('--revision', metavar='NAME', help='branch, tag or commit of a model on the Hub')
    add('--base-model', metavar='NAME', help='teacher of a prompt path, if not the one that it names')
    add('--cpu', action='store_true', help='run on the CPU even where there is a GPU')

    def job() -> None:
        args = parser.parse_args(argv)
        options: dict[str, Any] = {'revision': args.revision} if args.revision else {}
        classifier = open_classifier(args.model, args.base_model, **options)
        splits = find_images(args.images, args.split, args.background or classifier.background)
        cuda = torch.cuda.is_available() and not args.cpu
        classifier.to(torch.device('cuda' if cuda else 'cpu'))
        with contextlib.ExitStack() as stack:
            file: Any = sys.stdout
            if args.output:
                temporary = stack.enter_context(atomic(args.output))
                file = stack.enter_context(temporary.open('w', encoding='utf-8', newline=''))
            top_k = min(args.top_k, len(classifier.class_names))
            _write(file, predict(classifier, splits, top_k, args.batch_size), top_k)

    return exit_code(job, 'give the same command again')


def _write(file: Any, predictions: Iterator[Prediction], top_k: int) -> None:
    table = csv.writer(file)
    columns = [f'{kind}_{i}' for i in range(1, top_k + 1) for kind in ('label', 'probability')]
    table.writerow(['file', *columns, 'error'])
    bad = count = 0
    for file_name, classes, error in predictions:
        cells = [cell for label, share in classes for cell in (label, f'{share:.6f}')]
        table.writerow([file_name, *cells, *([''] * (2 * top_k - len(cells))), error])
        count += 1
        bad += bool(error)
    if bad:
        print(f'warning: {bad} of {count} images cannot be read, see the column error.', file=sys.stderr)

