"""Signals that ask a job to stop, and output that goes away: which exit code, and one line with the remedy."""
import contextlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from timm_dfpt.job import stopping
from timm_dfpt.job.stopping import exit_code
from timm_dfpt.training import run as run_module
from timm_dfpt.training.run import main
from timm_dfpt.training.trainer import Trainer

ROOT = Path(__file__).parents[2]


def stop(signum=signal.SIGTERM):
    os.kill(os.getpid(), signum)
    time.sleep(0.001)  # in which Python calls the handler


def swallowed():
    with contextlib.suppress(Exception):
        stop()
    pytest.fail('an error handler has taken the signal for an error')


class Ending:
    def __del__(self):
        stop()


def in_the_end_of_an_object():
    Ending()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        pass
    pytest.fail('Python has ignored it')


def turned_into_another():
    try:
        stop()
    except BaseException:
        raise ValueError('cannot load: randomness in evaluation? name other modules') from None


def beside_one_that_is_gone():
    with contextlib.suppress(BaseException):
        stop()
    raise RuntimeError('[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242')


def twice_by_a_launcher():
    try:
        stop(signal.SIGINT)
    finally:
        stop(signal.SIGINT)
        stop(signal.SIGTERM)


@pytest.mark.parametrize(
    ('job', 'code'),
    [
        (stop, 143),
        (lambda: stop(signal.SIGINT), 130),
        (lambda: stop(signal.SIGHUP), 129),
        (lambda: stop(signal.SIGUSR1), 138),
        (swallowed, 143),
        (in_the_end_of_an_object, 143),
        (turned_into_another, 143),
        (beside_one_that_is_gone, 143),
        (twice_by_a_launcher, 130),
    ],
)
def test_a_signal_is_one_line_and_the_code_of_a_shell(job, code, capsys):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert exit_code(job, 'do this') == code
    assert re.fullmatch(rf'Stopped by {signal.Signals(code - 128).name}: do this\.\n', capsys.readouterr().err)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert exit_code(lambda: None) == 0


def test_a_second_ctrl_c_does_not_wait(monkeypatch, capsys):
    def job():
        with stopping.on_stop(lambda signum: None):
            stop(signal.SIGINT)
            time.sleep(0.03)
            stop(signal.SIGINT)
        pytest.fail('waited')

    monkeypatch.setattr(stopping, '_SAME', 0.02)
    assert exit_code(job) == 130
    assert re.fullmatch(r'Stopped by SIGINT: at once; .*--resume.*\n', capsys.readouterr().err)


def test_what_waits_for_its_threads_is_ended(monkeypatch, capsys):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(stopping, '_PATIENCE', 0.01)
    monkeypatch.setattr(os, '_exit', lambda code: (codes.append(code), ended.set()))

    def job():
        try:
            stop()
        finally:
            assert ended.wait(10)

    assert exit_code(job) == 143
    assert codes == [143]


def test_signals_that_are_ignored_stay_so():
    """As those of `nohup`, and of what a shell script starts with `&`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert exit_code(lambda: stop(signal.SIGINT)) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_stopped_again_and_again_ends_with_the_same_student(
    tiny, tmp_path, monkeypatch, capsys, fresh_accelerate
):
    """And says each time how to go on."""
    def argv(name):
        return [*tiny.argv(tmp_path / name, '--epochs', '1', '--method', 'kd'), '--resume']

    def stopped_in(owner, name, number, signum):
        calls, function = [], getattr(owner, name)

        def stopped(*args, **kwargs):
            calls.append(0)
            if len(calls) == number:
                stop(signum)
            return function(*args, **kwargs)

        fresh_accelerate()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stopped)
            assert main(argv('run')) == 128 + signum
        shown = capsys.readouterr().err
        assert shown.count('Stopped by') == 1
        assert re.search(rf'Stopped by {signum.name}: .*--output {tmp_path}/run --resume', shown)
        assert 'Traceback' not in shown
        return [path.name for path in (tmp_path / 'run').glob('checkpoints/step-*')]

    # While teacher and student are built, in a step, after the last update, and when all is trained.
    assert stopped_in(run_module, 'create_learners', 1, signal.SIGTERM) == []
    assert stopped_in(Trainer, '_step', 3, signal.SIGINT) == ['step-00000003']
    assert 'step-00000006' in stopped_in(Trainer, '_save', 1, signal.SIGTERM)
    assert 'step-00000006' in stopped_in(run_module, 'export', 1, signal.SIGINT)
    for name in ('run', 'undisturbed'):
        fresh_accelerate()
        assert main(argv(name)) == 0
    weights, expected = (
        load_file(tmp_path / name / 'student' / 'model.safetensors') for name in ('run', 'undisturbed')
    )
    assert all(weights[key].equal(expected[key]) for key in expected)


class Gone(io.StringIO):
    """A pipe without a reader, or a terminal that has gone away."""

    def write(self, text):
        raise BrokenPipeError(32, 'Broken pipe')

    def flush(self):
        raise BrokenPipeError(32, 'Broken pipe')


def test_a_run_needs_no_output(tiny, tmp_path, monkeypatch):
    gone = Gone()
    monkeypatch.setattr(sys, 'stdout', gone)
    monkeypatch.setattr(sys, 'stderr', None)
    assert main(tiny.argv(tmp_path / 'run', '--epochs', '1', '--method', 'kd')) == 0
    assert (tmp_path / 'run' / 'summary.json').is_file()
    assert sys.stdout is gone


def script(*arguments):
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


@pytest.mark.parametrize('name', ['distill', 'compare', 'publish'])
def test_stopped_during_the_imports(name):
    job = script('-X', 'importtime', f'train/{name}.py', '--help')
    assert job.stdout is not None
    for line in job.stdout:
        if line.endswith(' signal\n'):
            break
    time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    output = ''.join(line for line in job.stdout if not line.startswith('import time:'))
    assert job.wait() == 130
    assert re.fullmatch(r'Stopped by SIGINT: .*the same command .*\n', output)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('workers', [0, 2])
def test_stopped_at_ten_random_moments(tiny, tmp_path, signum, workers):
    """From the first import to the last line: the right code, one line, no traceback, and `--resume` goes on."""
    def start(folder):
        argv = tiny.argv(folder, '--epochs', '1', '--baselines', 'kd', '--workers', str(workers), '--resume')
        return script('train/distill.py', *argv)

    began = time.monotonic()
    assert start(tmp_path / 'whole').wait() == 0
    duration = time.monotonic() - began
    draw = random.Random(int(signum))
    for i in range(10):
        job = start(tmp_path / f'run-{i}')
        time.sleep(max(0.1, draw.uniform(0, duration)))
        job.send_signal(signum)
        output = job.communicate(timeout=60)[0]
        assert job.returncode in (128 + signum, 0), output
        assert 'Traceback' not in output
        if job.returncode:
            assert re.search(r'Stopped by SIG\w+: .*--resume.*\.\n$', output), output
    assert start(tmp_path / 'run-9').wait() == 0
