"""A run whose teacher sees larger images than the student: said, saved, and part of what is resumed and cached."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

import timm_dfpt
from tests.tiny import DATA_CONFIG, TinyJob
from timm_dfpt.data.datasets import load_splits
from timm_dfpt.data.loader import create_loader
from timm_dfpt.job.cli import parse_config
from timm_dfpt.training.report import closing_table
from timm_dfpt.training.run import run


def test_a_teacher_of_larger_images(tiny: TinyJob, tmp_path: Path, fresh_accelerate: Callable[[], None]) -> None:
    folder = tmp_path / 'run'
    cache = ['--cache-teacher', '--no-aug', '--crop-padding', '0', '--teacher-cache-dir', str(tmp_path / 'cache')]
    argv = tiny.vit_argv(folder, '--epochs', '1', '--baselines', 'kd', *cache)
    fresh_accelerate()
    run(parse_config([*argv, '--teacher-input-size', '24']))
    summary = json.loads((folder / 'summary.json').read_text())
    assert summary['models']['teacher']['input_size'] == [24, 24]
    assert summary['models']['prompt_path']['input_size'] == [24, 24]
    assert 'input_size' not in summary['models']['student']
    assert '(local-dir:' in (table := closing_table(summary))
    assert 'at 24 x 24' in table
    (logits,) = (tmp_path / 'cache').iterdir()

    published = timm_dfpt.load_student(tiny.vit_teacher)
    teacher = timm_dfpt.load_teacher(folder / 'prompt_path', model=published)
    assert resolve_model_data_config(teacher.model)['input_size'] == (3, 24, 24)
    assert teacher(torch.randn(2, 3, 24, 24)).prompt.shape == (2, 3)
    # What the cache has of an image without augmentation is what the teacher makes of the resized one.
    images = create_loader(
        load_splits(str(tiny.data)).train, data_config=DATA_CONFIG, batch_size=32, is_training=False
    )
    x, _, rows = next(iter(images))
    expected = teacher.original(F.interpolate(x, (24, 24), mode='bicubic', antialias=True))
    kept = load_file(logits)
    known = kept['known'][0, rows].bool()
    assert known.any()
    torch.testing.assert_close(kept['logits'][0, rows[known]], expected[known], rtol=1e-4, atol=1e-5)

    for size, message in (([], 'other options.*teacher_input_size'), (['20'], 'other options.*teacher_input_size')):
        fresh_accelerate()
        given = ['--teacher-input-size', *size] if size else []
        with pytest.raises(ValueError, match=message):
            run(parse_config([*argv, '--resume', *given]))
    for given, message in (
        (['--teacher-input-size', '20'], r'tuned on the base model at input_size=\(24, 24\), not at \(20, 20\)'),
        ([], 'give --teacher-input-size 24 24'),
    ):
        fresh_accelerate()
        again = tiny.vit_argv(tmp_path / 'again', '--prompt-path', str(folder / 'prompt_path'), *given)
        # A path brings its own shape along.
        at = again.index('--prompt-norm')
        del again[at : at + 2]
        with pytest.raises(ValueError, match=message):
            run(parse_config(again))


def test_sizes_that_cannot_be(
    tiny: TinyJob, tmp_path: Path, fresh_accelerate: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fresh_accelerate()
    with pytest.raises(ValueError, match=r'teacher_input_size=\[18\].*patches of 4 x 4'):
        run(parse_config(tiny.vit_argv(tmp_path / 'run', '--teacher-input-size', '18')))
    assert not (tmp_path / 'run').exists()
    for given, message in (
        (['8', '8', '8'], 'teacher_input_size must be a side or H W'),
        (['0'], 'teacher_input_size must be at least 1'),
        (['24', '--method', 'supervised'], 'method=supervised'),
    ):
        with pytest.raises(SystemExit):
            parse_config(tiny.vit_argv(tmp_path / 'run', '--teacher-input-size', *given))
        assert message in capsys.readouterr().err
