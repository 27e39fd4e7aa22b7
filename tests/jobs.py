"""Real processes that run the main job."""
from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.forked import CONTEXT

# What a process is doing, by the public functions that its main thread is in, the first that fits. The teacher is also
# evaluated before the trainer's `fit`.
PHASES = {
    'save': {'checkpoint.py:save_checkpoint'},
    'evaluation': {'trainer.py:fit', 'evaluation.py:evaluate'},
    'step': {'learner.py:step'},
    'export': {'export.py:export'},
}


def _watch(phase: Any) -> None:
    """Tell the parent, every millisecond, what the main thread is doing."""
    main = threading.main_thread().ident
    assert main is not None
    while True:
        frame, names = sys._current_frames().get(main), set()
        while frame is not None:
            # Ours only: other packages have such files, too.
            if 'timm_dfpt' in frame.f_code.co_filename:
                names.add(f'{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}')
            frame = frame.f_back
        found = [i for i, functions in enumerate(PHASES.values()) if functions <= names]
        phase.value = found[0] if found else -1
        time.sleep(0.001)


def _work(argv: Sequence[str], environment: Mapping[str, str], log: str, phase: Any, file_bytes: int | None) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    import torch

    from timm_dfpt.training.run import main

    torch.set_num_threads(1)
    threading.Thread(target=_watch, args=(phase,), daemon=True).start()
    sys.exit(main(argv))


def free_port() -> int:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port: int = server.getsockname()[1]
        return port


class Job:
    """The main job in one or several processes.

    Args:
        argv: Arguments of the job.
        log: Where to write what it prints.
        processes: Number of processes.
        file_bytes: Size beyond which no file can be written, as on a full disk.
        environment: Further variables, such as those that accelerate's launcher sets.
    """

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        processes: int = 1,
        file_bytes: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        port, common = str(free_port()), {'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'}
        self.workers = []
        self._phase = CONTEXT.RawValue('i', -1)
        for rank in range(processes):
            variables = {**common, **(environment or {})}
            if processes > 1:
                # What torchrun and accelerate's launcher set.
                variables |= {
                    'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(processes),
                    'LOCAL_WORLD_SIZE': str(processes), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port,
                }  # fmt: skip
            worker = CONTEXT.Process(target=_work, args=(list(argv), variables, str(log), self._phase, file_bytes))
            worker.start()
            self.workers.append(worker)

    @property
    def phase(self) -> str:
        """What one of the processes was doing a millisecond ago: a key of `PHASES`, or `'else'`."""
        number: int = self._phase.value
        return list(PHASES)[number] if number >= 0 else 'else'

    @property
    def alive(self) -> bool:
        return any(worker.is_alive() for worker in self.workers)

    def send(self, signum: int, rank: int | None = None) -> None:
        for worker in self.workers if rank is None else [self.workers[rank]]:
            if worker.is_alive() and worker.pid is not None:
                os.kill(worker.pid, signum)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = 600) -> list[int | None]:
        """Return the exit codes; fail if a process has not ended by then."""
        end = time.monotonic() + timeout
        for worker in self.workers:
            worker.join(max(0.0, end - time.monotonic()))
        hanging = [worker for worker in self.workers if worker.is_alive()]
        for worker in hanging:
            worker.kill()
            worker.join()
        assert not hanging, f'still running after {timeout} s:\n{self.output()}'
        return [worker.exitcode for worker in self.workers]

    def wait_for(self, condition: Callable[[], bool], timeout: float = 600) -> bool:
        """Wait until the condition holds; return whether it does, or the job has ended before."""
        end = time.monotonic() + timeout
        while self.alive and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.002)
        return condition()

    def output(self) -> str:
        return self.log.read_text(encoding='utf-8', errors='replace') if self.log.exists() else ''
