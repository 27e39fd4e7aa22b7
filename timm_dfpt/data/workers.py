"""Processes that prepare batches, and the signals of the job that they work for."""

from __future__ import annotations

import os
import signal
import threading

__all__ = ['leave_signals_to_main_process']


def leave_signals_to_main_process(worker: int) -> None:
    """Make a worker end by SIGTERM only if that comes from the main process, and not at all by other such signals.

    Terminals and job queues send them to a whole process group, and the main process can save only if its workers
    outlive it.
    """
    for name in ('SIGINT', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if not hasattr(signal, 'sigwaitinfo'):
        return
    main = os.getppid()
    # Blocked before there are other threads, which inherit that: else one of them would be ended by it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
            pass
        # torch ends workers so that are slow to leave, and wants to see no error then.
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
