"""Batches against timm's and torchvision's own transforms and a second loader; order and randomness against splits."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import BatchSampler, DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as TF

from timm_dfpt.data.augment import AugmentConfig
from timm_dfpt.data.crops import RandomCrops
from timm_dfpt.data.datasets import ImageSplit, load_splits
from timm_dfpt.data.images import BadImageError
from timm_dfpt.data.inspection import report_findings
from timm_dfpt.data.loader import create_loader
from timm_dfpt.data.seeding import derive_seed, seed_rng, uniforms

RGB = {
    'input_size': (3, 24, 20),
    'mean': (0.5, 0.4, 0.3),
    'std': (0.2, 0.25, 0.3),
    'interpolation': 'bicubic',
    'crop_pct': 0.9,
}
GREY = {'input_size': (1, 24, 24), 'mean': (0.5,), 'std': (0.25,), 'crop_pct': 1.0}
# Padding and flips only: the augmentation that is done on whole batches.
SIMPLE = AugmentConfig(crop_padding=3, vflip=0.3, color_jitter=None)
CROPS = AugmentConfig(vflip=0.3)
PER_IMAGE = AugmentConfig(aa='rand-m9-mstd0.5-inc1', reprob=0.5)
Batches = list[tuple[torch.Tensor, ...]]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, count in (('train', 11), ('val', 5)):
        for name in ('a', 'b', 'c'):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(15, 50, 2)
                pixels = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
                image.save(root / split / name / f'{i:02}.{"jpg" if i % 2 else "png"}')
    return root


@pytest.fixture(scope='module')
def train(folder: Path) -> ImageSplit:
    return load_splits(str(folder)).train


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def loader(split: ImageSplit, **arguments: object) -> DataLoader:
    defaults: dict = {'data_config': RGB, 'batch_size': 4, 'is_training': True, 'seed': 5, 'augmentation': SIMPLE}
    return create_loader(split, **(defaults | arguments))


def epoch_of(batches: DataLoader, epoch: int) -> Batches:
    batches.dataset.set_epoch(epoch)
    return list(batches)


def by_row(batches: Batches) -> dict[int, torch.Tensor]:
    return {row: image for images, _, index in batches for row, image in zip(index.tolist(), images, strict=True)}


def assert_same(a: Batches, b: Batches) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        for x, y in zip(left, right, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


@pytest.mark.parametrize('cache', ['on', 'off'])
@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('config', [RGB, GREY], ids=['rgb', 'grey'])
def test_evaluation_equals_torchvisions_folder_with_timms_transform(folder, config, crop_mode, cache) -> None:
    config = config | {'crop_mode': crop_mode}
    size = config['input_size']
    transform = create_transform(**config)
    reference = ImageFolder(folder / 'val', lambda image: transform(image.convert('L' if size[0] == 1 else 'RGB')))
    splits = load_splits(str(folder))
    batches = create_loader(splits.val, data_config=config, batch_size=4, is_training=False, cache_images=cache)
    assert splits.class_names == reference.classes
    assert len(batches) == 4  # the last batch, a short one, is there
    expected = [(x, y) for x, y in DataLoader(reference, batch_size=4)]
    assert_same([batch[:2] for batch in batches], expected)
    assert torch.cat([index for _, _, index in batches]).tolist() == list(range(15))
    assert batches.dataset.cached is None or batches.dataset.cached.dtype == torch.uint8


@pytest.mark.parametrize('channels', [1, 3])
def test_batch_augmentation_equals_torchvisions_image_by_image(train, channels: int) -> None:
    config = RGB if channels == 3 else GREY
    batches = loader(train, data_config=config)
    size = config['input_size']
    resize = create_transform(**config, normalize=False)
    offsets, flips = batches.dataset.batch_transform.draws(2)
    for images, targets, index in epoch_of(batches, 2):
        for image, target, row in zip(images, targets, index.tolist(), strict=True):
            pil = Image.open(train.encoded([row])[0]).convert('L' if channels == 1 else 'RGB')
            expected = TF.crop(TF.pad(resize(pil), 3), *offsets[row].tolist(), *size[1:])
            expected = TF.hflip(expected) if flips[row, 0] else expected
            expected = TF.vflip(expected) if flips[row, 1] else expected
            expected = TF.normalize(expected.float().div(255), config['mean'], config['std'])
            assert torch.equal(image, expected)
            assert target == train.labels[row]


def test_draws_have_the_right_frequencies(train) -> None:
    transform = loader(train, augmentation=SIMPLE).dataset.batch_transform
    offsets, flips = (torch.cat(parts).double() for parts in zip(*map(transform.draws, range(300)), strict=True))
    count = len(offsets)
    for side in range(2):
        frequency = torch.bincount(offsets[:, side].long(), minlength=7) / count
        assert frequency.shape == (7,)
        assert (frequency - 1 / 7).abs().max() < 5 * (1 / 7 / count) ** 0.5
    assert (flips.mean(0) - torch.tensor([0.5, 0.3])).abs().max() < 5 * (0.25 / count) ** 0.5
    assert torch.corrcoef(torch.cat([offsets, flips], 1).T).fill_diagonal_(0).abs().max() < 5 / count**0.5


def test_no_aug_equals_timms(train) -> None:
    transform = create_transform(RGB['input_size'], is_training=True, no_aug=True, **{k: RGB[k] for k in MEAN_STD})
    for images, _, index in loader(train, augmentation=AugmentConfig(no_aug=True)):
        for image, row in zip(images, index.tolist(), strict=True):
            assert torch.equal(image, transform(Image.open(train.encoded([row])[0]).convert('RGB')))


MEAN_STD = ('mean', 'std', 'interpolation')
AUGMENTATIONS = {
    'defaults': (AugmentConfig(color_jitter=0.4), {'interpolation': 'random'}),
    'strong': (
        AugmentConfig(scale=(0.5, 1), aa='rand-m9-mstd0.5', reprob=1, vflip=0.5),
        {
            'interpolation': 'random',
            'scale': (0.5, 1),
            'auto_augment': 'rand-m9-mstd0.5',
            're_prob': 1,
            're_mode': 'pixel',
            'vflip': 0.5,
        },
    ),
    'augmix': (AugmentConfig(aa='augmix-m3'), {'interpolation': 'random', 'auto_augment': 'augmix-m3'}),
    'rkrr': (
        AugmentConfig(train_crop_mode='rkrr', color_jitter=0.4),
        {'train_crop_mode': 'rkrr', 'interpolation': 'random'},
    ),
}


@pytest.mark.parametrize('name', AUGMENTATIONS)
@pytest.mark.parametrize('config', [RGB, GREY], ids=['rgb', 'grey'])
def test_image_by_image_augmentation_is_timms(train, config, name: str) -> None:
    ours, timms = AUGMENTATIONS[name]
    transform = create_transform(
        config['input_size'], is_training=True, mean=config['mean'], std=config['std'], **timms
    )
    for images, _, index in epoch_of(loader(train, data_config=config, augmentation=ours), 3)[:3]:
        for image, row in zip(images, index.tolist(), strict=True):
            pil = Image.open(train.encoded([row])[0]).convert('L' if config is GREY else 'RGB')
            seed_rng(derive_seed(5, 2, 3, row))
            assert torch.equal(image, transform(pil))


@pytest.mark.parametrize('config', [RGB, GREY], ids=['rgb', 'grey'])
def test_random_resized_crops_are_timms_with_what_was_drawn(train, config) -> None:
    batches = loader(train, data_config=config, augmentation=CROPS)
    modes = set()
    for images, _, index in epoch_of(batches, 2):
        draws = batches.dataset.crops.draw(2, index.tolist())
        for image, row, draw in zip(images, index.tolist(), draws, strict=True):
            pil = Image.open(train.encoded([row])[0]).convert('L' if config is GREY else 'RGB')
            left, upper, right, lower = draw.box(*pil.size)
            mode = TF.InterpolationMode.BICUBIC if draw.interpolation == 3 else TF.InterpolationMode.BILINEAR
            size = config['input_size'][1:]
            expected = TF.resized_crop(pil, upper, left, lower - upper, right - left, size, mode)
            horizontal, vertical = draw.flips
            expected = TF.hflip(expected) if horizontal else expected
            expected = TF.vflip(expected) if vertical else expected
            expected = TF.normalize(TF.to_tensor(expected), config['mean'], config['std'])
            assert torch.equal(image, expected)
            modes.add((mode, draw.flips))
    assert len(modes) == 8


@pytest.mark.parametrize(
    ('width', 'height', 'scale', 'ratio'),
    [
        (50, 40, (0.08, 1.0), (3 / 4, 4 / 3)),
        (300, 40, (0.08, 1.0), (3 / 4, 4 / 3)),
        (30, 400, (0.9, 1.0), (1.0, 1.5)),
    ],
)
def test_boxes_are_drawn_as_timm_draws_them(width, height, scale, ratio) -> None:
    """Quantiles of all four edges, those of images that no crop fits into with them."""
    count, image = 2000, Image.new('L', (width, height))
    draws = RandomCrops((8, 8), 3, scale, ratio).draw(1, range(count))
    ours = np.array([draw.box(width, height) for draw in draws])
    random.seed(0)
    theirs = np.array([RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(count)])
    upper, left, tall, wide = theirs.T
    theirs = np.stack([left, upper, left + wide, upper + tall], 1)
    assert (ours >= 0).all()
    assert (ours[:, 2:] <= (width, height)).all()
    for side in range(4):
        edges = np.unique(np.concatenate([ours[:, side], theirs[:, side]]))
        shares = [np.searchsorted(np.sort(each[:, side]), edges, 'right') / count for each in (ours, theirs)]
        # Kolmogorov and Smirnov's distance, whose 0.001 quantile is 0.0617 for so many.
        assert np.abs(shares[0] - shares[1]).max() < 0.0617


def test_uniforms_are_those_of_splitmix() -> None:
    def splitmix(state: int) -> Iterator[int]:
        mask = 2**64 - 1
        while True:
            state = (state + 0x9E3779B97F4A7C15) & mask
            z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            yield z ^ (z >> 31)

    # The first number of seed 1234567, as published with the algorithm.
    assert next(splitmix(1234567)) == 6457827717110365317
    sequence = [value >> 11 for value in itertools.islice(splitmix(1234567), 40)]
    drawn = uniforms(1234567, [7, 0, 3], 5)
    assert (drawn * 2**53).astype(np.int64).tolist() == [sequence[5 * row : 5 * row + 5] for row in (7, 0, 3)]


def test_a_draft_is_the_same_crop_from_fewer_pixels(tmp_path) -> None:
    """Of JPEGs only, and where the crop stays as large as the input."""
    ys, xs = np.mgrid[:256, :320]
    smooth = np.stack([ys, xs // 2, (ys + xs) // 3], 2).astype(np.uint8)
    for name in 'ab':
        (tmp_path / name).mkdir()
        Image.fromarray(smooth).save(tmp_path / name / '0.png')
        for i in range(1, 8):
            Image.fromarray(smooth).save(tmp_path / name / f'{i}.jpg', quality=98)
    split = load_splits(str(tmp_path)).train
    kinds = [AugmentConfig(), AugmentConfig(jpeg_draft=True)]
    whole, draft = (by_row(epoch_of(loader(split, augmentation=each, seed=1), 0)) for each in kinds)
    differences = {row: float((whole[row] - draft[row]).abs().max()) for row in whole}
    pngs = [row for row in whole if split.encoded([row])[0].endswith('.png')]
    assert all(differences[row] == 0 for row in pngs)
    assert sum(value > 0 for value in differences.values()) > len(differences) // 2
    # A level of 8 bits is 0.02 after normalisation.
    assert max(differences.values()) < 0.2
    with pytest.raises(ValueError, match='jpeg_draft'):
        AugmentConfig(jpeg_draft=True, aa='rand-m9')


def test_images_decoded_once_by_workers_are_the_same(train, monkeypatch) -> None:
    expected = loader(train).dataset.cached
    monkeypatch.setattr('timm_dfpt.data.image_dataset._MANY', 1)
    monkeypatch.setattr('timm_dfpt.data.image_dataset._BLOCK_ROWS', 5)
    state = torch.get_rng_state()
    assert torch.equal(loader(train, workers=2).dataset.cached, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert loader(train, passes=1).dataset.cached is None
    assert loader(train, passes=2).dataset.cached is not None


@pytest.mark.parametrize('workers', [0, 2])
def test_what_images_are_like_is_noted_as_they_are_read(tmp_path, monkeypatch, caplog, workers: int) -> None:
    """Transparent ones and copies on both sides of a split, in memory that the workers share."""
    monkeypatch.setattr('timm_dfpt.data.datasets.SMALL', 5)
    for split, count in (('train', 4), ('val', 2)):
        for name in 'ab':
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([i, ord(name)]).integers(0, 256, (6, 6, 4), dtype=np.uint8)
                # The first of each class lies in both splits, and one in three is transparent.
                pixels[..., 3] = 128 if (i, name) == (0, 'a') else 255
                pixels[0, 0, 0] = 0 if i == 0 else len(split)
                Image.fromarray(pixels).save(tmp_path / split / name / f'{i}.png')
    splits = load_splits(str(tmp_path))
    parts = {'train': splits.train, 'val': splits.val}
    for split in parts.values():
        assert split.findings.read().shape == (0, 3)
        list(loader(split, is_training=False, workers=workers, cache_images='off', batch_size=3))
        assert split.findings.read()[:, 0].tolist() == list(range(len(split)))
    report_findings(parts, {role: split.findings.read() for role, split in parts.items()})
    assert '2 of 12 images have transparent pixels' in caplog.text
    assert "2 of 4 images of split 'val' are also in the training split" in caplog.text
    assert f'{tmp_path}/val/a/0.png' in caplog.text
    assert f'{tmp_path}/train/a/0.png' in caplog.text


def test_padded_crops_image_by_image(train) -> None:
    # Erasing, though it hardly ever happens, makes this the path of timm's transforms.
    config = AugmentConfig(crop_padding=2, hflip=0, color_jitter=None, reprob=1e-9)
    plain = create_transform(**RGB)
    black = torch.tensor([-m / s for m, s in zip(RGB['mean'], RGB['std'], strict=True)]).view(3, 1, 1)
    seen = set()
    for images, _, index in loader(train, augmentation=config):
        for image, row in zip(images, index.tolist(), strict=True):
            padded = black.expand(3, 28, 24).clone()
            padded[:, 2:-2, 2:-2] = plain(Image.open(train.encoded([row])[0]).convert('RGB'))
            crops = padded.unfold(1, 24, 1).unfold(2, 20, 1)  # [C, 5, 5, 24, 20]
            difference = (crops - image[:, None, None]).abs().amax((0, 3, 4))
            assert difference.min() < 1e-6
            seen.add(int(difference.argmin()))
    assert len(seen) > 10


@pytest.mark.parametrize('augmentation', [SIMPLE, CROPS, PER_IMAGE], ids=['batch', 'crops', 'image'])
def test_workers_batches_and_caching_change_no_image(train, augmentation) -> None:
    here = [epoch_of(loader(train, augmentation=augmentation, cache_images='off'), epoch) for epoch in range(3)]
    elsewhere = loader(train, augmentation=augmentation, workers=2)  # workers that outlive an epoch
    for epoch in range(3):
        assert_same(epoch_of(elsewhere, epoch), here[epoch])
    backwards = loader(train, augmentation=augmentation)
    for epoch in (2, 0):
        assert_same(epoch_of(backwards, epoch), here[epoch])
    larger = by_row(epoch_of(loader(train, augmentation=augmentation, batch_size=11), 1))
    smaller = by_row(here[1])
    assert len(smaller) == 32
    assert all(torch.equal(image, larger[row]) for row, image in smaller.items())
    other_epoch, other_seed = by_row(here[2]), by_row(epoch_of(loader(train, augmentation=augmentation, seed=6), 1))
    for other in (other_epoch, other_seed):
        assert any(not torch.equal(image, other[row]) for row, image in smaller.items() if row in other)
        assert list(other) != list(smaller)


@pytest.mark.parametrize('augmentation', [SIMPLE, CROPS, PER_IMAGE], ids=['batch', 'crops', 'image'])
def test_global_random_numbers_are_neither_used_nor_changed(train, augmentation) -> None:
    batches = loader(train, augmentation=augmentation)
    expected = epoch_of(batches, 1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    assert_same(epoch_of(batches, 1), expected)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_accelerate_keeps_order_and_resumes_in_the_middle(train, accelerator) -> None:
    plain = loader(train)
    prepared = accelerator.prepare(loader(train))
    for epoch in (0, 3):
        prepared.set_epoch(epoch)
        assert_same(list(prepared), epoch_of(plain, epoch))
    resumed = accelerator.prepare(loader(train))
    rest = skip_first_batches(resumed, 5)
    rest.set_epoch(3)
    assert_same(list(rest), epoch_of(plain, 3)[5:])
    resumed.set_epoch(4)
    assert_same(list(resumed), epoch_of(plain, 4))


@pytest.mark.parametrize('is_training', [True, False])
def test_processes_share_each_global_batch(train, accelerator, is_training: bool) -> None:
    whole = loader(train, is_training=is_training)
    shards = [
        prepare_data_loader(copy, num_processes=2, process_index=rank, split_batches=True)
        for rank, copy in enumerate([loader(train, is_training=is_training) for _ in range(2)])
    ]
    for skip in (0, 3):
        for epoch in (1, 2):
            left = [skip_first_batches(shard, skip) if skip else shard for shard in shards]
            for shard in left:
                shard.set_epoch(epoch)
            parts = zip(*left, strict=True)
            joined = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in parts]
            expected = epoch_of(whole, epoch)[skip:]
            if not is_training:  # 33 images: accelerate fills the last batch up, and drops what it added when gathering
                joined[-1] = tuple(part[:1] for part in joined[-1])
            assert_same(joined, expected)


def test_shards_of_the_sampler_are_a_partition(train) -> None:
    sampler = BatchSampler(loader(train).sampler, 4, drop_last=True)
    whole = list(sampler)
    halves = [list(BatchSamplerShard(sampler, 2, rank, split_batches=True)) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    rows = [row for batch in whole for _, row in batch]
    assert len(set(rows)) == len(rows) == 32


def test_caching_is_chosen_by_size_and_augmentation(train, monkeypatch) -> None:
    assert loader(train).dataset.cached.shape == (33, 3, 24, 20)
    assert loader(train, augmentation=PER_IMAGE).dataset.cached is None
    assert loader(train, augmentation=AugmentConfig()).dataset.cached is None
    monkeypatch.setattr('timm_dfpt.data.loader._CACHE_BYTES', 33 * 3 * 24 * 20 - 1)
    assert loader(train).dataset.cached is None
    assert loader(train, cache_images='on').dataset.cached is not None


def test_image_damaged_after_the_check_is_named(tmp_path, folder) -> None:
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.open(folder / 'train' / name / '00.png').save(tmp_path / name / f'{i}.png')
    split = load_splits(str(tmp_path)).train
    damaged = Path(split.encoded([2])[0])
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(BadImageError, match=rf"{damaged} \(row 2 of split 'train'\)"):
        loader(split)
    with pytest.raises(BadImageError, match=str(damaged)):
        list(loader(split, cache_images='off', batch_size=2))


BAD = {
    'batch larger than the data': ({'batch_size': 34}, 'has 33 images, fewer than one batch of batch_size=34'),
    'batch of none': ({'batch_size': 0}, 'batch_size=0'),
    'negative seed': ({'seed': -1}, 'seed=-1'),
    'negative workers': ({'workers': -1}, 'workers=-1'),
    'unknown caching': ({'cache_images': 'yes'}, "cache_images='yes'"),
    'caching of random crops': ({'cache_images': 'on', 'augmentation': AugmentConfig()}, 'crop_padding=0'),
    'caching of a policy': (
        {'cache_images': 'on', 'augmentation': AugmentConfig(crop_padding=2, aa='rand-m9')},
        "aa='rand-m9'",
    ),
    'four channels': ({'data_config': RGB | {'input_size': (4, 8, 8)}}, r'input_size=\(4, 8, 8\)'),
    'no size': ({'data_config': RGB | {'input_size': (3, 0, 8)}}, r'input_size=\(3, 0, 8\)'),
    'no channels': ({'data_config': RGB | {'input_size': (8, 8)}}, r'input_size=\(8, 8\)'),
    'mean of other channels': ({'data_config': GREY | {'mean': (0.1, 0.2, 0.3)}}, 'mean=.* one value per channel'),
    'no statistics': ({'data_config': {'input_size': (3, 8, 8)}}, r"lacks \['mean', 'std'\]"),
    'unknown policy': ({'augmentation': AugmentConfig(aa='best')}, "aa='best'"),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_arguments_are_refused(train, name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        loader(train, **arguments)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'hflip': 1.1}, 'hflip must be at least 0 and at most 1, got 1.1'),
        ({'reprob': -0.1}, 'reprob must be at least 0'),
        ({'crop_padding': -1}, 'crop_padding must be at least 0'),
        ({'train_crop_mode': 'ccc'}, "train_crop_mode must be one of rrc, rkrc, rkrr, got 'ccc'"),
        ({'scale': (0.5, 0.1)}, 'scale='),
        ({'ratio': (0.5,)}, 'ratio='),
        ({'crop_padding': 2, 'no_aug': True}, 'crop_padding=2 and no_aug'),
        ({'crop_padding': 2, 'scale': (0.1, 1)}, 'crop_padding=2 and scale'),
    ],
)
def test_bad_augmentation_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**arguments)
