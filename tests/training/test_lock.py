"""One job per folder: a second one is refused, whatever becomes of the first."""
import errno
import os
import re
import signal
import socket
import time

import pytest

from tests.forked import CONTEXT
from tests.jobs import Job
from timm_dfpt.job import lock
from timm_dfpt.job.lock import LOCK, FolderLock, InUseError, locked
from timm_dfpt.training import compare, run
from timm_dfpt.training.trainer import Trainer


def test_a_lock_goes_with_what_it_created(tmp_path):
    folder = tmp_path / 'a' / 'b'
    held = FolderLock(folder)
    who = f'process {os.getpid()} on host {re.escape(socket.gethostname())}'
    with pytest.raises(InUseError, match=f'in use by {who} since .*--output'):
        FolderLock(folder)
    held.release()
    assert not list(tmp_path.iterdir())
    held = FolderLock(folder)
    (folder / 'file').touch()
    held.release()
    assert [path.name for path in folder.iterdir()] == ['file']


def hold(folder, pipe):
    FolderLock(folder)
    if os.fork() == 0:  # as a process that prepares images, which lives on for a while
        time.sleep(60)
        os._exit(0)
    pipe.send(os.getpid())
    time.sleep(60)


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=hold, args=(tmp_path / 'run', there))
    process.start()
    pid = here.recv()
    with pytest.raises(InUseError, match=f'process {pid} on host'):
        FolderLock(tmp_path / 'run')
    process.kill()
    process.join()
    stale = (tmp_path / 'run' / LOCK).read_text()
    with pytest.raises(KeyError), locked(tmp_path / 'run'):
        raise KeyError
    assert (tmp_path / 'run' / LOCK).read_text() == stale
    with locked(tmp_path / 'run'):
        pass
    assert not list((tmp_path / 'run').iterdir())


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, 'flock', refuse)
    FolderLock(tmp_path / 'run').release()
    assert 'does not support locks' in caplog.text


@pytest.mark.parametrize('compared', [False, True], ids=['run', 'comparison and its seeds'])
def test_a_job_keeps_others_out_until_its_end(tiny, tmp_path, monkeypatch, capsys, fresh_accelerate, compared):
    """With and without `--resume`: tried while another has the folder, and looked at from within."""
    folder, seen, fit = tmp_path / 'run', [], Trainer.fit
    job, methods = (compare.main, ['--methods', 'kd', '--seeds', '5']) if compared else (run.main, ['--method', 'kd'])
    places = [folder, folder / 'seed-5'] if compared else [folder]
    argv = [*tiny.argv(folder), *methods, '--epochs', '1', '--mixup', '0']

    def looked_at(self):
        for place in places:
            with pytest.raises(InUseError, match=f'process {os.getpid()} on host'):
                FolderLock(place)
        seen.append(self)
        return fit(self)

    def refused(*more):
        fresh_accelerate()
        assert job([*argv, *more]) == 1
        assert f'is in use by process {os.getpid()} on host' in capsys.readouterr().err

    held = FolderLock(folder)
    before = set(tmp_path.rglob('*'))
    refused()
    refused('--resume')
    assert set(tmp_path.rglob('*')) == before
    held.release()
    if compared:
        held = FolderLock(folder / 'seed-5')
        (folder / 'arms.json').write_text('{"kd": {"method": "kd"}}')
        refused('--resume')
        held.release()
    monkeypatch.setattr(Trainer, 'fit', looked_at)
    fresh_accelerate()
    assert job([*argv, '--resume']) == 0
    assert len(seen) == 1
    assert not list(folder.rglob(LOCK))


@pytest.mark.slow
def test_two_at_once_and_two_processes_of_one(tiny, tmp_path):
    """Two jobs of two processes each start with the same command: one of them trains, the other ends, all of it."""
    argv = tiny.argv(tmp_path / 'run', '--epochs', '30', '--method', 'kd')
    first = Job(argv, tmp_path / 'first.log', 2)
    assert first.wait_for(lambda: (tmp_path / 'run' / LOCK).exists())
    second = Job([*argv, '--resume'], tmp_path / 'second.log', 2)
    assert second.wait() == [1, 1]
    assert 'is in use by process' in second.output()
    assert 'Traceback' not in second.output()
    first.send(signal.SIGTERM)
    assert first.wait() == [143, 143], first.output()
