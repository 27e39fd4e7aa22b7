"""The command `timm-dfpt`: what it lists, and what its commands say of a tiny run that is finished."""
from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_calibration_error

import timm_dfpt
import timm_dfpt_cli
from tests.tiny import CLASSES, DATA_CONFIG, RESNET, TinyJob, write_teacher
from timm_dfpt.hub.student import save_student
from timm_dfpt.training.run import main as distill

ROOT = Path(__file__).parents[1]


def run(name: str, *argv: object) -> int:
    """Do a command in this process."""
    code: int = importlib.import_module(timm_dfpt_cli.COMMANDS[name].module).main([str(each) for each in argv])
    return code


def main(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        timm_dfpt_cli.main(argv)
    code: int = ended.value.code
    return code


@pytest.fixture(scope='module')
def finished(tiny: TinyJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DFPT-KD whose last batch of validation is not full."""
    folder = tmp_path_factory.mktemp('commands') / 'run'
    argv = tiny.argv(folder, '--epochs', '1', '--mixup', '0')
    at = argv.index('--model-ema')
    # The average, which is not what `kl_to_student` is measured to.
    del argv[at : at + 3]
    assert distill(argv) == 0
    return folder


def summary_of(folder: Path) -> dict:
    return json.loads((folder / 'summary.json').read_text())


def test_commands_are_listed_without_torch() -> None:
    code = 'import sys, timm_dfpt_cli; print(timm_dfpt_cli._usage()); assert "torch" not in sys.modules'
    shown = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name, command in timm_dfpt_cli.COMMANDS.items():
        assert f'{name} ' in shown
        assert command.about in shown


def test_what_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == main('--help') == main('-h') == 0
    assert capsys.readouterr().out.count('  evaluate  ') == 3
    assert main('--version') == 0
    assert capsys.readouterr().out == f'timm-dfpt {timm_dfpt.__version__}\n'
    assert main('evalute', '--json', 'x') == 2
    error = "error: 'evalute' is not a command. Did you mean 'evaluate'? See timm-dfpt --help.\n"
    assert capsys.readouterr().err == error


def test_help_into_a_pipe_whose_reader_is_gone() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, timm_dfpt_cli.__file__, '--help']
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, '')


@pytest.mark.parametrize('name', timm_dfpt_cli.COMMANDS)
def test_help_of_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, '--help')
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert shown.startswith(f'usage: timm-dfpt {name} ')
    assert shown.count('\n') < 100


def test_long_help_shows_what_the_short_one_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for flag in ('--help', '--help-all'):
        with pytest.raises(SystemExit):
            run('distill', flag)
        shown.append(capsys.readouterr().out)
    assert all('--dataset STR' in each for each in shown)
    assert ['--momentum FLOAT' in each for each in shown] == [False, True]
    # Some twenty, the two kinds of help and --config.
    assert shown[0].count('\n  -') < 25


@pytest.mark.slow
@pytest.mark.parametrize('module', ['timm_dfpt', 'timm_dfpt.training.run'])
def test_modules_that_launchers_take(module: str) -> None:
    command = ['distill', '--help'] if module == 'timm_dfpt' else ['--help']
    done = subprocess.run([sys.executable, '-m', module, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith('usage: timm-dfpt distill '), done.stderr
    assert not done.stderr


def test_evaluate_repeats_the_summary_to_the_bit(finished: Path, tmp_path: Path) -> None:
    assert run('evaluate', finished, '--json', tmp_path / 'found.json') == 0
    found = json.loads((tmp_path / 'found.json').read_text())['splits']['val']
    models = summary_of(finished)['models']
    assert found['images'] == 43
    assert {role: model['metrics'] for role, model in found['models'].items()} == {
        role: model['metrics'] for role, model in models.items()
    }
    classes = found['models']['student']['classes']
    assert [(each['name'], each['images']) for each in classes] == [('ash', 14), ('birch', 14), ('cedar', 15)]
    mean = sum(each['images'] * each['accuracy'] for each in classes) / 43
    assert mean == pytest.approx(models['student']['metrics']['top1'])


KINDS = {
    'unlabelled': ('--method', 'kd', '--unlabelled'),
    'an unlabelled path': ('--unlabelled', '--prompt-epochs', '1'),
    'unlabelled features': ('--unlabelled', '--method', 'feature', '--teacher', 'local-dir:{narrow}'),
    'features': ('--method', 'feature', '--model-ema', '--model-ema-decay', '0.9'),
    'a fitted head': ('--method', 'kd', '--teacher', 'local-dir:{other}', '--teacher-head-balanced'),
    'a path with a fitted head': ('--teacher', 'local-dir:{other}', '--prompt-head-rank', '1'),
    'a path with a new head': ('--teacher', 'local-dir:{other}', '--teacher-head', 'new'),
    'an average': ('--model-ema', '--model-ema-decay', '0.9', '--export-weights', 'best', '--epochs', '2'),
    'a copy in half precision': ('--method', 'dfpt+', '--teacher-dtype', 'bfloat16', '--validation-batch-size', '7'),
    'a larger teacher input': ('--teacher-input-size', '24', '--background', 'white', '--channels-last'),
    'a teacher in half precision': ('--teacher-dtype', 'bfloat16'),
    'without a teacher': ('--method', 'supervised', '--train-split', 'val', '--val-split', 'train'),
}


def test_features_through_a_layer_that_is_not_saved(
    tiny: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str], fresh_accelerate: Callable[[], None]
) -> None:
    argv = tiny.vit_argv(tmp_path / 'run', '--method', 'feature', '--unlabelled', '--epochs', '1')
    at = argv.index('--prompt-norm')
    del argv[at : at + 2]
    argv[argv.index('embed_dim=32')] = 'embed_dim=16'
    assert distill(argv) == 0
    fresh_accelerate()
    assert run('evaluate', tmp_path / 'run') == 1
    assert 'through a linear layer that is not saved with it' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_evaluate_repeats_the_summary_of_any_run(
    kind: str, tiny: TinyJob, tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    write_teacher(tmp_path / 'narrow', 'resnet18', **RESNET)
    other = timm.create_model('resnet18', num_classes=5, **RESNET)
    save_student(other, tmp_path / 'other', label_names=list('vwxyz'), data_config=DATA_CONFIG)
    argv = [*tiny.common(tmp_path / 'run'), '--dataset', str(tiny.data), '--epochs', '1', '--student', 'resnet18']
    argv += ['--student-kwargs', *(f'{key}={value}' for key, value in RESNET.items())]
    argv += [] if 'supervised' in KINDS[kind] else ['--teacher', f'local-dir:{tiny.teacher}']
    places = {name: tmp_path / name for name in ('narrow', 'other')}
    assert distill([*argv, *(each.format(**places) for each in KINDS[kind])]) == 0
    fresh_accelerate()
    assert run('evaluate', tmp_path / 'run', '--json', tmp_path / 'found.json') == 0
    models = json.loads((tmp_path / 'found.json').read_text())['splits']['val']['models']
    found = {role: model['metrics'] for role, model in models.items()}
    measured = {role: model['val_metrics'] for role, model in summary_of(tmp_path / 'run')['models'].items()}
    expected = {role: metrics for role, metrics in measured.items() if metrics is not None}
    if '--model-ema' in KINDS[kind]:
        for metrics in (*found.values(), *expected.values()):
            metrics.pop('kl_to_student', None)
    assert found['student']
    assert found == expected


def test_evaluate_and_predict_a_student_by_what_timm_says(finished: Path, tiny: TinyJob, tmp_path: Path) -> None:
    """Also on a folder whose classes are in another order and one of which is missing."""
    data = tmp_path / 'data'
    shutil.copytree(tiny.data / 'val' / 'cedar', data / 'cedar')
    shutil.copytree(tiny.data / 'val' / 'birch', data / 'birch')
    files = sorted(data.rglob('*.png'))
    student = timm.create_model(f'local-dir:{finished / "student"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student))
    with torch.no_grad():
        logits = student(torch.stack([transform(Image.open(file).convert('RGB')) for file in files]))
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    assert run('evaluate', finished / 'student', '--dataset', data, '--json', tmp_path / 'found.json') == 0
    found = json.loads((tmp_path / 'found.json').read_text())['splits']['train']['models']['student']
    assert found['metrics']['top1'] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert found['metrics']['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    expected = multiclass_calibration_error(logits, labels, num_classes=3, n_bins=15)
    assert found['calibration_error'] == pytest.approx(100 * expected.item(), abs=1e-3)
    assert found['classes'][0] == {'name': 'ash', 'images': 0, 'accuracy': None}

    assert run('predict', finished, data, files[0], '--top-k', '2', '--output', tmp_path / 'out.csv') == 0
    rows = list(csv.DictReader((tmp_path / 'out.csv').open(newline='')))
    assert [row['file'] for row in rows] == [str(file) for file in (*files, files[0])]
    assert [row['label_1'] for row in rows[:-1]] == [CLASSES[i] for i in logits.argmax(1)]
    top = logits.softmax(1).topk(2).values
    assert np.allclose([[float(row[f'probability_{i}']) for i in (1, 2)] for row in rows[:-1]], top, atol=1e-5)
    assert not any(row['error'] for row in rows)


def test_evaluate_a_prompt_path_as_the_run_did(finished: Path, tiny: TinyJob, tmp_path: Path) -> None:
    """Teacher and student take images of one size here."""
    argv = [finished / 'prompt_path', '--dataset', tiny.data, '--json', tmp_path / 'found.json']
    assert run('evaluate', *argv, '--split', 'val', '--base-model', f'local-dir:{tiny.teacher}') == 0
    found = json.loads((tmp_path / 'found.json').read_text())['splits']['val']['models']['prompt_path']
    assert found['metrics']['top1'] == summary_of(finished)['models']['prompt_path']['metrics']['top1']


def test_a_bad_image_is_a_row(
    finished: Path, tiny: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tiny.data / 'val' / 'cedar' / '000.png'
    (tmp_path / 'cut.png').write_bytes(good.read_bytes()[:80])
    (tmp_path / 'empty.jpg').touch()
    (tmp_path / 'a, "b".png').write_bytes(good.read_bytes())
    assert run('predict', finished, tmp_path) == 0
    output = capsys.readouterr()
    rows = list(csv.DictReader(output.out.splitlines()))
    assert [Path(row['file']).name for row in rows] == ['a, "b".png', 'cut.png', 'empty.jpg']
    assert [bool(row['error']) for row in rows] == [not row['label_3'] for row in rows] == [False, True, True]
    assert rows[2]['error'] == 'the file is empty (0 bytes)'
    assert output.err.endswith('warning: 2 of 3 images cannot be read, see the column error.\n')


def test_images_of_every_kind_are_read_as_in_training(finished: Path, tmp_path: Path) -> None:
    rng, size = np.random.default_rng(0), (16, 16)
    folder = tmp_path / 'images'
    folder.mkdir()
    grey, colors = rng.integers(0, 256, size, np.uint8), rng.integers(0, 256, (*size, 4), np.uint8)
    deep, opaque = rng.integers(0, 65536, size, np.uint16), colors[..., 3:] / 255
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(colors).save(folder / 'alpha.png')
    Image.fromarray(deep).save(folder / 'deep.png')
    Image.fromarray(colors[..., :3]).save(folder / 'exif.png', exif=turned)
    Image.fromarray(grey).save(folder / 'grey.png')
    expected = [
        colors[..., :3] * opaque + 255 * (1 - opaque), np.repeat(deep[..., None] / 257, 3, 2),
        np.rot90(colors[..., :3], -1), np.repeat(grey[..., None], 3, 2),
    ]  # fmt: skip
    pixels = torch.from_numpy(np.stack([each.astype(np.float32) for each in expected])).permute(0, 3, 1, 2)
    student = timm.create_model(f'local-dir:{finished / "student"}', pretrained=True).eval()
    with torch.no_grad():
        probabilities = student((pixels / 255 - 0.5) / 0.25).softmax(1)
    output = tmp_path / 'out.csv'
    assert run('predict', finished, folder, '--background', 'white', '--output', output) == 0
    rows = list(csv.DictReader(output.open(newline='')))
    assert [Path(row['file']).name for row in rows] == ['alpha.png', 'deep.png', 'exif.png', 'grey.png']
    # Pixels are rounded to whole numbers.
    assert np.allclose([float(row['probability_1']) for row in rows], probabilities.max(1).values, atol=1e-3)


@pytest.mark.slow
def test_exported_files_say_the_same(finished: Path, tiny: TinyJob, tmp_path: Path, fresh_accelerate: object) -> None:
    student, images = tmp_path / 'run' / 'student', tiny.data / 'val'
    shutil.copytree(finished, tmp_path / 'run')
    assert run('export', student, '--output', tmp_path / 'files', '--formats', 'onnx', 'pt2') == 0
    assert {path.name for path in (tmp_path / 'files').iterdir()} == {'model.onnx', 'model_fp16.onnx', 'model.pt2'}
    tables = []
    for model in (student, tmp_path / 'files' / 'model.onnx'):
        file = tmp_path / f'{model.name}.csv'
        assert run('predict', model, images, '--output', file) == 0
        tables.append(list(csv.DictReader(file.open(newline=''))))
    assert len(tables[0]) == 43
    assert [row['label_1'] for row in tables[0]] == [row['label_1'] for row in tables[1]]
    first = [[float(row['probability_1']) for row in table] for table in tables]
    assert np.allclose(*first, atol=1e-4)
    argv = [tmp_path / 'files' / 'model.onnx', '--dataset', tiny.data, '--json', tmp_path / 'f.json']
    assert run('evaluate', *argv) == 0
    found = json.loads((tmp_path / 'f.json').read_text())['splits']['val']['models']['student']
    assert found['metrics']['top1'] == summary_of(finished)['models']['student']['metrics']['top1']
    assert 'exported/model.pt2' not in (tmp_path / 'run' / 'report.html').read_text()
    assert run('export', tmp_path / 'run', '--formats', 'pt2', '--include-preprocessing') == 0
    assert [row['format'] for row in summary_of(tmp_path / 'run')['exports']] == ['timm', 'torch.export']
    assert (tmp_path / 'run' / 'exported' / 'model.pt2').is_file()
    assert 'exported/model.pt2' in (tmp_path / 'run' / 'report.html').read_text()
    # Who has taken the report away does not want one.
    (tmp_path / 'run' / 'report.html').unlink()
    assert run('export', tmp_path / 'run', '--formats', 'pt2') == 0
    assert not (tmp_path / 'run' / 'report.html').exists()


WRONG = {
    'no such model': (['predict', 'nowhere/at/all', '{images}'], 'nowhere/at/all'),
    'no such file': (['predict', 'model.onnx', '{images}'], "MODEL 'model.onnx': there is no such file"),
    'a file of another kind': (['predict', '{run}/config.yaml', '{images}'], 'is a file other than .onnx'),
    'nearly a file': (['predict', '{root}/modle.onnx', '{images}'], "no such file (did you mean '{root}/model.onnx'?)"),
    'nearly a run': (['report', '{unfinished}d'], "is not a folder (did you mean '{unfinished}'?)"),
    'nothing to calibrate with': (
        ['export', '{run}/student', '--output', '{empty}', '--dataset', '{root}/untrained'],
        "no training split among ['val', 'test']: name a --dataset that has one",
    ),
    'no such image': (['predict', '{run}', './nothing.png'], "'./nothing.png': there is no such file or folder"),
    'a folder without images': (['predict', '{run}', '{empty}'], 'holds no image'),
    'no data': (['evaluate', '{run}/student'], 'dataset is not given'),
    'an option of data without data': (['evaluate', '{run}', '--split', 'val'], 'split needs --dataset'),
    'no such split': (
        ['evaluate', '{run}', '--dataset', '{data}', '--split', 'tset'],
        "split='tset' is unknown; the dataset has the splits ['train', 'val']: name one of them with --split",
    ),
    'other classes': (['evaluate', '{run}', '--dataset', '{other}'], "images of class 'x', which is not one of the 3"),
    'no folder to export to': (['export', '{run}/student'], 'name the folder to write to with --output'),
    'a folder for a run': (['export', '{run}', '--output', '{empty}'], 'output is not for a run'),
    'a prompt path of an unpublished teacher': (
        ['predict', '{run}/prompt_path', '{images}'], 'Name it with --base-model',
    ),
    'a base of a student': (['predict', '{run}', '{images}', '--base-model', 'resnet18'], 'base_model is of a prompt'),
    'a prompt path to export': (['export', '{run}/prompt_path', '--output', '{empty}'], 'is not a student'),
    'a file to export to': (['export', '{run}/student', '--output', '{run}/config.yaml'], 'is a file: name another'),
    'a split of a folder': (['predict', '{run}', '{images}', '--split', 'val'], 'leave --split out'),
    'a split of a file': (['predict', '{run}', '{run}/config.yaml', '--split', 'val'], "config.yaml' is a file"),
    'no color': (['predict', '{run}', '{images}', '--background', 'no'], "background='no' must be a color"),
    'a revision of a run, evaluated': (['evaluate', '{run}', '--revision', 'v1'], 'revision needs --dataset'),
    'a base of a run': (['evaluate', '{run}', '--base-model', 'resnet18'], 'base_model needs --dataset'),
    'a revision of a run, exported': (['export', '{run}', '--revision', 'v1'], 'revision is not for a run'),
    'a revision of a folder': (
        ['predict', '{run}/student', '{images}', '--revision', 'v1'], "revision='v1' is for repositories on the Hub",
    ),
    'a comparison': (['predict', '{compared}', '{images}'], 'students, such as {compared}/seed-0/arms/kd/student.'),
    'a seed of it': (['evaluate', '{compared}/seed-0'], 'such as {compared}/seed-0/arms/kd/student.'),
    'no data, and no run that has some': (['evaluate', 'nothere'], "a run folder has its own, and 'nothere' is none"),
    'a report of no folder': (['report', 'nothere'], "'nothere' is not a folder"),
    'a run that is not finished': (['predict', '{unfinished}', '{images}'], 'a run that is not finished'),
}  # fmt: skip


@pytest.mark.parametrize('name', WRONG)
def test_bad_input(
    name: str, finished: Path, tiny: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, words = WRONG[name]
    for folder in ('empty', 'unfinished', 'other'):
        (tmp_path / folder).mkdir()
    (tmp_path / 'model.onnx').touch()
    (tmp_path / 'untrained').mkdir()
    for split in ('val', 'test'):
        (tmp_path / 'untrained' / split).symlink_to(tiny.data / 'val')
    for file in ('config.yaml', 'metrics.jsonl'):
        shutil.copy(finished / file, tmp_path / 'unfinished')
    (tmp_path / 'compared' / 'seed-0' / 'arms' / 'kd' / 'student').mkdir(parents=True)
    for file in ('config.yaml', 'metrics.jsonl', 'summary.json'):
        shutil.copy(finished / file, tmp_path / 'compared' / 'seed-0')
    for label in 'xy':
        shutil.copytree(tiny.data / 'val' / 'ash', tmp_path / 'other' / label)
    places = {each: tmp_path / each for each in ('empty', 'unfinished', 'other', 'compared')}
    places |= {'root': tmp_path, 'run': finished, 'data': tiny.data, 'images': tiny.data / 'val'}
    assert run(*(each.format(**places) for each in argv)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith('error: ')
    assert words.format(**places) in last
    assert not list((tmp_path / 'empty').iterdir())


@pytest.mark.parametrize(
    ('name', 'option', 'value', 'words'),
    [
        ('predict', '--output', '{photo}', 'exists: name another file'),
        ('predict', '--output', '{folder}', 'exists: name another file'),
        ('predict', '--output', os.devnull, 'exists: name another file'),
        ('predict', '--output', '{folder}/no/out.csv', 'is not a folder that can be written to'),
        ('evaluate', '--json', '{photo}', 'exists: name another file'),
        ('evaluate', '--json', '{folder}/no/out.json', 'is not a folder that can be written to'),
        ('evaluate', '--batch-size', '0', 'must be at least 1, got 0'),
        ('evaluate', '--workers', '-1', 'must be at least 0, got -1'),
        ('predict', '--top-k', 'many', "invalid integer value: 'many'"),
    ],
)
def test_bad_values(
    name: str, option: str, value: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before a model is opened; what is there already is not replaced."""
    photo = tmp_path / 'photo.png'
    photo.write_bytes(b'kept')
    with pytest.raises(SystemExit) as ended:
        run(name, 'model', *[photo] * (name == 'predict'), option, value.format(photo=photo, folder=tmp_path))
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['photo.png']
    assert photo.read_bytes() == b'kept'
