"""Images without labels: what is read of folders and files, and which labels are kept for validation."""
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from timm_dfpt.data.datasets import load_splits

CLASSES = ['ash', 'birch', 'cedar']


def write(root, *files):
    """Images at these paths, each of another colour."""
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(root / file)


def load(root, **options):
    return load_splits(str(root), **{'teacher_classes': CLASSES, 'val_fraction': 0.25, **options})


FOLDERS = {
    'a heap of images': [f'{i}.png' for i in range(8)],
    'by date': [f'2024-0{i % 3}/{i // 3}/{i}.png' for i in range(8)],
    'some in folders': [*(f'{i}.png' for i in range(4)), *(f'more/{i}.png' for i in range(4))],
    'in a folder': [f'images/{i}.png' for i in range(8)],
}


@pytest.mark.parametrize('kind', FOLDERS)
def test_every_image_of_a_folder_is_used_once(kind, tmp_path):
    write(tmp_path, *FOLDERS[kind])
    data = load(tmp_path)
    assert (len(data.train), len(data.val), data.test) == (6, 2, None)
    assert data.class_names == CLASSES
    assert 'at random' in data.val_from
    assert not data.train.labelled
    assert not data.val.labelled
    seen = {split.encoded([row])[0] for split in (data.train, data.val) for row in range(len(split))}
    assert seen == {str(tmp_path / file) for file in FOLDERS[kind]}


def test_labels_are_kept_to_validate_on_by_name(tmp_path):
    """The training split lies in a heap; the classes of the other are some of the teacher's, in its numbers."""
    write(tmp_path, 'train/0.png', 'train/1.png', 'val/cedar/a.png', 'val/birch/b.png', 'val/cedar/c.png')
    data = load(tmp_path)
    assert data.train.labels.tolist() == [-1, -1]
    assert data.val.labels.tolist() == [1, 2, 2]


@pytest.mark.parametrize(
    ('teacher', 'labels', 'expected'),
    [
        (CLASSES, ['cedar', 'ash'], [2, 0]),
        (CLASSES, ['oak', 'ash'], [-1, -1]),
        (['LABEL_0', 'LABEL_1', 'LABEL_2'], [2, 0], [2, 0]),
        (['LABEL_0', 'LABEL_1'], ['oak', 'ash'], [1, 0]),
        (CLASSES, [None, 'ash'], [-1, -1]),
        (CLASSES, None, [-1, -1]),
    ],
)
def test_labels_of_parquet_are_the_teachers_or_none(teacher, labels, expected, tmp_path):
    for split in ('train', 'validation'):
        write(tmp_path / 'images', f'{split}0.png', f'{split}1.png')
        files = [tmp_path / 'images' / f'{split}{i}.png' for i in range(2)]
        columns = {'image': [{'bytes': file.read_bytes(), 'path': None} for file in files]}
        if labels is not None:
            columns['label'] = labels
        (tmp_path / 'data').mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / 'data' / f'{split}.parquet')
    data = load(tmp_path / 'data', teacher_classes=teacher)
    assert data.val.labels.tolist() == expected
    assert data.train.labels.tolist() == [-1, -1]


def test_what_holds_no_image_is_refused(tmp_path):
    write(tmp_path, 'train/0.png')
    (tmp_path / 'other').mkdir()
    with pytest.raises(ValueError, match='single image'):
        load(tmp_path)
    with pytest.raises(ValueError, match='holds no image'):
        load(tmp_path / 'other')
