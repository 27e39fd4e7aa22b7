"""Datasets and teachers that are distinguished, and those that are only elsewhere."""
import io
import shutil

import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from timm_dfpt.data.datasets import load_splits
from timm_dfpt.data.fingerprint import describe_data
from timm_dfpt.training.checkpoint import changes, describe_teachers

CLASSES = ('ash', 'birch')


def bitmap(shade):
    file = io.BytesIO()
    PILImage.new('RGB', (4, 4), (shade, 0, 0)).save(file, 'bmp')
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for split, count in (('train', 5), ('val', 2)):
        for label, name in enumerate(CLASSES):
            place = tmp_path / 'data' / split / name
            place.mkdir(parents=True)
            for i in range(count):
                (place / f'{i}.bmp').write_bytes(bitmap(10 * i + label))
    return tmp_path / 'data'


def described(folder, **options):
    return describe_data(load_splits(str(folder), **options))


def remove(train):
    (train / 'ash' / '3.bmp').unlink()


def repaint(train):
    """As large as before."""
    (train / 'ash' / '3.bmp').write_bytes(bitmap(200))


def rename(train):
    (train / 'ash' / '0.bmp').rename(train / 'ash' / '00.bmp')


def relabel(train):
    (train / 'ash' / '4.bmp').rename(train / 'birch' / '5.bmp')


def rename_class(train):
    for split in ('train', 'val'):
        (train.parent / split / 'ash').rename(train.parent / split / 'aspen')


@pytest.mark.parametrize('change', [remove, repaint, rename, relabel, rename_class])
def test_other_data_are_described_otherwise(folder, change):
    before = described(folder)
    change(folder / 'train')
    found = changes(before, described(folder))
    about = 'classes' if change is rename_class else 'training images'
    assert len(found) == 1
    assert found[0].startswith(f'{about}: ')


def test_the_same_data_elsewhere_are_the_same(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'mounted' / 'elsewhere')
    assert described(tmp_path / 'mounted' / 'elsewhere') == described(folder)


def parquet(path, shades):
    features = Features({'image': Image(), 'label': ClassLabel(names=list(CLASSES))})
    rows = {
        'image': [{'bytes': bitmap(shade), 'path': None} for shade in shades],
        'label': [i % 2 for i in range(len(shades))],
    }
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def test_parquet_too(tmp_path, monkeypatch):
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path / 'cache')
    options = {'val_fraction': 0.25}
    one = described(parquet(tmp_path / 'a.parquet', range(16)), **options)
    assert described(parquet(tmp_path / 'b.parquet', range(16)), **options) == one
    other = described(parquet(tmp_path / 'c.parquet', [*range(15), 99]), **options)
    assert len(changes(one, other)) == 1


def test_teachers_are_known_by_their_weights():
    def teacher(seed):
        torch.manual_seed(seed)
        return timm.create_model('test_vit', num_classes=3)

    one = describe_teachers({'dfpt': teacher(0), 'supervised': None})
    assert set(one) == {'teacher of dfpt'}
    assert one == describe_teachers({'dfpt': teacher(0)})
    (found,) = changes(one, describe_teachers({'dfpt': teacher(1)}))
    assert 'when the run was started' in found
