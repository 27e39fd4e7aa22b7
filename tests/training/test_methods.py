"""Baselines end to end through the main job: who teaches whom, and what a method is given."""
import json
from pathlib import Path

import pytest

from timm_dfpt.job.cli import build_parser, load_recipe, resolve_config
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.tasks.methods import METHODS
from timm_dfpt.training.run import main, run, set_up

STUDENT = ['--student', 'resnet18', '--student-kwargs', 'layers=[1, 1, 1, 1]', 'channels=[8, 8, 16, 16]']


def argv(tiny, output, *more):
    return [*tiny.common(Path(output)), '--dataset', str(tiny.data), *STUDENT, '--epochs', '2', *more]


def teacher(tiny):
    return ['--teacher', f'local-dir:{tiny.teacher}']


def config_of(arguments, recipe=None):
    values = vars(build_parser('').parse_args(arguments))
    values.pop('config')
    return resolve_config(values, recipe, None)


def weights(folder):
    return (Path(folder) / 'model.safetensors').read_bytes()


@pytest.fixture(scope='module')
def early(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp('early') / 'run'
    assert main(argv(tiny, folder, '--method', 'supervised', '--export-epochs', '1', '2')) == 0
    return folder


def test_students_of_given_epochs_are_kept(early):
    assert weights(early / 'student-epoch2') == weights(early / 'student')
    assert weights(early / 'student-epoch1') != weights(early / 'student')
    record = json.loads((early / 'student-epoch1' / 'distillation.json').read_text())
    first = json.loads((early / 'metrics.jsonl').read_text().splitlines()[0])
    assert record['epoch'] == 1
    assert record['metrics']['val'] == first['supervised']['val']['student']


def test_a_student_of_an_epoch_and_a_trained_assistant_can_teach(tiny, early, tmp_path):
    """ESKD and TAKD as docs/ZOO.md shows them: plain KD with another teacher."""
    sources = {'full': f'local-dir:{tiny.teacher}', 'early': f'local-dir:{early / "student-epoch1"}'}
    sources['assistant'] = f'local-dir:{tmp_path / "full" / "student"}'
    for name, source in sources.items():
        assert main(argv(tiny, tmp_path / name, '--method', 'kd', '--teacher', source, '--epochs', '1')) == 0
        summary = json.loads((tmp_path / name / 'summary.json').read_text())
        assert summary['models']['teacher']['name'] == source
    assert len({weights(tmp_path / name / 'student') for name in sources}) == 3


@pytest.fixture(scope='module')
def dfpt(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp('dfpt') / 'run'
    run(config_of(argv(tiny, folder, '--method', 'dfpt', *teacher(tiny), '--epochs', '1')))
    return folder


@pytest.mark.parametrize('method', ['dist', 'logit-std', 'ttm', 'wttm', 'dkd'])
def test_baselines_run_alone_and_as_the_loss_of_dfpt(method, tiny, dfpt, tmp_path):
    alone = config_of(argv(tiny, tmp_path / 'alone', '--method', method, *teacher(tiny), '--epochs', '1'))
    plain = run(alone)
    within = config_of(
        argv(tiny, tmp_path / 'dfpt', '--method', 'dfpt', '--kd-loss', method, *teacher(tiny), '--epochs', '1')
    )
    dual = run(within)
    assert set(plain['models']) == {'teacher', 'student'}
    assert set(dual['models']) == {'teacher', 'prompt_path', 'student'}
    assert weights(tmp_path / 'dfpt' / 'student') != weights(dfpt / 'student')


def test_a_teacher_that_nobody_learns_from_is_shown_at_the_end_only(tiny, tmp_path):
    alone = ('--prompt-teacher-weight', '0', '--student-teacher-weight', '0', '--prompt-epochs', 'all')
    options = ('--method', 'dfpt', *teacher(tiny), '--epochs', '1', *alone, '--aug-cycle', '1')
    summary = run(config_of(argv(tiny, tmp_path / 'run', *options)))
    line = json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text())['dfpt']
    assert set(line['val']) == {'student', 'prompt_path'}
    assert not [key for key in line['train'] if 'teacher' in key]
    assert 0 < summary['models']['teacher']['metrics']['top1'] <= 100
    cache = ('--cache-teacher', '--teacher-cache-dir', str(tmp_path / 'cache'))
    with pytest.raises(ValueError, match="cache_teacher has no effect, since the teacher's logits are not used"):
        run(config_of(argv(tiny, tmp_path / 'refused', *options, *cache)))
    # Another student has use for these logits, and changes nothing.
    run(config_of(argv(tiny, tmp_path / 'both', *options, *cache, '--baselines', 'kd')))
    assert len(list((tmp_path / 'cache').iterdir())) == 1
    assert weights(tmp_path / 'both' / 'student') == weights(tmp_path / 'run' / 'student')


def test_weight_of_the_teacher_grows(tiny, tmp_path):
    config = config_of(
        argv(tiny, tmp_path, '--method', 'dkd', *teacher(tiny), '--distill-warmup-epochs', '4', '--epochs', '6')
    )
    (learner,) = set_up(config).create_learners({'dkd': config})
    weight = []
    for epoch in range(6):
        learner.set_progress(epoch, 0)
        weight.append(learner.task.distill_loss_weight)
    assert weight == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--method', 'kd', '--export-epochs', '3'], 'export_epochs'),
        (['--method', 'kd', '--kd-loss-kwargs', 'beta=2'], 'takes no arguments: leave it out'),
        (['--method', 'dkd', '--kd-loss-kwargs', 'bet=2'], "'bet'"),
    ],
)
def test_bad_options_end_in_one_line(more, message, tiny, tmp_path, capsys):
    try:
        code = main(argv(tiny, tmp_path / 'out', *teacher(tiny), *more))
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
    assert not (tmp_path / 'out' / 'metrics.jsonl').exists()


# --- recipes that build on others, and options of one method


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def test_a_recipe_builds_on_another(tmp_path):
    (tmp_path / 'base').mkdir()
    write(tmp_path / 'base', 'first.yaml', 'dataset: ../images\nlr: 0.5\nepochs: 7\nmethod_options: {kd: {lr: 0.1}}')
    write(tmp_path / 'base', 'second.yaml', 'base: first.yaml\nepochs: 8')
    path = write(
        tmp_path, 'third.yaml', 'base: base/second.yaml\nteacher: local-dir:./t\nmethod_options: {dkd: {lr: 0.2}}'
    )
    recipe = load_recipe(path)
    # Paths count from the file that says them.
    assert Path(recipe['dataset']).resolve() == tmp_path / 'images'
    assert Path(recipe['teacher'].removeprefix('local-dir:')).resolve() == tmp_path / 't'
    assert (recipe['lr'], recipe['epochs']) == (0.5, 8)
    assert recipe['method_options'] == {'kd': {'lr': 0.1}, 'dkd': {'lr': 0.2}}
    assert 'base' not in recipe


def test_recipes_in_a_circle_are_refused(tmp_path):
    write(tmp_path, 'a.yaml', 'base: b.yaml')
    write(tmp_path, 'b.yaml', 'base: a.yaml')
    with pytest.raises(ValueError, match=r'its own base: a\.yaml -> b\.yaml -> a\.yaml'):
        load_recipe(tmp_path / 'a.yaml')


@pytest.mark.parametrize(
    ('text', 'message'),
    [('base: nowhere.yaml', 'nowhere'), ('base: 3', 'base'), ('bass: a.yaml', 'bass'), ('- a', 'mapping')],
)
def test_bad_recipes_are_named(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, 'r.yaml', text))


RECIPE = """
dataset: user/data
student: resnet18
teacher: resnet34
temperature: 4.0
baselines: [kd]
method_options:
  kd: {temperature: 2.0, task_loss_weight: 0.1}
  dkd: {kd_loss_kwargs: {beta: 2.0}}
"""


@pytest.fixture
def recipe(tmp_path):
    return str(write(tmp_path, 'recipe.yaml', RECIPE))


def test_options_of_a_method_count_for_it_alone(recipe):
    kd = config_of(['--method', 'kd'], recipe)
    assert (kd.temperature, kd.task_loss_weight, kd.kd_loss_kwargs) == (2.0, 0.1, {})
    dkd = config_of(['--method', 'dkd'], recipe)
    assert (dkd.temperature, dkd.task_loss_weight, dkd.kd_loss_kwargs) == (4.0, 1.0, {'beta': 2.0})
    # From one to the other nothing is left of the first, and back again.
    for method, expected in (('kd', kd), ('dkd', dkd)):
        for other in METHODS:
            given = [] if other == 'supervised' else ['--baselines']
            start = config_of(['--method', other, *given], recipe)
            start.teacher = 'resnet34' if other != 'supervised' else None
            again = start.for_method(method, teacher='resnet34')
            fields = ('method', 'temperature', 'task_loss_weight', 'kd_loss_kwargs', 'baselines')
            assert [getattr(again, f) for f in fields] == [*(getattr(expected, f) for f in fields[:4]), []]


def test_the_command_line_wins_over_options_of_a_method(recipe):
    config = config_of(['--method', 'dfpt', '--temperature', '3'], recipe)
    assert config.temperature == 3.0
    assert config.for_method('kd').temperature == 3.0
    assert config.for_method('kd').task_loss_weight == 0.1


def test_a_recipe_with_a_teacher_serves_the_student_alone(recipe):
    config = config_of(['--method', 'supervised'], recipe)
    assert config.teacher is None
    assert config.baselines == []
    assert config_of(['--method', 'kd'], recipe).baselines == []
    assert config_of(['--method', 'dfpt'], recipe).baselines == ['kd']


def test_an_empty_text_takes_back_what_a_recipe_says(tmp_path):
    path = write(tmp_path, 'r.yaml', f'{RECIPE}\nval_split: test')
    assert config_of(['--method', 'kd'], str(path)).val_split == 'test'
    assert config_of(['--method', 'kd', '--val-split', ''], str(path)).val_split is None


@pytest.mark.parametrize('options', [{'kdd': {}}, {'kd': 3}, {'kd': {'nonsense': 1}}])
def test_bad_options_of_a_method_are_named(options):
    with pytest.raises(ValueError, match='method_options'):
        TrainConfig(student='resnet18', dataset='d', teacher='resnet34', method_options=options)
