"""`--teacher-head`: teachers of other classes, of the same in another order, and of none."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_dfpt
from tests.tiny import CLASSES, DATA_CONFIG, RESNET, SIZE, VIT, TinyJob
from timm_dfpt.hub.base import fingerprint
from timm_dfpt.hub.student import save_student
from timm_dfpt.job.cli import parse_config
from timm_dfpt.training.run import main, set_up


@pytest.fixture(scope='module')
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers that know other things: five classes, the same in another order, other names, nothing."""
    root = tmp_path_factory.mktemp('teachers')
    kinds = {'five': list('abcde'), 'order': ['cedar', 'ash', 'birch'], 'names': ['x', 'y', 'z'], 'unnamed': None}
    for kind, names in kinds.items():
        torch.manual_seed(3)
        classes = 3 if names is None else len(names)
        model = timm.create_model('resnet18', num_classes=classes, **{**RESNET, 'channels': [8, 16, 16, 32]})
        save_student(model, root / kind, label_names=names, data_config=DATA_CONFIG)
    torch.manual_seed(3)
    encoder = timm.create_model('test_vit', num_classes=0, img_size=SIZE, **VIT)
    save_student(encoder, root / 'encoder', data_config=DATA_CONFIG)
    return root


@pytest.fixture
def argv_of(tiny: TinyJob, teachers: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def arguments(teacher: str, name: str, *more: str) -> list[str]:
        argv = tiny.argv(tmp_path / name)
        argv[argv.index('--teacher') + 1] = f'local-dir:{teachers / teacher}'
        for flag in ('--model-ema', '--mixup', '--model-ema-decay'):
            at = argv.index(flag)
            del argv[at : at + (1 if flag == '--model-ema' else 2)]
        argv[argv.index('--epochs') + 1] = '1'
        return [*argv, '--batch-size', '64', *more]

    return arguments


@pytest.fixture
def job(argv_of: Callable[..., list[str]], tmp_path: Path) -> Callable[..., tuple[int, Path]]:
    def run(teacher: str, name: str, *more: str) -> tuple[int, Path]:
        try:
            return main(argv_of(teacher, name, *more)), tmp_path / name
        except SystemExit as stop:
            return int(str(stop.code)), tmp_path / name

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / 'student' / 'model.safetensors'))


def test_a_teacher_of_other_classes_teaches_every_method(job: Any, teachers: Path, capsys: Any) -> None:
    code, run = job('five', 'fit', '--baselines', 'kd')
    said = capsys.readouterr().out
    assert code == 0
    (line,) = [line for line in said.splitlines() if 'head fitted, as' in line]
    summary = json.loads((run / 'summary.json').read_text())
    head = summary['models']['teacher']['head']
    assert f'{head["accuracy"]:.2f}% top-1 on images left out' in line
    assert 'it knows 5 classes and the data have 3' in line
    assert line.endswith(f'{summary["models"]["teacher"]["val_metrics"]["top1"]:.2f}% top-1 on the validation data')
    published: Any = timm.create_model(f'local-dir:{teachers / "five"}', pretrained=True).eval()
    teacher = timm_dfpt.load_teacher(run / 'prompt_path', published)
    x = torch.randn(4, 3, SIZE, SIZE)
    record = json.loads((run / 'prompt_path' / 'prompt_config.json').read_text())
    assert record['base_fingerprint']['weights'] == fingerprint(published).weights
    with torch.no_grad():
        features = published.forward_head(published.forward_features(x), pre_logits=True)
        kept = load_file(run / 'teacher_heads' / 'dfpt.safetensors')
        expected = features @ kept['fc.weight'].T + kept['fc.bias']
        torch.testing.assert_close(teacher.original(x), expected)
    distillation = json.loads((run / 'baselines' / 'kd' / 'student' / 'distillation.json').read_text())
    assert distillation['teacher_head'] == head
    # One that is tuned on has the same head, and the same teacher for the baselines.
    code, tuned = job('five', 'on', '--prompt-path', str(run / 'prompt_path'), '--baselines', 'kd')
    assert code == 0
    assert 'with the head of its prompt path' in capsys.readouterr().out
    for name, tensor in load_file(tuned / 'prompt_path' / 'prompt_path.safetensors').items():
        if name.startswith('fitted_head.'):
            assert torch.equal(tensor, kept[name.removeprefix('fitted_head.')])


@pytest.mark.slow
def test_a_run_that_is_resumed_keeps_the_head(job: Any, capsys: Any) -> None:
    more = ('--epochs', '2', '--method', 'kd')
    _, whole = job('five', 'whole', *more)
    before = load_file(whole / 'teacher_heads' / 'kd.safetensors')
    shutil.rmtree(whole / 'student')
    for path in (whole / 'checkpoints').iterdir():
        if path.name == 'step-00000006':
            shutil.rmtree(path)
    shutil.copytree(whole, whole.with_name('copy'))
    capsys.readouterr()
    code, run = job('five', 'copy', *more, '--resume')
    assert code == 0
    assert 'kept in the run folder' in capsys.readouterr().out
    assert all(torch.equal(t, before[n]) for n, t in load_file(run / 'teacher_heads' / 'kd.safetensors').items())


def test_a_fitted_head_at_scale_0_is_a_new_head(job: Any) -> None:
    # Without blocks, which would be drawn after a new head, and so differ.
    path = ('--method', 'dfpt+', '--no-prompt-block', '--prompt-fusion', 'none')
    unheard = (*path, '--prompt-teacher-weight', '0', '--student-teacher-weight', '0')
    _, new = job('five', 'new', *path, '--teacher-head', 'new')
    code, run = job('five', 'zero', *unheard, '--prompt-head-init-scale', '0')
    assert code == 0
    expected = weights(new)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run).items())
    _, fitted = job('five', 'fitted', *unheard)
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in weights(fitted).items())


@pytest.mark.parametrize(
    ('more', 'warned'),
    [
        (('--prompt-head-init-scale', '0'), True),
        (('--prompt-head-init-scale', '0', '--epochs', '50', '--prompt-epochs', '50'), False),
        (('--prompt-head-init-scale', '0.3'), False),
        ((), False),
    ],
)
def test_a_small_head_needs_updates(argv_of: Any, caplog: Any, more: tuple[str, ...], warned: bool) -> None:
    # Three batches an epoch.
    setup = set_up(parse_config(argv_of('five', 'run', '--method', 'dfpt+', *more)))
    setup.create_learners({setup.config.method: setup.config})
    assert ('needs about 150 updates' in caplog.text) is warned


@pytest.mark.slow
def test_classes_in_another_order_are_mapped(job: Any, teachers: Path, tmp_path: Path, capsys: Any) -> None:
    code, run = job('order', 'mapped', '--method', 'kd')
    assert code == 0
    assert 'put into the order' in capsys.readouterr().out
    model: Any = timm.create_model(f'local-dir:{teachers / "order"}', pretrained=True)
    with torch.no_grad():
        for param in model.fc.parameters():
            param.copy_(param[[1, 2, 0]])
    save_student(model, teachers / 'sorted', label_names=CLASSES, data_config=DATA_CONFIG)
    _, plain = job('sorted', 'sorted', '--method', 'kd')
    expected = weights(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run).items())


@pytest.mark.parametrize(
    ('teacher', 'more', 'said'),
    [
        ('unnamed', ('--method', 'kd'), 'taken on trust'),
        ('names', ('--method', 'kd'), "class 0 is 'x' for the teacher and 'ash' in the data"),
        ('order', ('--method', 'kd', '--teacher-head', 'fit', '--teacher-head-balanced'), '--teacher-head says'),
        ('encoder', ('--method', 'kd'), 'it is an encoder without classes'),
        ('five', ('--teacher-head', 'new'), 'a = c = 0'),
    ],
)
def test_what_is_decided_is_said(argv_of: Any, teacher: str, more: tuple[str, ...], said: str) -> None:
    setup = set_up(parse_config(argv_of(teacher, 'run', *more)))
    heads = setup.teacher_heads()
    learners = setup.create_learners({setup.config.method: setup.config}, heads=heads)
    assert said in heads.reasons[learners[0].teacher]


@pytest.mark.parametrize(
    ('teacher', 'more', 'message'),
    [
        ('five', ('--teacher-head', 'own'), 'it knows 5 classes and the data have 3. Fit a head'),
        ('names', ('--teacher-head', 'own'), "class 0 is 'x'"),
        ('five', ('--teacher-head', 'new', '--method', 'kd'), 'which method=kd does not have'),
        ('five', ('--teacher-head', 'new', '--baselines', 'kd'), 'which method=kd does not have'),
        ('five', ('--teacher-head', 'new', '--prompt-teacher-weight', '1'), 'so a and c are 0'),
        ('five', ('--teacher-head', 'new', '--teacher-head-balanced'), 'fits no head'),
        ('five', ('--teacher-head', 'new', '--prompt-head-init-scale', '0.1'), 'the head begins with zeros'),
        ('five', ('--prompt-head-init-scale', '0.1', '--prompt-head-rank', '1'), 'prompt_head_rank=1 keeps that'),
        ('five', ('--prompt-head-init-scale', '0.1', '--no-prompt-head'), 'prompt_head=False keeps that'),
        ('five', ('--prompt-head-init-scale', '0.1', '--prompt-path', 'user/path'), 'no effect with --prompt-path'),
        ('five', ('--prompt-head-init-scale', '0.1', '--unlabelled'), 'learns from labels'),
        ('five', ('--teacher-kwargs', 'num_classes=3'), 'would be'),
    ],
)
def test_heads_that_cannot_be(job: Any, capsys: Any, teacher: str, more: tuple[str, ...], message: str) -> None:
    code, run = job(teacher, 'refused', *more)
    assert code in (1, 2)
    assert message in capsys.readouterr().err
    assert not run.exists()
