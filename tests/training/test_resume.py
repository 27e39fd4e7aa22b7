"""Runs that are killed, asked to stop or damaged, against the same run left alone."""
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.jobs import Job

ROOT = Path(__file__).parents[2]
# Equal to the last byte, whatever happened on the way.
SAME = (
    'metrics.jsonl', 'curves.svg', 'student/model.safetensors', 'student/config.json',
    'prompt_path/prompt_path.safetensors',
)  # fmt: skip
SWEEP = ('step', 'save', 'evaluation', 'start', 'save', 'step', 'export')
CHECKPOINTS = ('--checkpoint-steps', '2', '--checkpoint-hist', '3')


class Runs:
    """Runs of one configuration, by number of processes, that nothing happened to."""

    def __init__(self, tiny, root, *more):
        self.tiny, self.root, self.more, self.done = tiny, root, more, {}

    def argv(self, output, processes):
        # A single process also has a baseline, and adds up gradients.
        more = ['--baselines', 'kd', '--grad-accum-steps', '2'] if processes == 1 else []
        return self.tiny.argv(output, *CHECKPOINTS, *more, *self.more)

    def undisturbed(self, processes):
        if processes not in self.done:
            output = self.root / f'undisturbed-{processes}'
            job = Job(self.argv(output, processes), self.root / f'{output.name}.log', processes)
            assert job.wait() == [0] * processes, job.output()
            self.done[processes] = output
        return self.done[processes]


@pytest.fixture(scope='module')
def runs(tiny, tmp_path_factory):
    return Runs(tiny, tmp_path_factory.mktemp('runs'))


def assert_same(run: Path, reference: Path) -> None:
    baselines = [str(path.relative_to(reference)) for path in reference.glob('baselines/*/student/model.safetensors')]
    for name in (*SAME, *baselines):
        assert (run / name).read_bytes() == (reference / name).read_bytes(), name
    metrics = [
        {role: model['metrics'] for role, model in json.loads((path / 'summary.json').read_text())['models'].items()}
        for path in (run, reference)
    ]
    assert metrics[0] == metrics[1]
    assert not list(run.rglob('*.incomplete'))


def kill_at(job: Job, phase: str, delay: float) -> str | None:
    """Kill the job when it is in a phase; return where it was a moment before, `None` if it had ended."""
    reached = job.wait_for(lambda: phase in (job.phase, 'start'))
    time.sleep(delay)
    where = job.phase
    ended = not job.alive
    job.kill()
    return None if ended or not reached else where


def survive(
    runs: Runs, processes: int, folder: Path, kills: int, seed: int, phases: tuple[str, ...], more: tuple[str, ...] = ()
) -> list[str]:
    """Kill a run again and again, each time going on from what is left; return where it was killed."""
    draw = random.Random(seed)
    argv = [*runs.argv(folder / 'run', processes), *more]
    places: list[str] = []
    while len(places) < kills:
        phase = phases[len(places) % len(phases)]
        job = Job([*argv, '--resume'], folder / f'{len(places)}.log', processes)
        # Right at the start of a phase, or somewhat into it and what follows.
        where = kill_at(job, phase, draw.choice([0.0, draw.uniform(0, 0.02), draw.uniform(0, 0.3)]))
        if where is None:
            shutil.rmtree(folder / 'run')  # It came through: another one.
        else:
            places.append(where)
    job = Job([*argv, '--resume'], folder / 'last.log', processes)
    assert job.wait() == [0] * processes, job.output()
    assert_same(folder / 'run', runs.undisturbed(processes))
    return places


def test_killed_at_any_moment(runs, tmp_path):
    survive(runs, 1, tmp_path, 4, seed=0, phases=('step', 'save', 'evaluation', 'export'))


def test_two_processes_killed(runs, tmp_path):
    survive(runs, 2, tmp_path, 2, seed=1, phases=('save', 'step'))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('processes', [1, 2])
def test_killed_at_twenty_random_moments(runs, tmp_path, processes):
    places = survive(runs, processes, tmp_path, 20, seed=processes, phases=SWEEP)
    print(f'{processes} processes: survived {len(places)} of {len(places)} kills, in: {" ".join(places)}')
    assert {'step', 'save', 'evaluation'} <= set(places)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_twenty_random_moments_with_a_teacher_cache(tiny, tmp_path):
    """Logits that were being written when the run was killed are not taken for the teacher's: nothing differs."""
    # The same images every second epoch, so that there is something to keep.
    runs = Runs(tiny, tmp_path, '--mixup', '0', '--aug-cycle', '2')
    cache = ('--cache-teacher', '--teacher-cache-dir', str(tmp_path / 'cache'))
    places = survive(runs, 1, tmp_path, 20, seed=3, phases=SWEEP, more=cache)
    print(f'teacher cache: survived {len(places)} of {len(places)} kills, in: {" ".join(places)}')
    assert {'step', 'save', 'evaluation'} <= set(places)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['dfpt', 'dfpt+'])
def test_killed_with_a_head_and_fusion_of_low_rank(tiny, tmp_path, method):
    runs = Runs(tiny, tmp_path, '--method', method, '--prompt-head-rank', '2', '--prompt-fusion-rank', '2')
    survive(runs, 1, tmp_path, 2, seed=5, phases=('step', 'evaluation'))


@pytest.mark.parametrize('phase', ['step', 'evaluation'])
def test_asked_to_stop(runs, tmp_path, phase):
    """SIGTERM saves where the run is, and says so by its exit code."""
    argv = runs.argv(tmp_path / 'run', 1)
    job = Job(argv, tmp_path / 'log')
    job.wait_for(lambda: job.phase == phase)
    job.send(signal.SIGTERM)
    assert job.wait() == [143], job.output()
    assert '--resume' in job.output()
    assert not (tmp_path / 'run' / 'summary.json').exists()
    assert list((tmp_path / 'run' / 'checkpoints').glob('step-????????'))
    job = Job([*argv, '--resume'], tmp_path / 'log')
    assert job.wait() == [0], job.output()
    assert_same(tmp_path / 'run', runs.undisturbed(1))


def running(group: int) -> list[int]:
    """Return the processes of a group that have not ended."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            state, _, its = stat.read_text().rpartition(')')[2].split()[:3]
            found += [int(stat.parent.name)] if int(its) == group and state != 'Z' else []
    return found


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='finds the processes in /proc')
def test_group_asked_to_stop(runs, tmp_path):
    """SIGTERM to all processes of the job, as Slurm sends it: those that load images must live until the save."""
    run = tmp_path / 'run'
    argv = [sys.executable, 'train/distill.py', *runs.argv(run, 1), '--workers', '2']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    with open(tmp_path / 'log', 'wb') as log:
        options = {'cwd': ROOT, 'env': environment, 'stdout': log, 'stderr': log, 'start_new_session': True}
        job = subprocess.Popen(argv, **options)
        while not (run / 'checkpoints' / 'step-00000004').exists() and job.poll() is None:
            time.sleep(0.01)
        assert len(running(job.pid)) > 2
        os.killpg(job.pid, signal.SIGTERM)
        assert job.wait(timeout=100) == 143, (tmp_path / 'log').read_text()
        assert not running(job.pid)
        assert not (run / 'summary.json').exists()
        job = subprocess.Popen([*argv, '--resume'], **options)
        assert job.wait(timeout=200) == 0, (tmp_path / 'log').read_text()
        assert not running(job.pid)
    assert_same(run, runs.undisturbed(1))


def damage(path: Path, how: str) -> None:
    if how == 'bit flipped':
        file = path / 'model.safetensors'
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        (path / 'optimizer.bin').unlink()


@pytest.fixture(scope='module')
def half_done(runs):
    """A run that was asked to stop after the second epoch had begun, with three checkpoints."""
    output = runs.root / 'half'
    job = Job(runs.argv(output, 2), runs.root / 'half.log', 2)
    job.wait_for(lambda: (output / 'checkpoints' / 'step-00000006').exists())
    job.kill()
    return output


def test_damaged_checkpoints_are_passed_over(runs, half_done, tmp_path):
    """Each of the two newest is damaged in its way; the oldest must do, and metrics that it does not know must go."""
    run = tmp_path / 'run'
    shutil.copytree(half_done, run)
    newest = sorted((run / 'checkpoints').glob('step-????????'), reverse=True)
    damage(newest[0], 'bit flipped')
    damage(newest[1], 'file missing')
    (run / 'metrics.jsonl').write_text('{"epoch": 7}\n')
    job = Job([*runs.argv(run, 2), '--resume'], tmp_path / 'log', 2)
    assert job.wait() == [0, 0], job.output()
    assert f'{newest[0].name}\' is damaged' in job.output()
    assert f'{newest[1].name}\' is damaged' in job.output()
    assert_same(run, runs.undisturbed(2))


def given_another(run: Path, option: str, before: object, now: object) -> None:
    """Make a run one that was started with another value of an option."""
    config = run / 'config.yaml'
    text = config.read_text()
    assert f'{option}: {before}\n' in text
    config.write_text(text.replace(f'{option}: {before}\n', f'{option}: {now}\n'))


def test_the_same_data_and_teacher_elsewhere_will_do(runs, half_done, tmp_path):
    run, tiny = tmp_path / 'run', runs.tiny
    shutil.copytree(half_done, run)
    shutil.copytree(tiny.data, tmp_path / 'data')
    shutil.copytree(tiny.teacher, tmp_path / 'teacher')
    given_another(run, 'dataset', tiny.data, tmp_path / 'data')
    given_another(run, 'teacher', f'local-dir:{tiny.teacher}', f'local-dir:{tmp_path}/teacher')
    moved = ['--dataset', str(tmp_path / 'data'), '--teacher', f'local-dir:{tmp_path}/teacher', '--resume']
    job = Job([*runs.argv(run, 2), *moved], tmp_path / 'log', 2)
    assert job.wait() == [0, 0], job.output()
    name = 'student/model.safetensors'
    assert (run / name).read_bytes() == (runs.undisturbed(2) / name).read_bytes()


def test_other_data_at_the_same_place_are_refused(runs, half_done, tmp_path):
    run, data = tmp_path / 'run', tmp_path / 'data'
    shutil.copytree(half_done, run)
    shutil.copytree(runs.tiny.data, data)
    next((data / 'train').glob('*/*.png')).unlink()
    given_another(run, 'dataset', runs.tiny.data, data)
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    job = Job([*runs.argv(run, 2), '--dataset', str(data), '--resume'], tmp_path / 'log', 2)
    assert job.wait() == [1, 1], job.output()
    assert re.search(r'training images: 216, hash \w+ when the run was started, 215, hash \w+ now', job.output())
    assert 'validation images:' not in job.output()
    assert 'another --output' in job.output()
    assert {path: path.read_bytes() for path in run.rglob('*') if path.is_file()} == before


def test_another_teacher_at_the_same_place_is_refused(runs, half_done, tmp_path):
    run, teacher = tmp_path / 'run', tmp_path / 'teacher'
    shutil.copytree(half_done, run)
    shutil.copytree(runs.tiny.teacher, teacher)
    tensors = load_file(teacher / 'model.safetensors')
    tensors['fc.bias'] += 1e-3
    save_file(tensors, teacher / 'model.safetensors', metadata={'format': 'pt'})
    given_another(run, 'teacher', f'local-dir:{runs.tiny.teacher}', f'local-dir:{teacher}')
    job = Job([*runs.argv(run, 2), '--teacher', f'local-dir:{teacher}', '--resume'], tmp_path / 'log', 2)
    assert job.wait() == [1, 1], job.output()
    assert re.search(r'teacher of dfpt: [\d,]+ parameters, hash \w+ when the run was started', job.output())
    assert 'images:' not in job.output().split('started with something else')[1]


def test_a_checkpoint_from_before_origins_were_kept_will_do(runs, half_done, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(half_done, run)
    for checkpoint in (run / 'checkpoints').glob('step-*'):
        progress = json.loads((checkpoint / 'progress.json').read_text())
        assert set(progress.pop('origin')) == {'classes', 'training images', 'validation images', 'teacher of dfpt'}
        (checkpoint / 'progress.json').write_text(json.dumps(progress))
        checksums = json.loads((checkpoint / 'checksums.json').read_text())
        checksums['progress.json'] = hashlib.sha256((checkpoint / 'progress.json').read_bytes()).hexdigest()
        (checkpoint / 'checksums.json').write_text(json.dumps(checksums))
    job = Job([*runs.argv(run, 2), '--resume'], tmp_path / 'log', 2)
    assert job.wait() == [0, 0], job.output()
    assert_same(run, runs.undisturbed(2))


def test_nothing_but_damaged_checkpoints(runs, half_done, tmp_path):
    """Not taken for a run that has not begun: hours of training may be in them, and a copy of one somewhere."""
    run = tmp_path / 'run'
    shutil.copytree(half_done, run)
    for checkpoint in (run / 'checkpoints').glob('step-*'):
        damage(checkpoint, 'bit flipped')
    job = Job([*runs.argv(run, 2), '--resume'], tmp_path / 'log', 2)
    assert job.wait() == [1, 1], job.output()
    assert re.search(r'error: resume: all checkpoints in .* are damaged', job.output())


def test_another_number_of_processes_is_said(runs, half_done, tmp_path):
    """A run of two goes on with one: not bit for bit, which is said, but with the same images in the same order."""
    run = tmp_path / 'run'
    shutil.copytree(half_done, run)
    job = Job([*runs.argv(run, 2), '--resume'], tmp_path / 'log', 1)
    assert job.wait() == [0], job.output()
    assert 'saved by 2 processes and continues with 1' in job.output()
    one, two = (load_file(path / 'student' / 'model.safetensors') for path in (run, runs.undisturbed(2)))
    assert one.keys() == two.keys()
    assert all(torch.isfinite(tensor.float()).all() for tensor in one.values())
