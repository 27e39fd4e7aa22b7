"""Data as people have it: splits in any spelling and nesting, hidden folders, links, names that are not UTF-8."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from torchvision.datasets import ImageFolder

from timm_dfpt.data.datasets import DataSplits, load_splits
from timm_dfpt.data.fingerprint import describe_data


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path_factory.mktemp('cache'))


def fill(root: Path, *folders: str, count: int = 3) -> Path:
    """Images, no two the same, in each of the folders."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            fill.number += 1
            pixels = np.random.default_rng(fill.number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
            PILImage.fromarray(pixels).save(root / folder / f'{i}.png')
    return root


fill.number = 0


def sizes(splits: DataSplits) -> dict[str, int]:
    return {
        role: len(split)
        for role, split in (('train', splits.train), ('val', splits.val), ('test', splits.test))
        if split is not None
    }


def crossed(*splits: str, inside: str = '') -> list[str]:
    return [f'{split}/{inside}{name}' for split in splits for name in 'ab']


# Folders, arguments, number of images in each split (of 3 a folder), 'a' and 'b' being the classes.
LAYOUTS = {
    'Training and Testing': (crossed('Training', 'Testing'), {}, (4, 2, 6)),
    'capitals': (crossed('TRAIN', 'Valid', 'Test'), {}, (6, 6, 6)),
    'sets': (crossed('train_set', 'testset', 'val-set'), {}, (6, 6, 6)),
    'years': (crossed('train2017', 'val2017'), {}, (6, 6)),
    'numbers and words': (crossed('1. Train Images', '2. Test Images'), {}, (4, 2, 6)),
    'evaluation': (crossed('training', 'evaluation'), {}, (6, 6)),
    'dev and eval': (crossed('train', 'dev', 'eval'), {}, (6, 6, 6)),
    'eval and test': (crossed('train', 'eval', 'test'), {}, (6, 6, 6)),
    'trainval': (crossed('trainval', 'test'), {}, (4, 2, 6)),
    'two folders around them': (crossed('dogs/dogs/Train', 'dogs/dogs/Val'), {}, (6, 6)),
    'a folder between': (crossed('train', 'val', inside='images/'), {}, (6, 6)),
    'splits in classes': ([f'{name}/{split}' for name in 'ab' for split in ('Train', 'Val')], {}, (6, 6)),
    'a folder around classes': (['photos/a', 'photos/b'], {}, (4, 2)),
    'test images without labels': ([*crossed('train'), 'test'], {}, (4, 2)),
    'others, named': (crossed('train', 'val', 'samples'), {'train_split': 'train', 'val_split': 'val'}, (6, 6)),
    'one named, one usual': (crossed('train', 'samples'), {'val_split': 'samples'}, (6, 6)),
    'unusual, named': (crossed('x', 'y'), {'train_split': 'x', 'val_split': 'y'}, (6, 6)),
    'deep, named': (crossed('1/x', '1/y', '2'), {'train_split': '1/x', 'val_split': '1/y'}, (6, 6)),
    'test images and classes': (['a', 'b', *crossed('test')], {'train_split': '.', 'test_split': 'test'}, (4, 2, 6)),
    'classes with folders of the same names': (
        ['a/old', 'a/new', 'b/old', 'b/new'], {'train_split': '.'}, (10, 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', LAYOUTS)
def test_layouts(tmp_path: Path, name: str) -> None:
    folders, arguments, counts = LAYOUTS[name]
    splits = load_splits(str(fill(tmp_path, *folders)), **arguments)
    assert splits.class_names == ['a', 'b']
    roles = ('train', 'val', 'test')[: len(counts)]
    assert sizes(splits) == dict(zip(roles, counts, strict=True))


# Folders and what looks strange.
UNCLEAR = {
    'samples': (crossed('train', 'val', 'samples'), r"\['train', 'val'\] look like splits and \['samples'\] do not"),
    'flat samples': ([*crossed('Train', 'Val'), 'samples'], r"\['Train', 'Val'\] look like .* \['samples'\] do not"),
    'test images and classes': (['a', 'b', *crossed('test')], r"\['test'\] look like .*\['a', 'b'\] do not"),
    'splits without classes': (['train', 'test'], 'look like splits and hold no class folders'),
    'splits in some classes': (['a/train', 'a/test', 'b'], r"\['a'\] hold folders that look like splits"),
    'unusual names': (crossed('summer', 'winter'), r"\['summer', 'winter'\] hold folders of the same names"),
    'unusual names and another': ([*crossed('x', 'y'), 'z'], r"\['x', 'y'\] hold folders of the same names"),
}


@pytest.mark.parametrize('name', UNCLEAR)
def test_unclear_layouts_are_refused(tmp_path: Path, name: str) -> None:
    folders, message = UNCLEAR[name]
    with pytest.raises(ValueError, match=f'{message}.*--train-split.*--val-split') as error:
        load_splits(str(fill(tmp_path, *folders)))
    assert '\n' not in str(error.value)


def test_empty_and_doubtful_splits_are_refused(tmp_path: Path) -> None:
    (fill(tmp_path / '1', *crossed('train')) / 'val').mkdir()
    with pytest.raises(ValueError, match="split 'val': .* holds no class folders"):
        load_splits(str(tmp_path / '1'))
    with pytest.raises(ValueError, match=r"\['val', 'validation'\] could both be .*--val-split"):
        load_splits(str(fill(tmp_path / '2', *crossed('train', 'val', 'validation'))))


def test_hidden_files_and_links_count_once(tmp_path: Path, caplog) -> None:
    root = fill(tmp_path / 'data', *crossed('train', 'val'))
    before = sizes(load_splits(str(root)))
    fill(root, 'train/a/.ipynb_checkpoints', 'train/@eaDir', '__MACOSX/train/a', '.git', 'val/a/.thumbnails/b')
    shutil.copy(root / 'train' / 'a' / '0.png', root / 'train' / 'a' / '._0.png')
    assert sizes(load_splits(str(root))) == before
    assert not caplog.text
    os.symlink(root / 'train' / 'a' / '0.png', root / 'train' / 'a' / 'link.png')
    os.symlink(root, root / 'train' / 'a' / 'everything')
    assert sizes(load_splits(str(root))) == before
    assert '1 links' in caplog.text
    os.symlink(root / 'train' / 'a', root / 'train' / 'newest')
    with pytest.raises(ValueError, match='are the same file through links, in two classes'):
        load_splits(str(root))


def test_copies_on_both_sides_of_a_split_are_counted(tmp_path: Path, caplog) -> None:
    root = fill(tmp_path / 'data', *crossed('train', 'val', 'test'))
    for number in range(2):
        shutil.copy(root / 'train' / 'a' / f'{number}.png', root / 'val' / 'b' / f'copy{number}.png')
    os.symlink(root / 'train' / 'b' / '0.png', root / 'test' / 'b' / 'link.png')
    load_splits(str(root))
    assert "2 of 8 images of split 'val' are also in the training split" in caplog.text
    assert "1 of 7 images of split 'test' are also in the training split" in caplog.text
    assert len(caplog.records) == 2


def test_names_that_are_not_utf8(tmp_path: Path, caplog) -> None:
    root = fill(tmp_path / 'data', 'a', 'b')
    folder = os.fsencode(root)
    os.rename(folder + b'/a/0.png', folder + b'/a/caf\xe9.png')
    os.rename(folder + b'/b', folder + b'/b\xe9')
    splits = load_splits(str(root))
    assert splits.class_names == ['a', r'b\xe9']
    assert 'not valid UTF-8' in caplog.text
    found = sorted(map(os.fsencode, splits.train.encoded(range(4)) + splits.val.encoded(range(2))))
    assert found == sorted(folder + name for name in (
        b'/a/1.png', b'/a/2.png', b'/a/caf\xe9.png', b'/b\xe9/0.png', b'/b\xe9/1.png', b'/b\xe9/2.png'
    ))  # fmt: skip
    Path(os.fsdecode(folder + b'/a/caf\xe9.png')).write_bytes(b'')
    with pytest.raises(ValueError, match=r'caf\\xe9.png .*0 bytes'):
        load_splits(str(root))
    os.rename(folder, folder + b'\xe9')
    with pytest.raises(ValueError, match='path is not valid UTF-8'):
        load_splits(os.fsdecode(folder + b'\xe9'))


def csv(folder: Path, *rows: str) -> None:
    (folder / 'metadata.csv').write_text('\n'.join(rows))


def with_csv(root: Path) -> Path:
    csv(fill(root, '.', count=4), 'file_name,label', *(f'{i}.png,{"ab"[i % 2]}' for i in range(4)))
    return root


def with_csv_of_integers(root: Path) -> Path:
    csv(fill(root, 'images', count=4), 'file_name,kind,site', *(f'images/{i}.png,{i % 2},x' for i in range(4)))
    return root


def with_jsonl_by_split(root: Path) -> Path:
    fill(root, 'Train', 'Test', count=4)
    for split in ('Train', 'Test'):
        lines = [json.dumps({'file_name': f'{i}.png', 'label': 'ab'[i % 2], 'text': 'x'}) for i in range(4)]
        (root / split / 'metadata.jsonl').write_text('\n'.join(lines))
    return root


def with_csv_above_splits(root: Path) -> Path:
    rows = [f'{split}/{i}.png,{"ab"[i % 2]}' for split in ('train', 'val') for i in range(4)]
    csv(fill(root, 'train', 'val', count=4), 'file_name,label', *rows)
    return root


def with_captions(root: Path) -> Path:
    csv(fill(root, 'a', 'b'), 'file_name,text', 'a/0.png,an image')
    return root


METADATA = {
    'csv': (with_csv, {}, {'train': 2, 'val': 2}),
    'csv, target_key': (with_csv_of_integers, {'target_key': 'kind'}, {'train': 2, 'val': 2}),
    'jsonl by split': (with_jsonl_by_split, {}, {'train': 2, 'val': 2, 'test': 4}),
    'csv above splits': (with_csv_above_splits, {}, {'train': 4, 'val': 4}),
    'captions of class folders': (with_captions, {}, {'train': 4, 'val': 2}),
}


@pytest.mark.parametrize('name', METADATA)
def test_metadata_files(tmp_path: Path, name: str) -> None:
    make, arguments, counts = METADATA[name]
    splits = load_splits(str(make(tmp_path / 'data')), **arguments)
    assert sizes(splits) == counts
    assert splits.class_names == (['0', '1'] if arguments else ['a', 'b'])
    for split in filter(None, (splits.train, splits.val, splits.test)):
        for file, label in zip(split.encoded(range(len(split))), split.labels.tolist(), strict=True):
            by_folder = name == 'captions of class folders'
            assert label == (['a', 'b'].index(Path(file).parent.name) if by_folder else int(Path(file).stem) % 2)


def test_metadata_files_are_checked(tmp_path: Path, caplog) -> None:
    root = with_csv(tmp_path / 'data')
    csv(root, 'file_name,label', '0.png,a', '1.png,b', '2.png,a', '3.png,b')
    fill(root, 'more', count=2)
    load_splits(str(root))
    assert '2 images of' in caplog.text
    for rows, message in (
        (['file_name,label', '0.png,a', '9.png,b'], "names '9.png', which is not in its folder"),
        (['file_name,label', '0.png,a', '../data/1.png,b'], 'which is not in its folder'),
        (['image,label', '0.png,a'], "no column 'file_name'"),
        (['file_name,label', '0.png'], 'could not be read'),
        (['file_name,label,kind', '0.png,,x', '1.png,b,x'], "class without a name .*--target-key"),
    ):
        csv(root, *rows)
        with pytest.raises(ValueError, match=message):
            load_splits(str(root))


def table(rows: int) -> Dataset:
    pixels = np.random.default_rng(rows).integers(0, 256, (rows, 4, 5, 3), np.uint8)
    images = [PILImage.fromarray(image) for image in pixels]
    features = Features({'image': Image(), 'label': ClassLabel(names=['a', 'b'])})
    return Dataset.from_dict({'image': images, 'label': [i % 2 for i in range(rows)]}, features=features)


def saved(root: Path) -> None:
    table(6).save_to_disk(root)


def saved_dict(root: Path) -> None:
    DatasetDict(train=table(6), test=table(4)).save_to_disk(root)


def saved_splits(root: Path) -> None:
    table(6).save_to_disk(root / 'Training')
    table(4).with_format('numpy').save_to_disk(root / 'Validation')


def parquet_folders(root: Path) -> None:
    for name, rows in (('Training', 6), ('Testing', 4)):
        (root / 'data' / name).mkdir(parents=True)
        table(rows).to_parquet(root / 'data' / name / '0.parquet')


def parquet_shards(root: Path) -> None:
    root.mkdir()
    for name, rows in (('Train-00000-of-00002', 6), ('Train-00001-of-00002', 4), ('Val-00000-of-00001', 2), ('x', 8)):
        table(rows).to_parquet(root / f'{name}.parquet')


TABLES = {
    'saved': (saved, {'train': 4, 'val': 2}),
    'saved dict': (saved_dict, {'train': 4, 'val': 2, 'test': 4}),
    'saved splits': (saved_splits, {'train': 6, 'val': 4}),
    'parquet folders': (parquet_folders, {'train': 4, 'val': 2, 'test': 4}),
    'parquet shards': (parquet_shards, {'train': 10, 'val': 2}),
}


@pytest.mark.parametrize('name', TABLES)
def test_tables(tmp_path: Path, name: str) -> None:
    make, counts = TABLES[name]
    make(tmp_path / 'data')
    splits = load_splits(str(tmp_path / 'data'))
    assert splits.class_names == ['a', 'b']
    assert sizes(splits) == counts
    assert all(split is None or isinstance(split.encoded([0])[0], bytes) for split in (splits.val, splits.test))


def test_a_damaged_saved_dataset_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / 'data')
    next((tmp_path / 'data').glob('*.arrow')).write_bytes(b'x')
    with pytest.raises(ValueError, match='could not be read: .*save it again'):
        load_splits(str(tmp_path / 'data'))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch) -> None:
    parquet_folders(tmp_path / 'data')
    (tmp_path / 'file').touch()
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path / 'file' / 'datasets')
    with pytest.raises(PermissionError, match='is not writable: set .*HF_HOME'):
        load_splits(str(tmp_path / 'data'))


def test_many_files_are_neither_opened_nor_put_into_a_table(tmp_path, monkeypatch) -> None:
    """Nothing in them could be read; their names, of any bytes, come back as they are, in any selection."""
    monkeypatch.setattr('timm_dfpt.data.datasets.SMALL', 20)
    monkeypatch.setattr('timm_dfpt.data.fingerprint.SMALL', 5)
    monkeypatch.setitem(sys.modules, 'datasets', None)
    expected: dict[str, list[str]] = {}
    for split in ('train', 'val'):
        for label, parts in (('a', ('', 'x/y', 'é')), ('b', ('',))):
            for part in parts:
                folder = tmp_path / split / label / part
                folder.mkdir(parents=True, exist_ok=True)
                for name in (b'9.png', b'10.JPG', b'\xe9.jpeg', 'ü x.webp'.encode(), b'.hidden.png'):
                    (folder / os.fsdecode(name)).touch()
        expected[split] = [file for file, _ in ImageFolder(str(tmp_path / split)).samples if '/.' not in file]
    splits = load_splits(str(tmp_path))
    assert not splits.checked
    for split in (splits.train, splits.val):
        assert split.encoded(range(len(split))) == expected[split.name]
        assert split.select([5, 0, 3]).encoded([2, 1]) == [expected[split.name][3], expected[split.name][0]]
        assert split.labels.tolist() == [int('/b/' in file) for file in expected[split.name]]
    before = describe_data(splits)
    moved = shutil.move(tmp_path / 'train' / 'b' / '9.png', tmp_path / 'train' / 'a' / 'x')
    assert describe_data(load_splits(str(tmp_path)))['training images'] != before['training images']
    shutil.move(moved, tmp_path / 'train' / 'b')
    assert describe_data(load_splits(str(tmp_path))) == before
