"""Finding splits, columns and classes; refusing what cannot be trained on."""

import hashlib
import io
import json
import shutil
import socket
import string
import unicodedata
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from timm_dfpt.commands.predict import find_images
from timm_dfpt.data.datasets import DataSplits, load_split, load_splits
from timm_dfpt.data.fingerprint import dataset_fingerprint
from timm_dfpt.training.run import main

CARD = '''---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.parquet}
  - {split: validation, path: validation.parquet}
---
'''
QUICKSTART = Path(__file__).parents[2] / 'train' / 'quickstart'


def picture(number: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(number).integers(0, 256, (6, 7, 3), dtype=np.uint8))


def make_folder(root: Path, counts: dict[str, int], suffix: str = '.png') -> Path:
    """Class folders with that many images each, all different."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(hash((len(name), i)) % 2**32).save(root / name / f'{i}{suffix}')
    return root


def make_parquet(root: Path, **splits: dict[str, list]) -> Path:
    """A folder of parquet files; label columns are class labels if given as names."""
    root.mkdir(parents=True, exist_ok=True)
    for name, columns in splits.items():
        rows = len(columns['label'])
        features = {'image': Image(), 'label': columns.get('feature', Value('int64'))}
        data = {'image': [picture(i) for i in range(rows)], 'label': columns['label']}
        Dataset.from_dict(data, features=Features(features)).to_parquet(root / f'{name}.parquet')
    return root


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args: object) -> None:
        raise AssertionError(f'network access: {args}')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path_factory.mktemp('cache'))


def labels_by_name(splits: DataSplits, role: str) -> Counter:
    return Counter(splits.class_names[label] for label in getattr(splits, role).labels.tolist())


def test_quickstart_data(tmp_path, no_network) -> None:
    before = sorted(QUICKSTART.rglob('*'))
    splits = load_splits(str(QUICKSTART))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (10_000, 2_000, 10_000)
    assert splits.class_names[0] == 'T-shirt/top'
    assert splits.num_classes == 10
    assert splits.val_from == "split 'validation'"
    assert set(labels_by_name(splits, 'train').values()) == {1000}
    assert set(labels_by_name(splits, 'val').values()) == {200}
    held_out = set(splits.val.encoded(range(2000)))
    assert not held_out & set(splits.train.encoded(range(10_000)))
    assert not held_out & set(splits.test.encoded(range(10_000)))
    assert sorted(QUICKSTART.rglob('*')) == before


def test_new_classes_data(no_network) -> None:
    splits = load_splits(str(QUICKSTART.parent / 'quickstart_new_classes'))
    assert splits.class_names == list(string.ascii_lowercase)
    images = [set(part.encoded(range(len(part)))) for part in (splits.train, splits.val, splits.test)]
    assert [len(part) for part in images] == [26 * 32, 26 * 20, 26 * 50]
    assert len(set.union(*images)) == sum(map(len, images))
    for role, count in (('train', 32), ('val', 20), ('test', 50)):
        assert set(labels_by_name(splits, role).values()) == {count}


def test_folder_without_splits_is_split_by_class(tmp_path, no_network) -> None:
    root = make_folder(tmp_path / 'photos', {'cat': 20, 'dog': 11, 'owl': 2})
    before = sorted(tmp_path.rglob('*'))
    splits = load_splits(str(root), val_fraction=0.25, seed=3)
    assert splits.class_names == ['cat', 'dog', 'owl']
    assert splits.test is None
    assert labels_by_name(splits, 'val') == {'cat': 5, 'dog': 3, 'owl': 1}
    assert labels_by_name(splits, 'train') == {'cat': 15, 'dog': 8, 'owl': 1}
    assert '25.0%' in splits.val_from
    train, val = (split.encoded(range(len(split))) for split in (splits.train, splits.val))
    assert sorted(train + val) == sorted(str(path) for path in root.rglob('*.png'))
    for split, files in ((splits.train, train), (splits.val, val)):
        assert [Path(file).parent.name for file in files] == [splits.class_names[i] for i in split.labels]
    assert load_splits(str(root), val_fraction=0.25, seed=3).val.encoded(range(9)) == val
    assert load_splits(str(root), val_fraction=0.25, seed=4).val.encoded(range(9)) != val
    assert sorted(tmp_path.rglob('*')) == before


def test_folder_with_splits_matches_classes_by_name(tmp_path) -> None:
    make_folder(tmp_path / 'train', {'a': 2, 'b': 3, 'c': 4})
    make_folder(tmp_path / 'val', {'b': 2, 'c': 1})  # as numbers of its own, b would be 0
    make_folder(tmp_path / 'test', {'c': 3, 'a': 1})
    (tmp_path / '.cache').mkdir()
    splits = load_splits(str(tmp_path))
    assert labels_by_name(splits, 'train') == {'a': 2, 'b': 3, 'c': 4}
    assert labels_by_name(splits, 'val') == {'b': 2, 'c': 1}
    assert labels_by_name(splits, 'test') == {'c': 3, 'a': 1}


def test_classes_may_be_called_like_splits(tmp_path) -> None:
    make_folder(tmp_path / 'a', {'train': 4, 'bus': 4, 'test': 4})
    assert load_splits(str(tmp_path / 'a')).class_names == ['bus', 'test', 'train']
    make_folder(tmp_path / 'b', {'train': 4, 'test': 4})
    assert load_splits(str(tmp_path / 'b'), train_split='.').class_names == ['test', 'train']


def test_split_folders_of_any_name_when_named(tmp_path) -> None:
    for name in ('Sommer', 'Winter', 'Test'):
        make_folder(tmp_path / name, {'a': 3, 'b': 3})
    splits = load_splits(str(tmp_path), train_split='Sommer', val_split='Winter', test_split='Test')
    assert (splits.train.name, splits.val.name, splits.test.name) == ('Sommer', 'Winter', 'Test')


def test_unusual_paths(tmp_path) -> None:
    name = unicodedata.normalize('NFD', 'Größe [1] *')
    root = make_folder(tmp_path / 'x [ab] 日本' / ('long' * 40) / ('path' * 40), {name: 3, 'été'.upper(): 3}, '.PNG')
    splits = load_splits(str(root))
    assert unicodedata.normalize('NFC', name) in splits.class_names
    assert sum(map(len, (splits.train, splits.val))) == 6
    parquet = make_parquet(tmp_path / 'y [ab]', train={'label': [0, 1] * 4})
    assert len(load_splits(str(parquet / 'train.parquet')).train) == 6
    with pytest.raises(ValueError, match='rename the folder'):
        load_splits(str(parquet))


def test_test_split_is_never_taken_for_validation(tmp_path) -> None:
    root = make_parquet(tmp_path / 'd', train={'label': [0, 1] * 10}, test={'label': [0, 1] * 3})
    splits = load_splits(str(root))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (18, 2, 6)
    chosen = load_splits(str(root), val_split='test')
    assert (len(chosen.train), len(chosen.val), chosen.test) == (20, 6, None)


def test_string_labels_are_matched_by_name(tmp_path) -> None:
    train = {'label': ['x', 'y', 'z'], 'feature': Value('string')}
    val = {'label': ['z', 'z', 'y'], 'feature': Value('string')}
    root = make_parquet(tmp_path / 'd', train=train, validation=val)
    splits = load_splits(str(root))
    assert [splits.class_names[i] for i in splits.train.labels] == ['x', 'y', 'z']
    assert [splits.class_names[i] for i in splits.val.labels] == ['z', 'z', 'y']


def test_string_and_integer_labels(tmp_path) -> None:
    strings = {'label': ['owl', 'cat'] * 5, 'feature': Value('string')}
    splits = load_splits(str(make_parquet(tmp_path / 's', train=strings)))
    assert splits.class_names == ['cat', 'owl']
    assert set(splits.train.labels.tolist()) == {0, 1}
    numbers = {'label': [row % 12 for row in range(36)]}
    splits = load_splits(str(make_parquet(tmp_path / 'n', train=numbers)))
    assert splits.class_names == [str(i) for i in range(12)]  # not 0, 1, 10, 11, 2
    for row in range(len(splits.train)):
        image = np.asarray(PILImage.open(io.BytesIO(splits.train.encoded([row])[0])))
        original = next(i for i in range(36) if np.array_equal(np.asarray(picture(i)), image))
        assert splits.train.labels[row] == original % 12


def renamed_teacher(tiny, folder: Path, names: list[str]) -> list[str]:
    """The tests' teacher with other names of its classes."""
    shutil.copytree(tiny.teacher, folder)
    config = json.loads((folder / 'config.json').read_text())
    for holder in (config, config['pretrained_cfg']):
        if 'label_names' in holder:
            holder['label_names'] = names
    (folder / 'config.json').write_text(json.dumps(config))
    return ['--teacher', f'local-dir:{folder}', '--method', 'kd', '--epochs', '1']


def integers(tiny, root: Path) -> list[str]:
    """The tests' data as parquet with integer labels, whose order is that of the class folders."""
    for split in ('train', 'val'):
        files = sorted((tiny.data / split).rglob('*.png'))
        names = sorted({file.parent.name for file in files})
        data = {
            'image': [{'bytes': file.read_bytes(), 'path': None} for file in files],
            'label': [names.index(file.parent.name) for file in files],
        }
        root.mkdir(exist_ok=True)
        features = Features({'image': Image(), 'label': Value('int64')})
        Dataset.from_dict(data, features=features).to_parquet(root / f'{split}.parquet')
    return ['--dataset', str(root)]


@pytest.mark.parametrize('case', ['integer data', 'teacher of integer data', 'neither'])
def test_integer_labels_are_no_names_to_compare(tiny, tmp_path, capsys, case: str) -> None:
    names = ['0', '1', '2'] if case != 'integer data' else ['ash', 'birch', 'cedar']
    argv = renamed_teacher(tiny, tmp_path / 'teacher', names)
    if case != 'teacher of integer data':
        argv += integers(tiny, tmp_path / 'data')
    assert main([*tiny.argv(tmp_path / 'run'), *argv]) == 0
    assert ('taken on trust' in capsys.readouterr().out) == (case != 'neither')


def test_integer_labels_of_another_order_are_refused_as_the_same_classes(tiny, tmp_path, capsys) -> None:
    """The teacher's are those of class folders, sorted as text."""
    argv = renamed_teacher(tiny, tmp_path / 'teacher', ['0', '10', '2']) + integers(tiny, tmp_path / 'data')
    assert main([*tiny.argv(tmp_path / 'run'), *argv, '--teacher-head', 'own']) == 1
    assert "class 1 is '10' for the teacher and '1' in the data" in capsys.readouterr().err


def test_names_of_the_teacher_are_compared_in_the_same_unicode_form(tiny, tmp_path, capsys) -> None:
    shutil.copytree(tiny.data, tmp_path / 'data')
    for split in ('train', 'val'):
        (tmp_path / 'data' / split / 'birch').rename(tmp_path / 'data' / split / 'bétula')
    names = ['ash', unicodedata.normalize('NFD', 'bétula'), 'cedar']
    argv = renamed_teacher(tiny, tmp_path / 'teacher', names) + ['--dataset', str(tmp_path / 'data')]
    assert main([*tiny.argv(tmp_path / 'run'), *argv]) == 0, capsys.readouterr().err


def test_unlabelled_test_split_is_not_used(tmp_path, caplog) -> None:
    feature = ClassLabel(names=['x', 'y'])
    root = make_parquet(
        tmp_path / 'd',
        train={'label': [0, 1] * 5, 'feature': feature},
        test={'label': [-1] * 4, 'feature': feature},
    )
    assert load_splits(str(root)).test is None
    assert 'no labels' in caplog.text
    with pytest.raises(ValueError, match='has no labels and cannot be tested on: leave --test-split out'):
        load_splits(str(root), test_split='test')
    with pytest.raises(ValueError, match=r"split 'test' has no labels .*--split \(train\).*timm-dfpt predict"):
        load_split(str(root), ['x', 'y'])


def test_a_test_split_without_a_column_of_labels_is_not_used(tmp_path, caplog) -> None:
    root = make_parquet(tmp_path / 'd', train={'label': [0, 1] * 5}, validation={'label': [0, 1]})
    images = Dataset.from_dict({'image': [picture(0)]}, features=Features({'image': Image()}))
    saved = {name: Dataset.from_parquet(str(root / f'{name}.parquet')) for name in ('train', 'validation')}
    DatasetDict(**saved, test=images).save_to_disk(str(tmp_path / 'saved'))
    assert load_splits(str(tmp_path / 'saved')).test is None
    assert "'test' has no labels (no column 'label' among ['image']) and is not used" in caplog.text
    with pytest.raises(ValueError, match=r"split 'test': no label column .*--split \(.*validation\)"):
        load_split(str(tmp_path / 'saved'), ['0', '1'])
    assert load_split(str(tmp_path / 'saved'), ['0', '1'], split='validation').labels.tolist() == [0, 1]


@pytest.mark.parametrize('kind', ['class folders', 'test images in a heap', 'parquet'])
def test_no_training_split_is_needed_to_measure_or_predict(kind, tmp_path) -> None:
    root, known = tmp_path / 'd', ['0', '1'] if kind == 'parquet' else ['x', 'y']
    if kind == 'parquet':
        make_parquet(root, test={'label': [1, 0, 0]}, val={'label': [1]}, other={'label': [0]})
    else:
        make_folder(root / 'val', {'x': 1, 'y': 1})
        make_folder(root / 'test', {'y': 1, 'x': 2} if kind == 'class folders' else {'.': 3})
    if kind == 'test images in a heap':
        with pytest.raises(ValueError, match=r"'test' has no labels .*--split \(val\), or .*timm-dfpt predict"):
            load_split(str(root), known)
    else:
        assert sorted(load_split(str(root), known).labels.tolist()) == [0, 0, 1]
    # Which `datasets` calls by its own names.
    split = 'validation' if kind == 'parquet' else 'val'
    assert load_split(str(root), known, split=split).name == split
    assert sum(map(len, find_images([str(root)]))) == 5
    with pytest.raises(ValueError, match='no training split among'):
        load_splits(str(root))


def test_files_of_other_types_are_left_out_with_a_warning(tmp_path, caplog) -> None:
    root = make_folder(tmp_path / 'd', {'a': 4, 'b': 4})
    (root / 'b' / '.DS_Store').write_bytes(b'x')
    assert len(load_splits(str(root)).train) == 6
    assert 'left out' not in caplog.text
    (root / 'a' / 'deeper').mkdir()
    for name in ('a/1.gif', 'a/deeper/2.GIF', 'b/3.avif'):
        picture(1).save(root / name, format='gif')
    assert len(load_splits(str(root)).train) == 6
    assert '3 files in the class folders' in caplog.text
    assert str(root / 'a' / '1.gif') in caplog.text
    assert '.png' in caplog.text


def test_bad_images_stop_or_are_left_out(tmp_path, caplog) -> None:
    root = make_folder(tmp_path / 'd', {'a': 6, 'b': 6})
    (root / 'a' / '1.png').write_bytes(b'')
    (root / 'b' / '3.png').write_bytes((root / 'b' / '3.png').read_bytes()[:50])
    with pytest.raises(ValueError, match=r"(?s)2 images .*a/1\.png.*0 bytes.*b/3\.png.*--on-bad-image skip"):
        load_splits(str(root))
    splits = load_splits(str(root), on_bad_image='skip')
    assert 'a/1.png' in caplog.text
    assert 'b/3.png' in caplog.text
    left = splits.train.encoded(range(len(splits.train))) + splits.val.encoded(range(len(splits.val)))
    assert len(left) == 10
    assert not {str(root / 'a' / '1.png'), str(root / 'b' / '3.png')} & set(left)
    for split in (splits.train, splits.val):
        files = split.encoded(range(len(split)))
        assert [Path(file).parent.name for file in files] == [splits.class_names[i] for i in split.labels]


def test_fingerprint_is_of_content_and_order(tmp_path) -> None:
    splits = load_splits(str(make_folder(tmp_path / 'here', {'a': 5, 'b': 5})))
    again = load_splits(str(make_folder(tmp_path / 'there', {'a': 5, 'b': 5})))
    value = dataset_fingerprint(splits.train)
    expected = hashlib.sha256()
    for file, label in zip(splits.train.encoded(range(8)), splits.train.labels.tolist(), strict=True):
        data = Path(file).read_bytes()
        expected.update(label.to_bytes(8, 'little') + len(data).to_bytes(8, 'little') + data)
    assert value == expected.hexdigest()
    assert dataset_fingerprint(again.train) == value
    assert dataset_fingerprint(again.val) != value
    assert dataset_fingerprint(splits.train.select([1, 0, 2, 3, 4, 5, 6, 7])) != value
    again.train.labels[0] = 1
    assert dataset_fingerprint(again.train) != value


def empty_class(root: Path) -> Path:
    (make_folder(root, {'a': 2, 'b': 2}) / 'empty').mkdir()
    return root


def twice(root: Path) -> Path:
    return make_folder(root, {unicodedata.normalize(form, 'café'): 3 for form in ('NFC', 'NFD')})


def only_in_val(root: Path) -> Path:
    make_folder(root / 'train', {'a': 2, 'b': 2})
    make_folder(root / 'val', {'a': 2, 'new': 2})
    return root


def two_classes(root: Path) -> Path:
    return make_folder(root, {'a': 2, 'b': 2})


def no_classes(root: Path) -> Path:
    root.mkdir()
    picture(0).save(root / '0.png')
    return root


def columns(root: Path, **features: object) -> Path:
    root.mkdir()
    rows = {Image: [picture(0), picture(1)], ClassLabel: [0, 1], Value: [0.5, 1.5]}
    data = {name: rows[type(feature)] for name, feature in features.items()}
    Dataset.from_dict(data, features=Features(features)).to_parquet(root / 'train.parquet')
    return root


@pytest.mark.parametrize('card', ['', CARD])
def test_a_folder_that_was_made_again_is_read_again(tmp_path: Path, card: str) -> None:
    for labels in ([0, 1, 0, 1], [1, 0, 1, 1]):
        root = make_parquet(tmp_path / 'd', train={'label': labels}, validation={'label': [0, 1]})
        (root / 'README.md').write_text(card)
        assert load_splits(str(root)).train.labels.tolist() == labels


def parquet_of(text: bytes, root: Path) -> Path:
    root.mkdir()
    (root / 'train.parquet').write_bytes(text)
    return root


XY, YX = ClassLabel(names=['x', 'y']), ClassLabel(names=['y', 'x'])
TWO_SPLITS = {'train': {'label': [0, 1] * 3}, 'test': {'label': [0, 1]}}
# What is on disk, the arguments, the message.
BAD = {
    'stream of shards': (lambda root: 'wds/shards', {}, r"'wds/shards': .* a folder of images or parquet"),
    'stream of the Hub': (lambda root: 'hfids/user/name', {}, r'the id of the dataset on the Hub'),
    'path missing': (lambda root: root, {}, r'no such file or folder'),
    'folder without classes': (no_classes, {}, 'one subfolder of images per class'),
    'empty class folder': (empty_class, {}, r'empty.* holds no image .*remove it'),
    'single class': (lambda root: make_folder(root, {'a': 3}), {}, r"only the class \['a'\]"),
    'class with a single image': (lambda root: make_folder(root, {'a': 3, 'b': 1}), {}, "class 'b' has a single image"),
    'duplicate class names': (twice, {}, "several classes named 'café'"),
    'class in validation only': (only_in_val, {}, "class 'new', of which split 'train' has none"),
    'configuration of a folder': (two_classes, {'dataset_config': 'x'}, "dataset_config='x'.*--dataset-config"),
    'revision of a folder': (two_classes, {'dataset_revision': 'x'}, "dataset_revision='x'.*--dataset-revision"),
    'unknown training split': (lambda r: make_parquet(r, **TWO_SPLITS), {'train_split': 'all'}, r"\['train', 'test'\]"),
    'unknown validation split': (lambda r: make_parquet(r, **TWO_SPLITS), {'val_split': 'v'}, "='v' is unknown"),
    'one split for two roles': (
        lambda root: make_parquet(root, **TWO_SPLITS),
        {'val_split': 'test', 'test_split': 'test'},
        'must differ',
    ),
    'fraction 0': (lambda root: root, {'val_fraction': 0.0}, 'val_fraction=0.0'),
    'fraction 1': (lambda root: root, {'val_fraction': 1.0}, 'val_fraction=1.0'),
    'fraction not a number': (lambda root: root, {'val_fraction': float('nan')}, 'val_fraction=nan'),
    'negative seed': (lambda root: root, {'seed': -1}, 'seed=-1'),
    'unknown on_bad_image': (lambda root: root, {'on_bad_image': 'drop'}, "on_bad_image='drop'"),
    'no image column': (lambda root: columns(root, label=XY), {}, 'no image column'),
    'two image columns': (
        lambda root: columns(root, a=Image(), b=Image(), label=XY), {}, r"several.*\['a', 'b'\].*--input-key"
    ),
    'unknown image column': (lambda r: columns(r, a=Image(), label=XY), {'input_key': 'b'}, r"\['a', 'label'\]"),
    'not an image column': (
        lambda root: columns(root, image=Image(), label=XY, weight=Value('float32')),
        {'input_key': 'weight'},
        "input_key='weight' does not hold images",
    ),
    'no label column': (lambda root: columns(root, image=Image()), {}, 'no label column'),
    'two label columns': (lambda root: columns(root, image=Image(), fine=XY, coarse=XY), {}, '--target-key'),
    'unknown label column': (lambda r: columns(r, a=Image(), label=XY), {'target_key': 'b'}, r"\['a', 'label'\]"),
    'labels are floating point': (lambda root: columns(root, a=Image(), label=Value('float32')), {}, 'holds float'),
    'label missing': (lambda r: make_parquet(r, train={'label': [0, None, 1]}), {}, 'no label in 1 rows.*row 1'),
    'label -1': (lambda r: make_parquet(r, train={'label': [0, 1, -1]}), {}, r'\(-1\).*row 2'),
    'class label -1': (lambda r: make_parquet(r, train={'label': [0, -1], 'feature': XY}), {}, 'out of range: row 1'),
    'classes in another order': (
        lambda r: make_parquet(r, train={'label': [0, 1], 'feature': XY}, val={'label': [0], 'feature': YX}),
        {},
        "classes of 'label' differ",
    ),
    'class labels all -1': (
        lambda r: make_parquet(r, train={'label': [-1, -1], 'feature': XY}), {}, 'has no labels.*--unlabelled'
    ),
    'validation without labels': (
        lambda r: make_parquet(r, train={'label': [0, 1]}, val={'label': [None]}), {}, "'validation' has.*--val-split"
    ),
    'class without a name': (
        lambda r: make_parquet(r, train={'label': ['', 'x'] * 2, 'feature': Value('string')}),
        {},
        'class without a name .*--target-key',
    ),
    'class of a long name': (
        lambda r: make_parquet(r, train={'label': [0, 1], 'feature': ClassLabel(names=['x', 'y' * 1001])}),
        {},
        'name has 1001 characters.*--target-key',
    ),
    'background that is not a colour': (two_classes, {'background': 'dark'}, "background='dark' must be a color"),
    'no rows': (lambda r: make_parquet(r, train={'label': []}), {}, 'no data'),
    'damaged parquet': (lambda root: parquet_of(b'PAR1 not really', root), {}, 'could not be read'),
    'empty parquet': (lambda root: parquet_of(b'', root), {}, 'could not be read'),
    'unknown configuration': (lambda r: make_parquet(r, **TWO_SPLITS), {'dataset_config': 'x'}, "BuilderConfig 'x'"),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_refused(name: str, tmp_path, no_network) -> None:
    make, arguments, message = BAD[name]
    root = make(tmp_path / 'data')
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_splits(str(root), **arguments)


def test_file_that_is_no_parquet_is_refused(tmp_path) -> None:
    picture(0).save(tmp_path / 'one.png')
    with pytest.raises(ValueError, match='must be parquet'):
        load_splits(str(tmp_path / 'one.png'))


def test_unknown_on_the_hub_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
    with pytest.raises(FileNotFoundError, match='nobody/nothing.* is not a local file or folder'):
        load_splits('nobody/nothing')


def test_a_mistyped_folder_is_not_waited_for(tmp_path, monkeypatch, caplog) -> None:
    """Where nothing answers, `datasets` alone would ask six times, in 23 seconds, and log five of them."""
    # Nothing may listen on this port.
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr('datasets.config.HF_ENDPOINT', 'http://127.0.0.1:9')
    (tmp_path / 'photos').mkdir()
    monkeypatch.chdir(tmp_path)
    hints = {
        'strange name': 'nor the id of a dataset on the Hub',
        'nobody/nothing': 'no answer from',
        'photoz': "did you mean 'photos'",
        str(tmp_path / 'photoz'): f"did you mean '{tmp_path}/photos'",
        'photos/val': "the folder 'photos' has no 'val'",
    }
    for name, hint in hints.items():
        with pytest.raises(FileNotFoundError, match=hint):
            load_splits(name)
    assert 'Retrying' not in caplog.text


def test_the_hub_is_asked_once_for_what_it_does_not_have(tmp_path, monkeypatch) -> None:
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.send_header('X-Error-Code', 'RepoNotFound')
            self.send_header('Content-Length', '0')
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(('127.0.0.1', 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for name in ('huggingface_hub.constants.ENDPOINT', 'datasets.config.HF_ENDPOINT'):
            monkeypatch.setattr(name, f'http://127.0.0.1:{server.server_port}')
        (tmp_path / 'photos').mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"mean 'photos'\?\), and there is no such dataset on the Hub"):
            load_splits('photoz')
        server.shutdown()
    assert asked == ['/api/datasets/photoz']
