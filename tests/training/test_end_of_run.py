"""Nothing after the last epoch can lose a run: what is exported first, and what becomes of what fails then."""
import json
import re
import shutil

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from tests.training.learner_steps import make_student, steps
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.tasks.baselines import SupervisedTask
from timm_dfpt.training import compare as compare_module
from timm_dfpt.training import publish as publish_module
from timm_dfpt.training import report
from timm_dfpt.training import run as run_module
from timm_dfpt.training.compare import main as compare
from timm_dfpt.training.learner import Learner
from timm_dfpt.training.publish import publish_run
from timm_dfpt.training.report import measure_cost
from timm_dfpt.training.run import main


def broken(*args, **kwargs):
    raise AssertionError('Expected gradient function\nto be set')


@pytest.fixture(scope='module')
def trained(tiny, tmp_path_factory):
    """A run that was killed after its last epoch, and the same run when nothing happened to it."""
    folder = tmp_path_factory.mktemp('end')
    argv = tiny.argv(folder / 'whole', '--epochs', '1', '--method', 'dfpt', '--baselines', 'kd', '--mixup', '0')
    assert main(argv) == 0
    killed = folder / 'killed'
    killed.mkdir()
    for name in ('checkpoints', 'config.yaml', 'metrics.jsonl'):
        source = folder / 'whole' / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, killed / name)
    return folder, argv


def resume(trained, tmp_path, *more):
    folder, argv = trained
    if not (tmp_path / 'run').exists():
        shutil.copytree(folder / 'killed', tmp_path / 'run')
    return main([*argv, '--output', str(tmp_path / 'run'), '--resume', *more])


def summary_of(folder):
    return json.loads((folder / 'summary.json').read_text())


COUNTER = (report, 'FlopCounterMode', 'counting the MACs of a model')
SPEED = (report.statistics, 'median', 'measuring the speed of a model')
IMAGES = (run_module, 'example_batch', 'loading images to measure costs with')
EVALUATION = (run_module, 'measure', 'the evaluation')
CURVES = (run_module, 'plot_curves', 'drawing the curves')


def test_what_fails_after_the_export_is_a_warning(trained, tmp_path, monkeypatch, caplog, capsys, fresh_accelerate):
    run, whole = tmp_path / 'run', trained[0] / 'whole'
    expected = summary_of(whole)['models']['student']
    for failures in ((COUNTER, SPEED, CURVES), (IMAGES, EVALUATION, CURVES)):
        with monkeypatch.context() as patch:
            for owner, function, _ in failures:
                patch.setattr(owner, function, broken)
            fresh_accelerate()
            assert resume(trained, tmp_path) == 0
        for *_, what in failures:
            assert f'{what} failed (AssertionError: Expected gradient function to be set); ' in caplog.text
        for path in ('student', 'baselines/kd/student'):
            weights = [(each / path / 'model.safetensors').read_bytes() for each in (run, whole)]
            assert weights[0] == weights[1]
        assert (run / 'prompt_path' / 'prompt_path.safetensors').is_file()
        for model in (summary_of(run)['models']['student'], summary_of(run)['baselines']['kd']):
            # Without an evaluation these are of the last epoch.
            assert model['metrics']['top1'] == expected['metrics']['top1']
            cost = model['cost'] or {'macs': None, 'images_per_s': None}
            assert cost['macs'] is cost['images_per_s'] is None
        assert ' - |' in capsys.readouterr().out
    assert not (run / 'curves.svg').exists()
    fresh_accelerate()
    assert resume(trained, tmp_path) == 0
    student = summary_of(run)['models']['student']
    assert student['metrics'] == expected['metrics']
    assert None not in student['cost'].values()
    assert (run / 'curves.svg').read_bytes() == (whole / 'curves.svg').read_bytes()


def test_tables_and_cards_say_nothing_of_what_is_not_known(trained, tmp_path):
    shutil.copytree(trained[0] / 'whole', tmp_path / 'run')
    summary = summary_of(tmp_path / 'run')
    for model in (*summary['models'].values(), *summary['baselines'].values()):
        model |= {'metrics': None, 'cost': None}
        model.get('other', {})['metrics'] = None
    cells = [line.split('|')[2:-1] for line in report.closing_table(summary).splitlines()[2:]]
    assert {cell.strip() for row in cells for cell in row} == {'-'}
    assert report.verdicts(summary) == []
    (tmp_path / 'run' / 'summary.json').write_text(json.dumps(summary))
    assert publish_run(tmp_path / 'run', 'user/name', dry_run=tmp_path / 'repo')
    assert 'nan' not in (tmp_path / 'repo' / 'student' / 'README.md').read_text().lower()


def test_publishing_that_fails_says_how_to_try_again(trained, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise FileExistsError('the Hub\nis away')

    monkeypatch.setattr(publish_module, 'publish_run', fail)
    assert resume(trained, tmp_path, '--push-to-hub', 'user/name', '--license', 'mit') == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    command = f'timm-dfpt publish {tmp_path}/run --push-to-hub user/name --license mit'
    assert shown == f'error: Publishing failed: the Hub is away The run folder is complete; to try again: {command}'
    assert (tmp_path / 'run' / 'summary.json').is_file()


def test_a_comparison_without_costs_and_tracker(tiny, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(Accelerator, 'log', broken)
    monkeypatch.setattr(compare_module, 'flop_counter', broken)
    monkeypatch.setattr(report, 'FlopCounterMode', broken)
    monkeypatch.setattr(compare_module, 'plot_comparison', broken)
    argv = tiny.argv(tmp_path / 'out', '--epochs', '1', '--mixup', '0')
    assert compare([*argv, '--methods', 'kd', 'scratch', '--seeds', '1']) == 0
    assert 'logging an epoch failed' in caplog.text
    assert 'measuring the cost of a step failed' in caplog.text
    assert 'drawing the comparison failed' in caplog.text
    result = json.loads((tmp_path / 'out' / 'compare.json').read_text())
    assert result['arms']['kd']['step'] == {'flops': None, 'ms': None}
    assert '| - | - |' in re.sub(' +', ' ', capsys.readouterr().out)


def test_what_an_export_refuses_is_refused_before_training(tiny, tmp_path, monkeypatch, capsys):
    """A student that cannot be built again from its record, for one."""
    create = run_module.create_learners

    def widened(*args):
        learners = create(*args)
        learners[0].student.fc = nn.Linear(16, 4)
        return learners

    monkeypatch.setattr(run_module, 'create_learners', widened)
    before = set(tmp_path.rglob('*'))
    assert main([*tiny.argv(tmp_path / 'run', '--mixup', '0')]) == 1
    assert re.search(r'error: The model cannot be built again .*fc', capsys.readouterr().err)
    assert set(tmp_path.rglob('*')) == before


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--push-to-hub', 'a/b', '--push-prompt-path', 'a/b'], 'need a repository each'),
        (['--push-to-hub', 'a b'], 'push_to_hub'),
    ],
)
def test_what_publishing_refuses_is_refused_before_training(tiny, tmp_path, capsys, more, message):
    assert main([*tiny.argv(tmp_path / 'run'), *more]) == 1
    assert re.search(f'error: .*{message}', capsys.readouterr().err)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name', timm.list_models('test_*'))
def test_costs_of_architectures(name):
    """Class tokens and attention pooling hand their parameters to modules, which torch's counter does not like."""
    model = timm.create_model(name, num_classes=3).eval()
    parameters = list(model.parameters())
    cost = measure_cost(model, parameters, torch.randn(1, *model.pretrained_cfg['input_size']), [])
    assert cost['macs'] > cost['params'] / 100
    assert all(parameter.requires_grad for parameter in parameters)


def by_hand(history, decay, warmup):
    """Average the weights of all updates: the first is where it starts, and is forgotten as timm does it."""
    average = history[0]
    for update, weights in enumerate(history[1:], 2):
        share = min(decay, 1 - update ** (-2 / 3)) if warmup else decay
        average = share * average + (1 - share) * weights
    return average


@pytest.mark.parametrize('warmup', [True, False])
def test_an_average_is_the_one_computed_by_hand(make_accelerator, warmup):
    """That a resumed run has the same one: test_resume.py."""
    task = SupervisedTask(make_student(), nn.CrossEntropyLoss(), verbose=False)
    options = {'model_ema': True, 'model_ema_decay': 0.6, 'model_ema_warmup': warmup, 'cpu': True}
    config = TrainConfig(method='supervised', student='resnet18', dataset='none', **options)
    learner, history = Learner('student', config, task, make_accelerator(), 6), []
    for update in range(1, 7):
        steps(learner, 1, update)
        learner.update_average(update)
        history.append(learner.student.fc.weight.detach().double().clone())
    average = task.get_student(ema=True).fc.weight.double()
    torch.testing.assert_close(average, by_hand(history, 0.6, warmup), rtol=1e-5, atol=1e-7)


def test_the_better_of_student_and_average_is_published(trained, tmp_path, monkeypatch, capsys):
    assert summary_of(trained[0] / 'whole')['models']['student']['weights'] == 'moving average'
    measure, better = run_module.measure, 'student'

    def with_a_winner(setup, learners):
        results = measure(setup, learners)
        for result in results:
            for name in ('student', 'student_ema'):
                result['val'][name]['top1'] = 90.0 if name == better else 80.0
        return results

    monkeypatch.setattr(run_module, 'measure', with_a_winner)
    assert resume(trained, tmp_path) == 0
    run = tmp_path / 'run'
    student = summary_of(run)['models']['student']
    assert student['weights'] == 'last step'
    assert student['val_metrics']['top1'] == 90.0
    assert student['other']['weights'] == 'moving average'
    assert student['other']['val_metrics']['top1'] == 80.0
    record = json.loads((run / 'student' / 'distillation.json').read_text())
    assert record['weights'] == student['weights']
    assert record['metrics']['val']['top1'] == 90.0
    (checkpoint,) = (run / 'checkpoints').glob('step-*')
    saved = load_file(run / 'student' / 'model.safetensors')
    kept = load_file(checkpoint / 'model.safetensors')
    assert kept['student.fc.weight'].equal(saved['fc.weight'])
    shown = capsys.readouterr().out
    for name in ('student', 'student of kd'):
        assert f'| {name}, {student["weights"]}, published (resnet18)' in shown
        assert f'| {name}, {student["other"]["weights"]} ' in shown


def test_an_average_that_is_still_old_is_said(tiny, tmp_path, monkeypatch, caplog):
    class Enough(BaseException):
        pass

    def enough(*args):
        raise Enough

    monkeypatch.setattr(run_module, 'create_learners', enough)
    for more, said in ((['--no-model-ema-warmup'], True), ([], False), (['--model-ema-decay', '0.5'], False)):
        caplog.clear()
        with pytest.raises(Enough):
            main(tiny.argv(tmp_path / 'run', '--model-ema-decay', '0.9998', *more))
        old = 'after the 18 updates of this run, 100% of the average are still the weights of the first'
        assert (old in caplog.text) == said


def test_an_average_is_evaluated_as_it_is_now(make_accelerator):
    # LeViT keeps in evaluation what it has indexed of its weights.
    torch.manual_seed(0)
    shape = {'embed_dim': (16, 24, 32), 'num_heads': (2, 2, 2), 'depth': (1, 1, 1), 'key_dim': 8, 'img_size': 64}
    student = timm.create_model('levit_128s', num_classes=5, **shape)
    config = TrainConfig(dataset='photos', student='levit_128s', method='supervised', cpu=True, model_ema=True)
    learner = Learner('student', config, SupervisedTask(student), make_accelerator(), 6)
    x = torch.randn(2, 3, 64, 64)
    learner.eval()
    first = learner.task.eval_outputs(x)['student_ema']
    learner.train()
    average = learner.task.get_student(ema=True)
    for name, param in average.named_parameters():
        if name.endswith('attention_biases'):
            torch.nn.init.normal_(param)
    learner.eval()
    now = learner.task.eval_outputs(x)['student_ema']
    assert not torch.equal(now, first)
    again = timm.create_model('levit_128s', num_classes=5, **shape).eval()
    again.load_state_dict(average.state_dict())
    assert torch.equal(again(x), now)
