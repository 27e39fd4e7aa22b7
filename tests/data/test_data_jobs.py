"""Jobs on data as people have it: what is reported before training, kept for resuming, and recorded for others."""

import dataclasses
import inspect
import shutil
import struct
import zlib

import pytest
import timm
from PIL import Image

from timm_dfpt.data.augment import AugmentConfig
from timm_dfpt.data.datasets import load_splits
from timm_dfpt.data.loader import create_loader, default_batch_size
from timm_dfpt.hub.repo_folder import write_student_repo
from timm_dfpt.hub.student import save_student
from timm_dfpt.job.cli import load_recipe, parse_config, save_config
from timm_dfpt.job.options import TrainConfig, public_options
from timm_dfpt.training.run import main
from timm_dfpt.training.run_folder import RunFolder


def test_parameters_of_the_data_are_called_as_their_options() -> None:
    """Else messages would name what is not on the command line."""
    options = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(inspect.signature(load_splits).parameters) - {'once', 'teacher_classes'} <= options
    assert {field.name for field in dataclasses.fields(AugmentConfig)} <= options
    own = {'data_config', 'is_training', 'augmentation', 'pin_memory', 'passes'}
    assert set(inspect.signature(create_loader).parameters) - own <= options


def test_defaults_of_the_augmentation_are_those_of_the_options() -> None:
    options = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for field in dataclasses.fields(AugmentConfig):
        if field.name not in ('scale', 'ratio'):  # lists on the command line
            assert field.default == options[field.name], field.name


@pytest.mark.parametrize(
    ('images', 'processes', 'size'),
    [
        (10**6, 1, 128), (1280, 1, 128), (1279, 1, 64), (640, 1, 64), (185, 1, 16), (160, 1, 16), (159, 1, 8),
        (79, 1, 8), (3, 1, 8), (79, 4, 8), (79, 8, 16), (10**6, 3, 128),
    ],
)  # fmt: skip
def test_batch_size_for_few_images(images: int, processes: int, size: int) -> None:
    assert default_batch_size(images, processes) == size


def without(argv: list[str], *flags: str) -> list[str]:
    for flag in flags:
        at = argv.index(flag)
        argv = argv[:at] + argv[at + 2 :]
    return argv


def test_few_transparent_images(tiny, tmp_path, capsys, caplog) -> None:
    data = tmp_path / 'Data' / 'photos'
    for split, name in (('train', 'Training'), ('val', 'Validation')):
        shutil.copytree(tiny.data / split, data / name)
    for file in list((data / 'Training' / 'ash').iterdir())[:3]:
        image = Image.open(file).convert('RGBA')
        image.putalpha(100)
        image.save(file)
    (data / 'Training' / '.ipynb_checkpoints').mkdir()
    argv = without(tiny.argv(tmp_path / 'run', '--dataset', str(data.parent)), '--batch-size')
    argv += ['--method', 'kd', '--epochs', '1']
    assert main(argv) == 0
    out = capsys.readouterr().out
    said = 'small dataset: batch size 16 instead of 128, as --batch-size was not given; the learning rate stays 0.05'
    assert said in out
    assert '3 classes, 216 images to train on, 43 to validate on' in out
    assert '13 steps of 16 images per epoch; 8 images are left out of each epoch' in out
    assert '3 of 259 images have transparent pixels' in caplog.text
    options = parse_config([*argv, '--resume'])
    for size in (16, 64):
        folder = RunFolder.claim(options)
        config = load_recipe(folder.config)
        assert config['batch_size'] == folder.resumed(options).batch_size == size
        # Another one, had there been fewer images then.
        save_config(TrainConfig(**{**config, 'batch_size': 64}), folder.config)


def test_a_background_is_told_to_those_who_use_the_student(tmp_path) -> None:
    white, same = (
        TrainConfig(student='resnet18', dataset='x', method='supervised', background=text)
        for text in ('white', '255,255,255')
    )
    assert white == same
    model = timm.create_model('test_resnet', num_classes=2)
    student = save_student(model, tmp_path / 'student', distillation={'recipe': public_options(white)})
    (tmp_path / 'repo').mkdir()
    write_student_repo(student, tmp_path / 'repo', 'user/student')
    card = (tmp_path / 'repo' / 'README.md').read_text()
    assert 'laid over the color `#ffffff`' in card
    assert card.count("Image.alpha_composite(Image.new('RGBA', image.size, '#ffffff'), image).convert('RGB')") == 2


def short_png(width: int) -> bytes:
    """A PNG whose checksums are right, and whose compressed pixels end in the middle."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, width, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(width))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')


@pytest.mark.parametrize('workers', ['0', '2'])
def test_a_bad_image_in_training_is_one_line_and_a_checkpoint(tiny, tmp_path, capfd, monkeypatch, workers: str) -> None:
    """In a large set, none of which is read before; with the image replaced the run ends as if nothing had been."""
    monkeypatch.setattr('timm_dfpt.data.datasets.SMALL', 5)
    monkeypatch.setattr('timm_dfpt.data.fingerprint.SMALL', 5)
    monkeypatch.setattr('timm_dfpt.data.fingerprint._SIZES', 2)
    shutil.copytree(tiny.data, tmp_path / 'data')
    argv = ['--dataset', str(tmp_path / 'data'), '--method', 'kd', '--workers', workers, '--cache-images', 'off']
    # Not among those whose sizes are known.
    bad = sorted((tmp_path / 'data' / 'train' / 'birch').iterdir())[5]
    good = bad.read_bytes()
    bad.write_bytes(short_png(16))
    capfd.readouterr()
    assert main(tiny.argv(tmp_path / 'run', *argv)) == 1
    shown = capfd.readouterr().err
    assert 'Traceback' not in shown
    errors = [line for line in shown.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1, shown
    assert errors[0].startswith(f'error: {bad} (row ')
    assert 'truncated' in errors[0]
    assert 'repair or remove it' in errors[0]
    assert '--on-bad-image skip' in errors[0]
    if workers == '2':
        return
    assert 'continue with' in errors[0]
    bad.write_bytes(good)
    assert main(tiny.argv(tmp_path / 'whole', *argv)) == 0
    assert main(tiny.argv(tmp_path / 'run', *argv, '--resume')) == 0
    ends = [(tmp_path / name / 'metrics.jsonl').read_text() for name in ('whole', 'run')]
    assert ends[0] == ends[1]
