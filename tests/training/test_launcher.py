"""What accelerate's launcher asks for counts where an option was not given; a contradiction is refused."""
import contextlib
import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from timm_dfpt.job.cli import parse_config
from timm_dfpt.job.devices import create_accelerator, launched
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.training.compare import main as compare
from timm_dfpt.training.run import main

REQUIRED = ['--student', 'test_resnet', '--dataset', 'none', '--method', 'supervised']
# What `accelerate launch` always sets: nobody has asked for it.
ALWAYS = {
    'USE_CPU': 'False', 'MIXED_PRECISION': 'no', 'DYNAMO_BACKEND': 'NO', 'DYNAMO_MODE': 'default',
    'DYNAMO_USE_FULLGRAPH': 'False', 'DYNAMO_USE_DYNAMIC': 'False', 'DYNAMO_USE_REGIONAL_COMPILATION': 'False',
}  # fmt: skip


@pytest.fixture
def launcher(monkeypatch):
    def set_variables(**variables):
        for name, value in {**ALWAYS, **variables}.items():
            monkeypatch.setenv(f'ACCELERATE_{name}', value)

    return set_variables


@pytest.mark.parametrize(
    ('variables', 'option', 'value', 'other'),
    [
        ({'MIXED_PRECISION': 'bf16'}, 'mixed_precision', 'bf16', ['--mixed-precision', 'no']),
        ({'MIXED_PRECISION': 'fp16'}, 'mixed_precision', 'fp16', ['--mixed-precision', 'bf16']),
        ({'GRADIENT_ACCUMULATION_STEPS': '4'}, 'grad_accum_steps', 4, ['--grad-accum-steps', '2']),
        ({'GRADIENT_ACCUMULATION_STEPS': '1'}, 'grad_accum_steps', 1, ['--grad-accum-steps', '2']),
        ({'GRADIENT_CLIPPING': '0.5'}, 'clip_grad', 0.5, ['--clip-grad', '1']),
        ({'USE_CPU': 'True'}, 'cpu', True, ['--no-cpu']),
        ({'TORCH_DEVICE': 'cpu'}, 'cpu', True, ['--no-cpu']),
        ({'DYNAMO_BACKEND': 'INDUCTOR'}, 'compile', True, ['--no-compile']),
    ],
)
def test_the_launcher_counts(launcher, variables, option, value, other):
    assert getattr(parse_config(REQUIRED), option) == TrainConfig.__dataclass_fields__[option].default
    launcher(**variables)
    assert getattr(parse_config(REQUIRED), option) == value
    (name,) = variables
    contradiction = rf'{option}=\S+ and ACCELERATE_{name}=\S+ of the launcher contradict each other'
    with pytest.raises(ValueError, match=contradiction):
        create_accelerator(parse_config([*REQUIRED, *other]))
    with pytest.raises(ValueError, match=contradiction):
        # In Python nobody can tell what was given from what is there by default.
        create_accelerator(parse_config_alone([*REQUIRED, *other]))


def parse_config_alone(argv):
    saved = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith('ACCELERATE_')}
    try:
        return parse_config(argv)
    finally:
        os.environ.update(saved)


def test_what_nobody_asked_for_is_no_choice(launcher):
    launcher()
    argv = [*REQUIRED, '--mixed-precision', 'bf16', '--cpu', '--compile']
    assert parse_config(argv) == parse_config_alone(argv)
    accelerator = create_accelerator(parse_config(argv))
    assert accelerator.mixed_precision == 'bf16'


@pytest.mark.parametrize(
    ('variables', 'message'),
    [
        ({'MIXED_PRECISION': 'fp8'}, 'ACCELERATE_MIXED_PRECISION=fp8 is not supported'),
        ({'GRADIENT_ACCUMULATION_STEPS': 'many'}, 'ACCELERATE_GRADIENT_ACCUMULATION_STEPS=many must be a number'),
        ({'GRADIENT_ACCUMULATION_STEPS': '0'}, 'grad_accum_steps must be at least 1'),
        ({'DYNAMO_BACKEND': 'EAGER'}, 'ACCELERATE_DYNAMO_BACKEND=eager is not supported.*--compile'),
        ({'DYNAMO_BACKEND': 'INDUCTOR', 'DYNAMO_MODE': 'max-autotune'}, 'ACCELERATE_DYNAMO_MODE=max-autotune'),
        ({'USE_DEEPSPEED': 'true'}, 'DeepSpeed is not supported'),
        ({'USE_MEGATRON_LM': 'true'}, 'ACCELERATE_USE_MEGATRON_LM is not supported'),
        ({'USE_PARALLELISM_CONFIG': 'true'}, 'ACCELERATE_USE_PARALLELISM_CONFIG is not supported'),
    ],
)
def test_what_does_not_work_is_refused(launcher, tmp_path, capsys, variables, message):
    launcher(**variables)
    output = ['--output', str(tmp_path / 'run')]
    with contextlib.suppress(SystemExit):  # as after a wrong option
        assert main([*REQUIRED, *output]) == 1
    assert compare([*REQUIRED[:4], *output, '--teacher', 'x', '--methods', 'scratch', '--seeds', '1']) == 1
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2
    for line in shown:
        assert line.startswith('error: ')
        assert re.search(message, line)
    assert not (tmp_path / 'run').exists()


def test_a_run_under_a_launcher_is_the_one_with_its_options(tiny, tmp_path, launcher, fresh_accelerate):
    """Its schedule, too: the learning rate reaches the end of the cosine, and config.yaml has it all."""
    argv = ['--method', 'kd', '--epochs', '1', '--mixup', '0']
    assert main([*tiny.argv(tmp_path / 'given'), *argv, '--grad-accum-steps', '4']) == 0
    fresh_accelerate()
    launcher(GRADIENT_ACCUMULATION_STEPS='4', USE_CPU='True')
    assert main([*tiny.argv(tmp_path / 'launched'), *argv]) == 0
    runs = [tmp_path / 'given', tmp_path / 'launched']
    for name in ('metrics.jsonl', 'student/model.safetensors'):
        assert runs[0].joinpath(name).read_bytes() == runs[1].joinpath(name).read_bytes()
    assert json.loads((runs[1] / 'metrics.jsonl').read_text())['updates'] == 2
    recipes = [yaml.safe_load((each / 'config.yaml').read_text()) for each in runs]
    assert {**recipes[0], 'output': None} == {**recipes[1], 'output': None}


@pytest.mark.parametrize('option', [['--gradient_accumulation_steps', '4'], ['--gradient-accumulation-steps=4']])
def test_an_option_that_accelerate_keeps_to_itself(monkeypatch, option):
    """It hands this one on to DeepSpeed only."""
    code = 'print(flush=True); input()  # as accelerate launch'
    command = [sys.executable, '-c', code, '--cpu', *option, 'train/distill.py']
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline()
        monkeypatch.setattr(os, 'getppid', lambda: parent.pid)
        assert launched()['grad_accum_steps'] == ('accelerate launch --gradient_accumulation_steps', 4)
        parent.kill()
