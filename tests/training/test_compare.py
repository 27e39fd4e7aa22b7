import json
import math
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_dfpt.job.cli import build_parser, resolve_config
from timm_dfpt.reports.intervals import difference_text, spread_text, summarise, t_quantile
from timm_dfpt.training import compare as compare_module
from timm_dfpt.training.compare import Arm, compare, main, parse_arm
from timm_dfpt.training.learner import Learner
from timm_dfpt.training.run import main as distill
from timm_dfpt.training.run import set_up
from timm_dfpt.training.trainer import Trainer

# One for each kind of task, and an arm with options of its own.
METHODS = ['scratch', 'kd', 'ctkd', 'dfpt', 'dfpt+']
OWN = 'dkd-T4=dkd,temperature=4,distill_loss_weight=1'


def argv(tiny, output, *more):
    student = ['layers=[1, 1, 1, 1]', 'channels=[8, 8, 16, 16]', 'stem_type=deep', 'stem_width=4']
    return [
        *tiny.common(Path(output)), '--dataset', str(tiny.data), '--student', 'resnet18', '--student-kwargs', *student,
        # Dropout draws random numbers, and two batches an update is where steps are counted.
        '--drop', '0.1', '--epochs', '2', '--grad-accum-steps', '2', *more,
    ]  # fmt: skip


def teacher(tiny):
    return ['--teacher', f'local-dir:{tiny.teacher}']


def config_of(arguments):
    values = vars(build_parser('').parse_args(arguments))
    return resolve_config(values, values.pop('config'), None)


def weights(folder):
    return (Path(folder) / 'model.safetensors').read_bytes()


@pytest.fixture(scope='module')
def compared(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp('compare') / 'all'
    arms = ['--methods', *METHODS, '--arm', OWN]
    assert main([*argv(tiny, folder, *teacher(tiny)), *arms, '--seeds', '5', '6']) == 0
    return folder


@pytest.mark.parametrize('method', [*METHODS, 'dkd-T4'])
def test_students_are_those_that_train_alone(method, compared, tiny, tmp_path):
    own = {
        'scratch': ['--method', 'supervised'],
        'dkd-T4': ['--method', 'dkd', *teacher(tiny), '--temperature', '4', '--distill-loss-weight', '1'],
    }.get(method, ['--method', method, *teacher(tiny)])
    assert distill([*argv(tiny, tmp_path / 'alone', *own), '--seed', '6']) == 0
    arm = compared / 'seed-6' / 'arms' / method
    assert weights(tmp_path / 'alone' / 'student') == weights(arm / 'student')
    alone = json.loads((tmp_path / 'alone' / 'summary.json').read_text())['models']
    beside = json.loads((compared / 'seed-6' / 'summary.json').read_text())['arms'][method]['models']
    assert {role: m['metrics'] for role, m in alone.items()} == {role: m['metrics'] for role, m in beside.items()}
    if method.startswith('dfpt'):
        path = 'prompt_path/prompt_path.safetensors'
        assert (tmp_path / 'alone' / path).read_bytes() == (arm / path).read_bytes()


def test_students_and_seeds_differ(compared):
    # Otherwise the test above could pass with students that nothing was done to.
    found = [weights(path) for path in compared.glob('seed-*/arms/*/student')]
    assert len(found) == len(set(found)) == 12


def test_numbers_of_the_table_follow_from_the_runs(compared):
    result = json.loads((compared / 'compare.json').read_text())
    runs = [json.loads((compared / f'seed-{seed}' / 'summary.json').read_text()) for seed in (5, 6)]
    assert result['reference'] == 'kd'
    assert list(result['arms']) == [*METHODS, 'dkd-T4']
    # There is no test split, so that the validation images are what the last number is measured on.
    assert result['eval_split'] == 'val'
    top1 = {
        name: np.array([run['arms'][name]['models']['student']['metrics']['top1'] for run in runs])
        for name in result['arms']
    }
    for name, arm in result['arms'].items():
        assert arm['val']['values'] == top1[name].tolist()
        assert arm['val']['mean'] == pytest.approx(top1[name].mean())
        assert arm['val']['sd'] == pytest.approx(top1[name].std(ddof=1))
        if name != 'kd':
            difference = top1[name] - top1['kd']
            half = 12.7062 * difference.std(ddof=1) / math.sqrt(2)
            expected = [difference.mean() - half, difference.mean() + half]
            assert arm['val']['difference']['interval'] == pytest.approx(expected, abs=1e-6)
    last = [json.loads(line) for line in (compared / 'seed-5' / 'metrics.jsonl').read_text().splitlines()][-1]
    assert last['dfpt']['val']['student']['top1'] == top1['dfpt'][0]


def test_flops_of_a_step_are_those_of_its_parts(compared):
    arms = json.loads((compared / 'compare.json').read_text())['arms']
    flops = {name: arm['step']['flops'] for name, arm in arms.items()}
    summary = json.loads((compared / 'seed-5' / 'summary.json').read_text())
    models = summary['arms']['kd']['models']
    batch, macs = 32, {role: model['cost']['macs'] for role, model in models.items()}
    # A frozen teacher is a forward pass; the loss adds no matrix product.
    assert flops['kd'] - flops['scratch'] == 2 * batch * macs['teacher']
    assert flops['kd'] == flops['ctkd'] == flops['dkd-T4']
    # Forward, and backward to weights and inputs: three times the forward pass but for the images' own gradient.
    assert 2 * 2 * batch * macs['student'] < flops['scratch'] < 3 * 2 * batch * macs['student']
    assert flops['kd'] < flops['dfpt'] < flops['dfpt+']


def test_what_is_left_to_be_read(compared):
    text = (compared / 'compare.md').read_text()
    rows = [line.split('|')[1].strip() for line in text.splitlines() if line.startswith('|')]
    assert rows == ['arm', '---', *METHODS, 'dkd-T4']
    assert 'seeds 5, 6' in text
    assert 'temperature=4' in text
    with Image.open(compared / 'compare.png') as image:
        image.load()


def test_the_teacher_looks_at_a_batch_once(tiny, tmp_path):
    config = config_of(argv(tiny, tmp_path, '--method', 'dfpt', *teacher(tiny)))
    setup = set_up(config)
    methods = ('dfpt', 'dfpt+', 'kd', 'dkd', 'supervised')
    learners = setup.create_learners({method: config.for_method(method) for method in methods})
    teachers = {learner.teacher for learner in learners[:4]}
    assert len(teachers) == 1
    calls = []
    learners[0].teacher.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    known = {}
    input, target, _ = next(iter(setup.loaders['train']))
    for learner in learners:
        learner.train()
        learner.step(input, target, seed=0, known=known)
    assert calls == [32]


class Killed(BaseException):
    pass


def test_resumes_after_a_kill(tiny, compared, tmp_path, monkeypatch):
    folder = tmp_path / 'killed'
    arguments = [*argv(tiny, folder, *teacher(tiny)), '--methods', 'dfpt', 'kd', '--seeds', '5']
    steps, step = [], Learner.step
    with monkeypatch.context() as patch:

        def killed(self, *args):
            steps.append(1)
            # The second of two students in the ninth batch.
            if len(steps) == 18:
                raise Killed
            return step(self, *args)

        patch.setattr(Learner, 'step', killed)
        with pytest.raises(Killed):
            main(arguments)
    assert not (folder / 'seed-5' / 'summary.json').exists()
    # With a seed more than it was started with.
    assert main([*arguments, '6', '--resume']) == 0
    for seed in (5, 6):
        for name in ('dfpt', 'kd'):
            path = f'seed-{seed}/arms/{name}/student'
            assert weights(folder / path) == weights(compared / path)
    assert json.loads((folder / 'compare.json').read_text())['seeds'] == [5, 6]


def test_finished_seeds_are_left_alone(tiny, compared, capsys):
    before = {path: path.stat().st_mtime_ns for path in compared.glob('seed-*/**/*') if path.is_file()}
    arms = ['--methods', *METHODS, '--arm', OWN]
    arguments = [*argv(tiny, compared, *teacher(tiny)), *arms, '--seeds', '5', '6', '--resume']
    assert main([*arguments, '--reference', 'scratch']) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert 'val - scratch' in capsys.readouterr().out


def test_sigterm_says_how_to_continue(tiny, tmp_path, monkeypatch, capsys):
    def stopped(self):
        raise compare_module.Preempted(signal.SIGTERM)

    monkeypatch.setattr(Trainer, 'fit', stopped)
    arguments = [*argv(tiny, tmp_path / 'out', *teacher(tiny)), '--methods', 'kd', '--seeds', '5']
    assert main(arguments) == 143
    assert f'--output {tmp_path / "out"} --resume' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('text', 'arm'),
    [
        ('dkd', Arm('dkd', 'dkd')),
        ('scratch', Arm('scratch', 'supervised')),
        ('kd-T4=kd,temperature=4', Arm('kd-T4', 'kd', {'temperature': 4})),
        ('d=dkd,kd_loss_kwargs={beta: 2.0}', Arm('d', 'dkd', {'kd_loss_kwargs': {'beta': 2.0}})),
    ],
)
def test_parse_arm(text, arm):
    assert parse_arm(text) == arm


@pytest.mark.parametrize('text', ['kd=', 'a b=kd', 'kd=kd,temperature', '..', 'epoch=kd', 'a/b=kd'])
def test_bad_arms_are_refused(text):
    with pytest.raises(ValueError, match='arm'):
        parse_arm(text)


@pytest.mark.parametrize('option', ['epochs', 'batch_size', 'seed', 'student', 'mixup', 'method', 'output', 'nonsense'])
def test_arms_cannot_change_what_makes_them_comparable(option):
    with pytest.raises(ValueError, match=option):
        Arm('kd', 'kd', {option: 1})


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--methods', 'kd', '--seeds', '1', '1'], 'seeds'),
        (['--methods', 'kd', 'kd', '--seeds', '1'], 'methods'),
        (['--seeds', '1'], 'methods'),
        (['--methods', 'kd', '--seeds', '1', '--reference', 'dkd'], "reference='dkd'"),
        (['--methods', 'kd', 'dkd', '--seeds', '1', '--mixup', '0.2'], 'dkd needs class indices'),
        (['--methods', 'kd', 'dist', '--seeds', '1', '--mixed-precision', 'fp16'], 'bf16'),
        (['--methods', 'kd', '--seeds', '1', '--resume'], 'does not hold a comparison'),
        (['--methods', 'kdd', '--seeds', '1'], "Did you mean 'kd'"),
        (['--methods', 'kd', '--seeds', '1', '--prompt-norm', 'layer'], 'has no effect with method=kd'),
    ],
)
def test_bad_comparisons_end_in_one_line(more, message, tiny, tmp_path, capsys):
    assert main([*argv(tiny, tmp_path / 'out', *teacher(tiny)), *more]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1


def test_other_arms_or_options_do_not_continue_a_comparison(tiny, compared, capsys):
    arguments = [*argv(tiny, compared, *teacher(tiny)), '--seeds', '5', '--resume']
    assert main([*arguments, '--methods', 'kd']) == 1
    assert 'has the arms' in capsys.readouterr().err


def test_a_folder_in_use_is_refused(tiny, compared, capsys):
    assert main([*argv(tiny, compared, *teacher(tiny)), '--methods', 'kd', '--seeds', '5']) == 1
    assert '--resume' in capsys.readouterr().err


def test_compare_needs_a_folder(tiny, tmp_path):
    config = config_of(argv(tiny, tmp_path, '--method', 'kd', *teacher(tiny)))
    config.output = None
    with pytest.raises(ValueError, match='--output'):
        compare(config, [Arm('kd', 'kd')], [1])


def t_cdf(x, degrees):
    """The distribution function of Student's t, by the trapezoidal rule over its density."""
    grid = np.linspace(0, x, 200_001)
    constant = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    return 0.5 + np.trapezoid(constant * (1 + grid**2 / degrees) ** (-(degrees + 1) / 2), grid)


@pytest.mark.parametrize('degrees', [*range(1, 33), 60, 120, 300])
def test_t_quantile(degrees):
    assert t_cdf(t_quantile(degrees), degrees) == pytest.approx(0.975, abs=1e-5)


def test_summarise():
    values = [70.1, 70.9, 70.4]
    summary = summarise(values)
    assert summary['mean'] == pytest.approx(np.mean(values))
    assert summary['sd'] == pytest.approx(statistics.stdev(values))
    half = 4.3027 * np.std(values, ddof=1) / math.sqrt(3)
    assert summary['interval'] == pytest.approx([np.mean(values) - half, np.mean(values) + half])
    assert summarise([1.0]) == {'values': [1.0], 'mean': 1.0, 'sd': None, 'interval': None}
    with pytest.raises(ValueError, match='degrees'):
        t_quantile(0)


def test_texts_of_a_summary():
    summary = summarise([70.1, 70.9, 70.4])
    assert (spread_text(summary), spread_text(summary, 1)) == ('70.47 +- 0.40', '70.5 +- 0.4')
    assert spread_text(summarise([1.0])) == '1.00'
    assert difference_text(summarise([1.0, -0.5]), digits=1) == '+0.2 [-9.3, +9.8]'
    assert difference_text(summarise([-1.0])) == '-1.00'
