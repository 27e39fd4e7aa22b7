"""The command line, recipes and the saved record are one set of options."""
import dataclasses

import pytest
import yaml

from timm_dfpt.data.checks import default_of
from timm_dfpt.job.cli import build_parser, load_recipe, parse_config, save_config
from timm_dfpt.job.options import TrainConfig, public_options
from timm_dfpt.training.run import main

REQUIRED = ['--dataset', 'photos', '--student', 'resnet18', '--teacher', 'resnet50']


def test_every_boolean_flag_says_what_it_is_called():
    defaults = parse_config(REQUIRED)
    assert not defaults.no_aug
    assert parse_config([*REQUIRED, '--no-aug']).no_aug
    assert parse_config([*REQUIRED, '--model-ema']).model_ema
    assert parse_config([*REQUIRED, '--student-pretrained']).student_pretrained
    assert not parse_config([*REQUIRED, '--no-prompt-block']).prompt_block


def test_saved_options_are_a_recipe_of_the_same_run(tmp_path):
    config = parse_config([*REQUIRED, '--lr', '1e-3', '--student-kwargs', 'layers=[1,1,1,1]', '--baselines', 'kd'])
    save_config(config, tmp_path / 'config.yaml')
    again = TrainConfig(**load_recipe(tmp_path / 'config.yaml'))
    assert dataclasses.asdict(again) == dataclasses.asdict(config)
    assert config.student_kwargs == {'layers': [1, 1, 1, 1]}


def test_command_line_wins_over_the_recipe(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    options = {'dataset': '../photos', 'teacher': 'resnet50', 'student': 'resnet18', 'lr': '1e-3'}
    recipe.write_text(yaml.safe_dump(options))
    config = parse_config(['--config', str(recipe), '--epochs', '3'])
    assert (config.lr, config.epochs) == (1e-3, 3)
    # A path in a recipe counts from the recipe.
    assert config.dataset == str(tmp_path.parent / 'photos')
    assert parse_config(['--config', str(recipe), '--lr', '0.2']).lr == 0.2


@pytest.mark.parametrize(
    ('option', 'message'),
    [('epoch', "unknown option 'epoch'.*Did you mean 'epochs'"), ('temprature', "Did you mean 'temperature'")],
)
def test_unknown_options_of_a_recipe_name_the_nearest(tmp_path, option, message):
    (tmp_path / 'recipe.yaml').write_text(f'{option}: 3\n')
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / 'recipe.yaml')


def test_published_options_tell_no_local_path(tmp_path):
    (tmp_path / 'photos').mkdir()
    argv = ['--dataset', str(tmp_path / 'photos'), '--student', 'resnet18', '--output', str(tmp_path / 'run')]
    argv += ['--teacher', f'local-dir:{tmp_path}/teacher/student']
    options = public_options(parse_config(argv))
    assert options['dataset'] == 'photos'
    assert str(tmp_path) not in str(options)


def test_a_tracker_that_is_not_installed_is_not_left_out_in_silence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr('timm_dfpt.job.devices.get_available_trackers', list)
    argv = [*REQUIRED, '--log-with', 'tensorboard', '--output', str(tmp_path / 'run')]
    assert main(argv) == 1
    assert 'pip install tensorboard' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_the_help_shows_ranges_and_each_default_once():
    """What has no default says nothing of one, and what has to be given says so."""
    shown = ' '.join(build_parser('').format_help().split())
    assert 'momentum of the student (>= 0, < 1; default: 0.9)' in shown
    assert 'stochastic depth rate of the student (>= 0, < 1; default: the model\'s own)' in shown
    assert 'default: none' not in shown.lower()
    assert shown.count('name or local-dir:folder of the student (required where no recipe names one)') == 1
    assert 'clip the gradient norm of each optimizer (> 0) --' in shown
    assert 'optimizer of the prompt path (timm) (default: adamw)' in shown
    options = [field for field in dataclasses.fields(TrainConfig) if not field.metadata.get('recipe_only')]
    empty = [
        field.name for field in options
        if default_of(field) in (None, '', [], {}) and not {'unset', 'required'} & set(field.metadata)
    ]  # fmt: skip
    required = ['teacher', 'student', 'dataset']
    assert shown.count('(required ') == len(required)
    assert shown.count('(default: ') + shown.count('; default: ') == len(options) - len(empty) - len(required)
