"""What to do when the process is asked to stop."""
from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from accelerate import Accelerator

__all__ = ['StopRequest', 'on_sigterm']

# Steps between two looks of several processes at whether one of them was asked to stop; each look waits for all.
_INTERVAL = 8


@contextlib.contextmanager
def on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Within the context call `act` when SIGTERM arrives; what counted before counts again afterwards.

    Outside the main thread nothing changes: Python lets only that one, which a notebook server may need itself, handle
    signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopRequest:
    """Whether a run was asked to stop; of several processes, all learn of it in the same step.

    Args:
        accelerator: Knows the processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.requested = False
        self._looks = 0

    def request(self) -> None:
        """Ask this process to stop."""
        self.requested = True

    def arrived(self, at_once: bool = False) -> bool:
        """Say whether this process was asked to stop or, looked at now and then, one of the others.

        Args:
            at_once: Look now.
        """
        if self.accelerator.num_processes == 1:
            return self.requested
        self._looks += 1
        if self._looks % _INTERVAL and not at_once:
            return False
        if self.requested:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()
