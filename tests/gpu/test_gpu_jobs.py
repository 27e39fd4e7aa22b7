"""The whole main job on the device: options, methods, the gradient scaler, waiting, and a kill."""
from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import timm_dfpt
from timm_dfpt.tasks import METHODS

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SIZE = 32
NAMES = ('ash', 'birch', 'cedar')
NETWORK = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 16, 16]}
BATCH, STEPS = 32, 6
FREEZE = pytest.mark.parametrize('freeze', [(), ('--prompt-epochs', '1')], ids=['tuned', 'frozen'])
Weights = dict[str, torch.Tensor]
Train = Callable[..., Weights]


def write_images(folder: Path, per_class: int, seed: int) -> None:
    """Class folders of noise with a colour of their own."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.normal(128, 50, (SIZE, SIZE, 3))
            pixels[:, :, label] += 40
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f'{i:03}.png')


@pytest.fixture(scope='module')
def argv(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> list[str]:
    """Arguments of a job of six steps per epoch."""
    pytest.importorskip('datasets', reason='the trainer opens its data with `datasets`')
    root = tmp_path_factory.mktemp('job')
    write_images(root / 'data' / 'train', BATCH * STEPS // len(NAMES), seed=0)
    write_images(root / 'data' / 'val', 10, seed=1)
    torch.manual_seed(0)
    teacher = timm.create_model('resnet18', num_classes=len(NAMES), **{**NETWORK, 'channels': [8, 16, 16, 32]})
    config = {
        'input_size': (3, SIZE, SIZE), 'mean': (0.5,) * 3, 'std': (0.25,) * 3, 'interpolation': 'bilinear',
        'crop_pct': 1.0, 'crop_mode': 'center',
    }  # fmt: skip
    timm_dfpt.save_student(teacher, root / 'teacher', label_names=NAMES, data_config=config)
    return [
        '--dataset', str(root / 'data'), '--teacher', f'local-dir:{root / "teacher"}', '--student', 'resnet18',
        '--student-kwargs', *(f'{key}={value}' for key, value in NETWORK.items()),
        '--input-size', '3', str(SIZE), str(SIZE), '--mean', '0.5', '--std', '0.25', '--crop-pct', '1',
        '--crop-padding', '2', '--epochs', '2', '--batch-size', str(BATCH), '--lr', '0.01', '--temperature', '2',
        *(['--cpu'] if device.type == 'cpu' else []),
    ]  # fmt: skip


@pytest.fixture
def train(argv: list[str], tmp_path: Path, fresh_accelerate: Callable[[], None]) -> Train:
    """Run the main job in this process; return the student's weights."""
    from timm_dfpt.training.run import main

    def train(name: str, *more: str) -> Weights:
        fresh_accelerate()
        options = [*argv]
        if 'supervised' in more:
            # Refused where there is nothing to learn from a teacher.
            for option in ('--teacher', '--temperature'):
                del options[options.index(option) : options.index(option) + 2]
        assert main([*options, '--output', str(tmp_path / name), *more]) == 0
        return load_file(tmp_path / name / 'student' / 'model.safetensors')

    return train


def distance(ours: Weights, theirs: Weights) -> float:
    """Return the largest difference of a weight."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours if ours[name].is_floating_point())


def learned(weights: Weights) -> Weights:
    """Return what an optimizer moves: no statistics and counters."""
    return {name: value for name, value in weights.items() if 'running' not in name and 'tracked' not in name}


def finite(weights: Weights) -> bool:
    return all(bool(value.isfinite().all()) for value in weights.values() if value.is_floating_point())


@pytest.mark.parametrize('method', METHODS)
def test_every_method_trains_a_student(method: str, train: Train) -> None:
    assert finite(train(method, '--method', method, '--epochs', '1'))


@pytest.mark.parametrize(
    ('options', 'least', 'most'),
    [
        (('--channels-last',), 0.0, 1e-2),
        (('--opt-fused',), 0.0, 1e-2),
        (('--mixed-precision', 'bf16'), 1e-7, 0.1),
        (('--mixed-precision', 'bf16', '--channels-last', '--opt-fused', '--model-ema'), 1e-7, 0.1),
        (('--teacher-dtype', 'bfloat16'), 1e-7, 0.1),
    ],
    ids=lambda value: '+'.join(each.removeprefix('--') for each in value) if isinstance(value, tuple) else '',
)
def test_options_leave_a_student_close_to_the_plain_one(
    options: tuple[str, ...], least: float, most: float, train: Train
) -> None:
    plain = train('plain', *(['--model-ema'] if '--model-ema' in options else []))
    other = train('other', *options)
    assert finite(other)
    # Where rounding differs there must be a difference, or the option would do nothing.
    assert least <= distance(learned(other), learned(plain)) < most


@FREEZE
def test_a_compiled_run_leaves_a_student_close_to_the_plain_one(
    freeze: tuple[str, ...], gpu: torch.device, train: Train
) -> None:
    torch._dynamo.reset()
    assert distance(learned(train('compiled', '--compile', *freeze)), learned(train('plain', *freeze))) < 1e-2
    torch._dynamo.reset()


def test_a_run_that_replays_its_steps_leaves_a_student_close_to_the_plain_one(gpu: torch.device, train: Train) -> None:
    """CUDA graphs with gradients that add up, logits that three students share, and the freeze."""
    more = ('--baselines', 'kd', 'ctkd', '--grad-accum-steps', '2', '--prompt-epochs', '1')
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    replayed = train('replayed', '--compile', '--compile-mode', 'reduce-overhead', *more)
    assert counters['inductor']['cudagraph_skips'] == 0
    assert distance(learned(replayed), learned(train('plain', *more))) < 1e-2
    torch._dynamo.reset()


@pytest.mark.parametrize('fused', [(), ('--opt-fused',)], ids=['foreach', 'fused'])
def test_fp16_goes_on_after_an_overflow_in_the_first_step(
    fused: tuple[str, ...], gpu: torch.device, train: Train
) -> None:
    """With losses so large that the scaler skips every step of an epoch, no learning rate makes a difference."""
    huge = ('--mixed-precision', 'fp16', *fused, '--student-task-weight', '1e7', '--prompt-task-weight', '1e7')
    skipped, at_another_rate = (train(f'lr{lr}', *huge, '--lr', lr, '--epochs', '1') for lr in ('0.01', '0.02'))
    assert distance(learned(skipped), learned(at_another_rate)) == 0
    large = [option.replace('1e7', '1e4') for option in huge]
    resumed = train('resumed', *large, '--lr', '1e-6', '--epochs', '4')
    assert finite(resumed)
    assert 0 < distance(learned(resumed), learned(skipped)) < 1


@FREEZE
def test_fp16_leaves_a_student_close_to_the_plain_one(
    freeze: tuple[str, ...], gpu: torch.device, train: Train
) -> None:
    """With a path that is frozen after the first epoch the scaler has one optimizer less to look at."""
    half = train('half', '--mixed-precision', 'fp16', *freeze)
    assert finite(half)
    assert 0 < distance(learned(half), learned(train('plain', *freeze))) < 0.1


@pytest.mark.parametrize('method', ['supervised', 'dkd', 'dfpt', 'dfpt+'])
def test_a_longer_run_waits_for_the_device_no_more_than_it_looks_at_the_loss(
    method: str, gpu: torch.device, train: Train
) -> None:
    """Each step looked at is one transfer, as documented; starting, evaluation and saving wait as often as before."""
    counts = []
    for batch in (BATCH, BATCH // 2):
        options = ('--method', method, '--epochs', '1', '--batch-size', str(batch), '--validation-batch-size', '30')
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            torch.cuda.set_sync_debug_mode('warn')
            try:
                train(f'{method}-{batch}', *options)
            finally:
                torch.cuda.set_sync_debug_mode('default')
        places = [f'{Path(w.filename).name}:{w.lineno}' for w in caught if 'synchroniz' in str(w.message)]
        counts.append(collections.Counter(places))
    assert counts[0], 'no wait was seen at all, not even that of the evaluation'
    more = counts[1] - counts[0]
    assert sum(more.values()) <= STEPS, more


@pytest.mark.parametrize('freeze', [(), ('--prompt-epochs', '2')], ids=['tuned', 'frozen'])
def test_a_killed_run_goes_on_to_the_same_bits(freeze: tuple[str, ...], argv: list[str], tmp_path: Path) -> None:
    """With deterministic algorithms, which is what a GPU needs for it."""
    command = [
        sys.executable, str(Path(__file__).with_name('run_job.py')), *argv, '--epochs', '6', '--checkpoint-steps', '2',
        '--checkpoint-hist', '3', '--baselines', 'kd', '--model-ema', '--drop', '0.1', *freeze,
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    environment = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'}

    def start(name: str, *more: str) -> subprocess.Popen[bytes]:
        with open(tmp_path / f'{name}.log', 'ab') as log:
            line = [*command, '--output', str(tmp_path / name), *more]
            return subprocess.Popen(line, env=environment, cwd=ROOT, stdout=log, stderr=log)

    whole, killed = start('whole'), start('killed')
    checkpoints = tmp_path / 'killed' / 'checkpoints'
    end = time.monotonic() + 240
    while killed.poll() is None and time.monotonic() < end and not list(checkpoints.glob('step-0000001?')):
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (tmp_path / 'killed.log').read_text()
    assert not (tmp_path / 'killed' / 'summary.json').exists()
    assert start('killed', '--resume').wait(timeout=240) == 0, (tmp_path / 'killed.log').read_text()
    assert whole.wait(timeout=240) == 0, (tmp_path / 'whole.log').read_text()
    students = ('student/model.safetensors', 'baselines/kd/student/model.safetensors')
    for name in (*students, 'prompt_path/prompt_path.safetensors', 'metrics.jsonl'):
        assert (tmp_path / 'killed' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes(), name
