"""What to do when the process is asked to stop."""
from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

__all__ = ['on_sigterm']


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
