"""The cache of the teacher's logits: a student trained with it is the student trained without it."""
import dataclasses
import hashlib

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from timm_dfpt.data.augment import AugmentConfig
from timm_dfpt.data.datasets import load_splits
from timm_dfpt.data.loader import create_loader
from timm_dfpt.job.cli import parse_config
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.training import teacher_cache
from timm_dfpt.training.run import run
from timm_dfpt.training.teacher_cache import TeacherCache, cache_key, check_exact

DATA_CONFIG = {'input_size': (3, 16, 16), 'mean': (0.5,) * 3, 'std': (0.25,) * 3, 'crop_pct': 1.0}
KEY = {'teacher': 'a'}


@pytest.fixture
def train(tiny, tmp_path, fresh_accelerate):
    """Run the main job in this process; return the hash of the student."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def train(name, *more):
        fresh_accelerate()
        folder = tmp_path / name
        cache = ['--teacher-cache-dir', str(tmp_path / 'cache')] if '--cache-teacher' in more else []
        run(parse_config(tiny.argv(folder, '--mixup', '0', '--epochs', '3', *cache, *more)))
        return hashlib.sha256((folder / 'student' / 'model.safetensors').read_bytes()).hexdigest()

    yield train
    torch.set_num_threads(threads)


@pytest.fixture
def computed(monkeypatch):
    """How many batches of logits had to be computed."""
    rows = []
    put = TeacherCache.put

    def counting(self, epoch, batch, logits):
        rows.append(len(batch))
        put(self, epoch, batch, logits)

    monkeypatch.setattr(TeacherCache, 'put', counting)
    return rows


@pytest.mark.parametrize('method', ['kd', 'dfpt'])
def test_student_is_bit_identical_and_logits_are_computed_once(train, computed, method):
    options = ['--method', method, '--aug-cycle', '2']
    plain = train('plain', *options)
    assert not computed
    assert train('cold', *options, '--cache-teacher') == plain
    first = len(computed)
    assert first > 0
    assert train('warm', *options, '--cache-teacher') == plain
    # Rows that a last short batch left out in the first run may still come.
    assert len(computed) - first < first / 2


def test_cycle_repeats_the_augmentation_in_another_order(tiny):
    split = load_splits(str(tiny.data)).train
    augmentation = AugmentConfig(crop_padding=2, color_jitter=None)
    loader = create_loader(
        split, data_config=DATA_CONFIG, batch_size=32, is_training=True, augmentation=augmentation, aug_cycle=2
    )

    def epoch(number):
        loader.dataset.set_epoch(number)
        batches = list(loader)
        return {int(row): x for xs, _, rows in batches for x, row in zip(xs, rows, strict=True)}, batches[0][2]

    (first, order), (second, _), (third, other_order) = (epoch(number) for number in range(3))
    both = first.keys() & third.keys()
    assert all(torch.equal(first[row], third[row]) for row in both)
    assert not all(torch.equal(first[row], second[row]) for row in first.keys() & second.keys())
    assert not torch.equal(order, other_order)


def test_key_tells_seeds_teachers_and_data_apart():
    def key(seed=1, teacher=0, data='x'):
        torch.manual_seed(teacher)
        options = dataclasses.asdict(TrainConfig(student='a', teacher='b', dataset='c', seed=seed))
        return cache_key(options, nn.Linear(2, 2), data, {'input_size': (3, 2, 2)}, torch.device('cpu'))

    assert key() == key()
    assert key() != key(seed=2)
    assert key() != key(teacher=1)
    assert key() != key(data='y')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({}, 'aug-cycle'),
        ({'aug_cycle': 2, 'mixup': 0.2}, 'mixup'),
        ({'no_aug': True, 'method': 'supervised', 'teacher': None}, 'teacher'),
    ],
)
def test_refused_where_logits_would_be_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{'student': 'resnet18', 'teacher': 'resnet34', 'dataset': 'x', 'cache_teacher': True, **options})


def test_refused_where_logits_depend_on_the_batch():
    check_exact(lambda x: x.flatten(1), torch.randn(8, 3, 2, 2))
    with pytest.raises(ValueError, match='depend on the other images'):
        check_exact(lambda x: x.flatten(1) - x.mean(), torch.randn(8, 3, 2, 2))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_file_is_safetensors_and_outlives_the_process(tmp_path, dtype):
    logits = torch.randn(2, 3, 5).to(dtype)
    cache = TeacherCache(tmp_path, KEY, rows=6, classes=5, variants=2)
    rows = [torch.tensor([4, 0, 2]), torch.tensor([5, 1, 0])]
    assert cache.get(0, rows[0], torch.device('cpu')) is None
    cache.put(0, rows[0], logits[0])
    cache.put(3, rows[1], logits[1])
    cache.flush()
    again = TeacherCache(tmp_path, KEY, rows=6, classes=5, variants=2)
    assert torch.equal(again.get(2, rows[0].flip(0), torch.device('cpu')), logits[0].flip(0))
    assert again.get(0, rows[1], torch.device('cpu')) is None
    assert torch.equal(again.get(1, rows[1], torch.device('cpu')), logits[1])
    stored = load_file(next(tmp_path.glob('*.safetensors')))
    assert torch.equal(stored['logits'][1, rows[1]], logits[1])
    assert stored['known'].sum() == 6


def test_what_was_not_flushed_is_not_known(tmp_path):
    cache = TeacherCache(tmp_path, KEY, rows=2, classes=3)
    cache.put(0, torch.tensor([0, 1]), torch.randn(2, 3))
    assert TeacherCache(tmp_path, KEY, rows=2, classes=3).get(0, torch.tensor([0]), torch.device('cpu')) is None


def test_other_logits_for_a_known_row_are_an_error(tmp_path):
    cache = TeacherCache(tmp_path, KEY, rows=2, classes=3)
    cache.put(0, torch.tensor([1]), torch.ones(1, 3))
    with pytest.raises(RuntimeError, match='other logits'):
        cache.put(0, torch.tensor([0, 1]), torch.zeros(2, 3))


def test_damaged_file_is_named(tmp_path):
    cache = TeacherCache(tmp_path, KEY, rows=2, classes=3)
    cache.put(0, torch.tensor([1]), torch.ones(1, 3))
    cache.path.write_bytes(cache.path.read_bytes()[:-1])
    with pytest.raises(ValueError, match='damaged'):
        TeacherCache(tmp_path, KEY, rows=2, classes=3)


def test_key_has_every_option_of_the_augmentation():
    fields = {f.name for f in TrainConfig.__dataclass_fields__.values() if f.metadata['group'] == 'augmentation'}
    # What mixes images is refused, and smoothing changes labels only.
    assert fields - {'mixup', 'cutmix', 'mixup_prob', 'smoothing'} <= set(teacher_cache._OPTIONS)
