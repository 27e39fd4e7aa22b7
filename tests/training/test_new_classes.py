"""The quickstart of new classes: one run from a teacher of other classes to a student, alongside its baselines."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from timm_dfpt.training.run import main

TRAIN = Path(__file__).parents[2] / 'train'


def test_one_run_names_the_fitted_teacher_and_its_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / 'run'
    short = ['--epochs', '2', '--batch-size', '208', '--warmup-epochs', '0', '--no-report', '--cpu']
    assert main(['--config', str(TRAIN / 'recipes' / 'quickstart_new_classes.yaml'), *short, '--output', str(run)]) == 0
    said = capsys.readouterr().out
    summary = json.loads((run / 'summary.json').read_text())
    teacher = timm.create_model(f'local-dir:{TRAIN / "quickstart_new_classes" / "teacher"}', pretrained=True)
    known = teacher.pretrained_cfg['label_names']
    assert not set(known) & set(summary['class_names'])
    assert summary['models']['teacher']['head']['how'] == 'fitted'
    # Its features know letters before anything is trained; guessing is right for 3.8%.
    assert summary['models']['teacher']['metrics']['top1'] > 70
    baselines = ('dfpt+ against the student alone, ', 'dfpt+ against kd from the fitted teacher, ')
    for words in ('| teacher, head fitted (', '| student alone (', '| student of kd (', *baselines):
        assert words in said, words
    student = timm.create_model(f'local-dir:{run / "student"}', pretrained=True)
    assert student(torch.zeros(1, 1, 32, 32)).shape == (1, 26)
    assert list(student.pretrained_cfg['label_names']) == summary['class_names']
