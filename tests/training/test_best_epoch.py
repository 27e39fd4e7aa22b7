"""The epoch whose weights are exported: the last, or the best on the validation data; and patience with the rest."""
from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import TinyJob
from timm_dfpt.hub.files import read_json
from timm_dfpt.training.compare import main as compare
from timm_dfpt.training.pages import write_page
from timm_dfpt.training.publish import publish_run
from timm_dfpt.training.run import main
from timm_dfpt.training.run_folder import RunFolder

# So large a rate that epochs are not each better than the one before; the prompt path is frozen in some of them.
UNSTEADY = (
    '--epochs', '5', '--lr', '0.6', '--sched', 'constant', '--export-epochs', '1', '2', '3', '4', '5',
    '--prompt-epochs', '2',
)  # fmt: skip


@pytest.fixture(scope='module')
def best(tiny: TinyJob, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp('best')
    argv = tiny.argv(folder / 'run', *UNSTEADY, '--export-weights', 'best')
    assert main(argv) == 0
    return folder / 'run', argv


def validations(run: Path, learner: str = 'dfpt') -> list[dict]:
    return [line[learner]['val'] for line in RunFolder(run).read_metrics()]


def rank(metrics: dict) -> tuple[float, float]:
    """The better of student and average, by accuracy, and by loss where that is equal."""
    return max((metrics[name]['top1'], -metrics[name]['loss']) for name in ('student', 'student_ema'))


def test_the_best_epoch_is_exported_with_its_own_numbers(best: tuple[Path, list[str]], tmp_path: Path) -> None:
    run, _ = best
    lines = validations(run)
    epoch = max(range(len(lines)), key=lambda i: rank(lines[i])) + 1
    assert epoch < 5, 'or the test cannot tell best from last'
    summary = RunFolder(run).read_summary()
    student = summary['models']['student']
    assert student['epoch'] == epoch
    assert summary['epochs_trained'] == 5
    name = {'last step': 'student', 'moving average': 'student_ema'}[student['weights']]
    assert student['val_metrics'] == lines[epoch - 1][name]
    # The prompt path is that of the epoch, too.
    path = summary['models']['prompt_path']['val_metrics']
    assert path['top1'] == lines[epoch - 1]['prompt_path']['top1']
    assert path['loss'] == lines[epoch - 1]['prompt_path']['loss']
    weights = [load_file(run / each / 'model.safetensors') for each in ('student', f'student-epoch{epoch}')]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    assert read_json(run / 'student' / 'distillation.json')['epoch'] == epoch
    words = f'eights of epoch {epoch} of 5, the best on the validation data'
    assert f'W{words}.' in write_page(RunFolder(run)).read_text()
    publish_run(run, 'alice/student', push_prompt_path='alice/path', dry_run=tmp_path / 'dry')
    for kind in ('student', 'prompt_path'):
        assert f'w{words}' in (tmp_path / 'dry' / kind / 'README.md').read_text()


def test_a_run_that_is_resumed_makes_the_same_choice(
    best: tuple[Path, list[str]], tiny: TinyJob, tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    """From a checkpoint after the best epoch, whose weights nothing else has any more."""
    run, argv = best
    shutil.copytree(run, tmp_path / 'run')
    for path in ('student', 'prompt_path', 'checkpoints/step-00000030'):
        shutil.rmtree(tmp_path / 'run' / path)
    assert main([*argv, '--output', str(tmp_path / 'run'), '--resume']) == 0
    for path in ('student/model.safetensors', 'prompt_path/prompt_path.safetensors'):
        assert (run / path).read_bytes() == (tmp_path / 'run' / path).read_bytes()
    models = [RunFolder(each).read_summary()['models'] for each in (run, tmp_path / 'run')]
    assert models[0]['student']['metrics'] == models[1]['student']['metrics']


def test_patience_ends_a_run(tiny: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The student cannot become better: its rate is next to nothing, and it has no statistics of images."""
    argv = [*tiny.vit_argv(tmp_path / 'run', '--epochs', '9', '--method', 'kd', '--opt', 'sgd', '--lr', '1e-30')]
    at = argv.index('--prompt-norm')
    del argv[at : at + 2]
    assert main([*argv, '--val-interval', '2', '--patience', '2']) == 0
    lines = RunFolder(tmp_path / 'run').read_metrics()
    assert [('val' in line['kd']) for line in lines] == [False, True] * 3
    shown = capsys.readouterr().out
    assert 'stopped after epoch 6 of 9: the last 2 validations were not better' in shown
    assert 'weights of epoch 6 of 9, after which' in shown
    summary = RunFolder(tmp_path / 'run').read_summary()
    assert (summary['epochs'], summary['epochs_trained']) == (9, 6)
    assert 'epoch' not in summary['models']['student']


def test_a_comparison_has_no_best_epoch(tiny: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'recipe.yaml').write_text('export_weights: best\n')
    argv = tiny.argv(tmp_path / 'run', '--config', str(tmp_path / 'recipe.yaml'), '--methods', 'kd', '--seeds', '0')
    assert compare(argv) == 1
    assert 'export_weights=best are not for comparisons' in capsys.readouterr().err
