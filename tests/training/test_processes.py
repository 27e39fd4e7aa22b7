"""Two processes against one, and what happens to the others when one of them is stopped or dies."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import Job
from timm_dfpt.job.stopping import exit_code

ROOT = Path(__file__).parents[2]
# Sums in another order: differences of single precision, which AdamW carries on from step to step.
RELATIVE = 2e-5
WEIGHTS = 5e-5


def numbers(value, prefix=''):
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in numbers(item, f'{prefix}{key}/').items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in numbers(item, f'{prefix}{i}/').items()}
    return {prefix: value}


def lines(run):
    return [numbers(json.loads(line)) for line in (run / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def pair(tiny, tmp_path_factory):
    """The same job, without batch statistics, dropout and mixup, in one process and in two.

    Of the six steps of an epoch, two are left for its last update.
    """
    root = tmp_path_factory.mktemp('pair')
    for processes in (1, 2):
        job = Job(tiny.vit_argv(root / str(processes), '--grad-accum-steps', '4'), root / f'{processes}.log', processes)
        assert job.wait() == [0] * processes, job.output()
    return root / '1', root / '2'


def test_two_processes_train_like_one(pair):
    one, two = (lines(run) for run in pair)
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        # Means over the same images, each counted once: 192 of training, and 43 of validation in 32 and 11.
        differences = {key: abs(a[key] - b[key]) / max(abs(a[key]), 1e-2) for key in a if 'top1' not in key}
        assert max(differences.values()) < RELATIVE, max(differences.items(), key=lambda item: item[1])
        assert {key: a[key] for key in a if 'top1' in key} == {key: b[key] for key in b if 'top1' in key}


def test_two_processes_end_with_the_same_weights(pair):
    for name in ('student/model.safetensors', 'prompt_path/prompt_path.safetensors'):
        one, two = (load_file(run / name) for run in pair)
        assert one.keys() == two.keys()
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < WEIGHTS


def test_all_stop_when_one_is_asked_to(tiny, tmp_path):
    job = Job(tiny.argv(tmp_path / 'run', '--epochs', '50'), tmp_path / 'log', 2)
    job.wait_for(lambda: job.phase == 'step')
    job.send(signal.SIGTERM, rank=1)
    assert job.wait() == [143, 143], job.output()
    assert list((tmp_path / 'run' / 'checkpoints').glob('step-????????'))


def children(pid: int) -> list[int]:
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = stat.read_text().rpartition(')')[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != 'Z':
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='finds the processes in /proc')
def test_launcher_ends_all_when_one_dies(tiny, tmp_path):
    """As users start it: the launcher must see that a process was killed, end the others, and say that it failed."""
    config = str(ROOT / 'train' / 'accelerate' / 'multi_cpu.yaml')
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', config, 'train/distill.py']
    with open(tmp_path / 'log', 'wb') as log:
        launcher = subprocess.Popen(
            [*launch, *tiny.argv(tmp_path / 'run', '--epochs', '1000')],
            cwd=ROOT, stdout=log, stderr=log, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
        )  # fmt: skip
    checkpoints = tmp_path / 'run' / 'checkpoints'
    end = time.monotonic() + 120
    while not list(checkpoints.glob('step-????????')) and launcher.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    workers = children(launcher.pid)
    assert len(workers) == 2, (tmp_path / 'log').read_text()
    os.kill(workers[1], signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0
    assert not [pid for pid in workers if Path(f'/proc/{pid}').exists()]


class Deadly(torch.utils.data.Dataset):
    """Kills the process that asks for an image, as the kernel does when memory is short."""

    def __len__(self):
        return 4

    def __getitem__(self, row):
        os.kill(os.getpid(), signal.SIGKILL)


class Broken(Deadly):
    def __getitem__(self, row):
        raise RuntimeError('a mistake in the program')


def read(dataset):
    return list(torch.utils.data.DataLoader(dataset, num_workers=1))


@pytest.mark.parametrize(
    ('job', 'message'),
    [
        (lambda: torch.empty(10**15), r"can't allocate memory.*--batch-size"),
        (lambda: bytes(10**15), r'--batch-size'),
        (lambda: read(Deadly()), r'DataLoader worker \(pid.*--workers'),
    ],
    ids=['memory of torch', 'memory of Python', 'worker'],
)
def test_errors_of_the_machine_are_told_in_one_line(capsys, job, message):
    assert exit_code(job) == 1
    shown = capsys.readouterr().err.strip()
    assert re.fullmatch(rf'error: .*{message}.*', shown)


@pytest.mark.parametrize('job', [lambda: torch.ones(2) @ torch.ones(3), lambda: read(Broken())])
def test_mistakes_keep_their_traceback(job):
    with pytest.raises(RuntimeError):
        exit_code(job)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_an_evaluation_that_fails_at_the_end_loses_no_student(tiny, tmp_path, processes):
    """One process ends with what it has; several, of which each waits for the others, with an error and `--resume`."""
    shutil.copytree(tiny.data, tmp_path / 'data')
    shutil.copytree(tiny.data / 'val', tmp_path / 'data' / 'test')
    image = tmp_path / 'data' / 'test' / 'cedar' / '003.png'
    whole, run = image.read_bytes(), tmp_path / 'run'
    argv = tiny.vit_argv(run, '--dataset', str(tmp_path / 'data'), '--epochs', '10', '--check-images', 'off')
    job = Job(argv, tmp_path / 'log', processes)
    # As a file server that fails for a while: test images are read at the end.
    assert job.wait_for(lambda: job.phase == 'step')
    image.write_bytes(whole[:80])
    assert job.wait(timeout=120) == ([0] if processes == 1 else [1, 1]), job.output()
    assert '003.png' in job.output()
    student = (run / 'student' / 'model.safetensors').read_bytes()
    assert (run / 'summary.json').is_file() == (processes == 1)
    image.write_bytes(whole)
    job = Job([*argv, '--resume'], tmp_path / 'again', processes)
    assert job.wait() == [0] * processes, job.output()
    assert json.loads((run / 'summary.json').read_text())['models']['student']['metrics']['top1'] > 0
    assert (run / 'student' / 'model.safetensors').read_bytes() == student
