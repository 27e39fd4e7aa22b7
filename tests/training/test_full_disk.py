"""Disks without room, outside checkpoints: one error that names the file and the remedy, and nothing left of it."""
import contextlib
import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import Job
from timm_dfpt.hub.files import write_json, write_tensors
from timm_dfpt.training.plots import plot_comparison, plot_curves
from timm_dfpt.training.run_folder import RunFolder
from timm_dfpt.training.teacher_cache import TeacherCache

ROOT = Path(__file__).parents[2]
LINE = {'epoch': 1, 'kd': {'train': {'loss': 1.0}, 'val': {'student': {'top1': 50.0}}}}


@contextlib.contextmanager
def room_for(count):
    """No file may have more bytes: what writing to a full disk looks like, without root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tensors(path):
    write_tensors(path, {'a': torch.zeros(50_000)})


def json(path):
    write_json(path, {'a': 'x' * 50_000})


def summary(path):
    run = RunFolder(path.parent)
    run.summary = path
    run.write_summary({'a': 'x' * 50_000})


def curves(path):
    plot_curves([LINE], path, 'title')


def comparison(path):
    arm = {'val': {'score': 'top1', 'values': [50.0], 'mean': 50.0}}
    result = {'arms': {'kd': arm}, 'seeds': [0], 'eval_split': 'val'}
    plot_comparison(result, [[LINE]], path)


@pytest.mark.parametrize('write', [tensors, json, summary, curves, comparison])
def test_what_is_exported(tmp_path, write):
    path = tmp_path / 'run' / 'file'
    path.parent.mkdir()
    path.write_text('old')
    with room_for(2_000), pytest.raises(OSError, match=rf'{re.escape(str(path))}.* cannot be written: .*--resume'):
        write(path)
    assert path.read_text() == 'old'
    assert not list(path.parent.glob('*.incomplete'))
    write(path)
    assert path.stat().st_size > 2_000


def test_a_run_that_finds_no_room_to_begin(tiny, tmp_path):
    """Even its options are too long; with room made, it begins."""
    argv = [*tiny.argv(tmp_path / 'run', '--epochs', '1'), '--resume']
    job = Job(argv, tmp_path / 'log', file_bytes=2_000)
    assert job.wait() == [1], job.output()
    path = re.escape(str(tmp_path / 'run' / 'config.yaml'))
    assert re.search(rf"error: '{path}' cannot be written: .*Make room", job.output())
    assert 'Traceback' not in job.output()
    job = Job(argv, tmp_path / 'room.log')
    assert job.wait() == [0], job.output()


def make_cache(folder, rows=1_000):
    return TeacherCache(folder, {'teacher': 'a'}, rows=rows, classes=500)


@pytest.mark.parametrize('supported', [True, False])
def test_the_room_for_a_teachers_logits_is_taken_at_once(tmp_path, monkeypatch, supported):
    if not supported:
        def refuse(*args):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(os, 'posix_fallocate', refuse, raising=False)
    cache = make_cache(tmp_path)
    logits = torch.randn(1, 500)
    cache.put(0, torch.tensor([3]), logits)
    status = cache.path.stat()
    assert status.st_size > 2_000_000
    assert 512 * status.st_blocks >= status.st_size
    cache.flush()
    stored = load_file(cache.path)
    assert torch.equal(stored['logits'][0, 3], logits[0])
    assert stored['known'].nonzero().tolist() == [[0, 3]]
    assert stored['logits'].count_nonzero() == logits.count_nonzero()


def test_no_room_for_a_teachers_logits(tmp_path):
    cache = make_cache(tmp_path / 'cache')
    message = rf'{re.escape(str(cache.path))}. cannot be written: .* 2 MiB: .*--teacher-cache-dir'
    with room_for(100_000), pytest.raises(OSError, match=message):
        cache.put(0, torch.tensor([3]), torch.randn(1, 500))
    assert not list((tmp_path / 'cache').iterdir())


FILL = """
import sys
from pathlib import Path
import torch
from timm_dfpt.training.teacher_cache import TeacherCache
cache = TeacherCache(Path(sys.argv[1]), {'teacher': 'a'}, rows=1000, classes=500)
try:
    cache.put(0, torch.arange(1000), torch.randn(1000, 500))
except OSError as error:
    print(error)
    sys.exit(3)
"""


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    place = tmp_path / 'disk'
    place.mkdir()
    mount = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(place)], capture_output=True)
    if mount.returncode:
        pytest.skip('may not mount a file system')
    yield place
    subprocess.run(['umount', str(place)], check=True)


def test_a_full_disk_is_an_error_and_no_crash(small_disk):
    """Mapped memory without room behind it ends the process by SIGBUS."""
    job = subprocess.run(
        [sys.executable, '-c', FILL, str(small_disk)], capture_output=True, text=True, timeout=200,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    assert job.returncode == 3, job.stderr
    assert 'No space left on device' in job.stdout
    assert not list(small_disk.iterdir())
