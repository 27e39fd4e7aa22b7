"""How a job ends: done, asked to stop by a signal, or by an error reported in one line; and the exit code of each."""
from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator

from ..utils.messages import clip, without_traceback

__all__ = [
    'NonFiniteLossError', 'Preempted', 'StopRequest', 'exit_code', 'lasting_output', 'leave', 'on_stop', 'stop_signal',
]  # fmt: skip

# By default each of these ends a process; job queues send the last three, too.
_SIGNALS = ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU')
_FROM_PEOPLE = ('SIGTERM', 'SIGINT', 'SIGHUP')
# Seconds within which a second SIGINT is the same one: launchers hand on what the terminal sends to all processes.
_SAME = 0.3
# Seconds that what is under way outside of training, such as a download in a thread, has to end.
_PATIENCE = 10.0
# Steps between two checks of several processes whether one of them was asked to stop; each check waits for all.
_INTERVAL = 8

# What collectives of gloo and NCCL say when a process is gone.
_GONE = re.compile(r'[Cc]onnection (closed|reset) by peer|Broken pipe|remote process exit')

# When the process was asked to stop, and by which signal.
_asked: tuple[float, int] | None = None


class Preempted(BaseException):
    """The process was asked to stop by a signal.

    Not an `Exception`: what handles the errors of a model or a download must not catch it.

    Args:
        signum: The signal.
        remedy: How to go on.
    """

    def __init__(self, signum: int, remedy: str = 'the same command with --resume goes on') -> None:
        super().__init__(f'Stopped by {signal.Signals(signum).name}: {remedy}.')
        self.signum = signum


class NonFiniteLossError(RuntimeError):
    """A loss, gradient, weight or metric is NaN or infinite; the message says which, where, and what to try.

    Args:
        found: What is not finite, and where.
        folder: Folder to resume in.
    """

    def __init__(self, found: str, folder: object) -> None:
        # Seed, step and rows determine a step: on the same machine it is the same one to the last bit.
        super().__init__(
            f'{found}. To replay it, add --output {shlex.quote(str(folder))} --resume --log-interval 1 to the command. '
            'Else try a lower --lr or --prompt-lr, --clip-grad 1.0, --warmup-epochs 1, or a higher --temperature.'
        )
        self.found = found


def stop_signal() -> int | None:
    """Return the signal by which the process was asked to stop, `None` if it was not."""
    return None if _asked is None else _asked[1]


@contextlib.contextmanager
def on_stop(act: Callable[[int], None]) -> Iterator[None]:
    """Within the context call `act` with the first signal that asks the process to stop.

    A second SIGINT (Ctrl-C) raises `Preempted` at once. Signals that are ignored, as by `nohup`, stay so, and of those
    that the user's own program deals with only the three that people send are taken over. Outside the main thread
    nothing changes: Python lets only that one, which a notebook server may need itself, handle signals.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = _Handler(act)
    previous = {number: signal.getsignal(number) for number in _numbers()}
    if not any(isinstance(each, _Handler) for each in previous.values()):
        _asked = None
    try:
        for number in previous:
            signal.signal(number, handler)
        yield
    finally:
        for number, each in previous.items():
            signal.signal(number, each)


class _Handler:
    def __init__(self, act: Callable[[int], None]) -> None:
        self.act, self.process = act, os.getpid()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        global _asked
        if os.getpid() != self.process:
            return  # a process that prepares images, just forked
        if _asked is None:
            _asked = (time.monotonic(), signum)
            self.act(signum)
        elif signum == signal.SIGINT and time.monotonic() - _asked[0] > _SAME:
            raise Preempted(signum, 'at once; the same command with --resume goes on from the last save')


def _numbers() -> list[int]:
    numbers: list[int] = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    return [number for number in numbers if _may_handle(number)]


def _may_handle(number: int) -> bool:
    handler = signal.getsignal(number)
    if number == signal.SIGTERM:
        return handler is not None
    if handler is signal.SIG_DFL or isinstance(handler, _Handler):
        return True
    return signal.Signals(number).name in _FROM_PEOPLE and callable(handler)


class StopRequest:
    """Whether a run was asked to stop; of several processes, all learn of it in the same step.

    Args:
        accelerator: Knows the processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._looks = 0

    def arrived(self, at_once: bool = False) -> bool:
        """Say whether this process was asked to stop or, checked now and then, one of the others.

        Args:
            at_once: Look now.
        """
        requested = stop_signal() is not None
        if self.accelerator.num_processes == 1:
            return requested
        self._looks += 1
        if self._looks % _INTERVAL and not at_once:
            return False
        if requested:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()


def exit_code(job: Callable[[], Any], remedy: str = 'the same command with --resume goes on') -> int:
    """Do a job, and turn signals and the errors that a user can do something about into one line.

    Args:
        job: The job. What it saves before it stops is its own affair, see `on_stop`.
        remedy: How to go on after a signal that arrives when there is nothing to save.

    Returns:
        The exit code: 0, 1 after an error, 128 and the number of a signal after that.
    """
    watchdogs: list[threading.Timer] = []

    def stop(signum: int) -> None:
        stopped = Preempted(signum, remedy)
        # For what swallows every exception, or waits for its threads.
        watchdog = threading.Timer(_PATIENCE, _end, (stopped,))
        watchdog.daemon = True
        watchdog.start()
        watchdogs.append(watchdog)
        raise stopped

    with lasting_output(), _repeated_where_lost():
        logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
        # It writes what it logs itself, and all would be said twice.
        logging.getLogger('huggingface_hub').propagate = False
        try:
            with on_stop(stop):
                job()
                if torch.distributed.is_initialized():
                    torch.distributed.destroy_process_group()
        except BaseException as error:
            stopped = _stopped_by(error, remedy)
            if stopped is not None:
                print(stopped, file=sys.stderr)
                return 128 + stopped.signum
            message = _in_one_line(error)
            if message is None:
                raise
            print(f'error: {clip(message)}', file=sys.stderr)
            return 1
        finally:
            for watchdog in watchdogs:
                watchdog.cancel()
    return 0


@contextlib.contextmanager
def _repeated_where_lost() -> Iterator[None]:
    """Repeat within the context a signal that arrived where Python ignores exceptions, as in the end of an object."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        global _asked
        if isinstance(unraisable.exc_value, Preempted):
            _asked = None
            # Not from here, where it would be lost again.
            threading.Timer(0.01, os.kill, (os.getpid(), unraisable.exc_value.signum)).start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def leave(code: int) -> NoReturn:
    """End the process of a script; signals that arrive during the cleanup do not change the exit code."""
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _end(stopped: Preempted) -> None:
    print(stopped, file=sys.stderr, flush=True)
    os._exit(128 + stopped.signum)


def _stopped_by(error: BaseException, remedy: str) -> Preempted | None:
    """Return the signal behind an error, which other packages may have turned into one of theirs."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Preempted):
            return cause
        cause = cause.__cause__ or cause.__context__
    signum = stop_signal()
    # The others have stopped, too.
    return Preempted(signum, remedy) if signum is not None and _is_of_another_process(error) else None


def _is_of_another_process(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None


def _in_one_line(error: BaseException) -> str | None:
    """Say what is wrong and what to do about it; `None` if it may be a mistake in the program."""
    text = str(error)
    if isinstance(error, (ValueError, TypeError, NonFiniteLossError, OSError)):
        return ' '.join(line.strip() for line in without_traceback(text).splitlines())
    if not isinstance(error, (RuntimeError, MemoryError)):
        return None
    remedy = _remedy(error, text)
    return None if remedy is None else f'{" ".join(text.split())} {remedy}'


def _remedy(error: RuntimeError | MemoryError, text: str) -> str | None:
    # torch has a class for the memory of accelerators only.
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or 'DefaultCPUAllocator' in text:
        return (
            'Continue with --resume when there is more memory, or start with another --output and a smaller '
            '--batch-size (and --grad-accum-steps) or --validation-batch-size.'
        )
    # With its number: it has died, and did not just pass an exception on.
    if 'DataLoader worker (pid' in text:
        return (
            'A process that prepares images was ended from outside, mostly for want of memory (in a container also '
            'of /dev/shm): continue with --resume and fewer --workers.'
        )
    if _is_of_another_process(error):
        return 'Another process of the job has ended: see its message, and continue with --resume.'
    return None


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Within the context let nothing that becomes of stdout and stderr end the job.

    They may be closed from the start, or a pipe whose reader goes, or a terminal that goes away.
    """
    # Else the next file that is opened would be stdout or stderr to what writes there without Python.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_lasting, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: Any) -> Any:
    return open(os.devnull, 'w', encoding='utf-8') if stream is None else _LastingStream(stream)  # noqa: SIM115


class _LastingStream:
    """A text stream that goes on writing to nowhere when there is no place to write to any more."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                # For the rest of its buffer, and for what writes there without Python.
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
