"""One job per folder: a lock that is held as long as the process lives, and frees itself when it dies."""
from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ..hub.files import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ['LOCK', 'FolderLock', 'InUseError', 'locked']

_logger = logging.getLogger(__name__)

LOCK = '.lock'
"""Name of the lock file in a folder that is in use; it says by whom."""

_held: set[int] = set()


class InUseError(ValueError):
    """Another process works in a folder."""


class FolderLock:
    """Exclusive use of a folder until `release`, or the end of the process, however it ends.

    Args:
        folder: The folder; it is created where it does not exist, and removed again if it is empty at the release.

    Raises:
        InUseError: If another process has it; the message says which, and on which host.
        OSError: If it cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._stale = b''
        self._created = [each for each in (folder, *folder.parents) if not each.exists()]
        try:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._descriptor = self._open()
        except BaseException:
            self._remove_created()
            raise
        _held.add(self._descriptor)

    def _open(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock(descriptor)
                # Else another has removed it at the end of its use, and a third may have made another one.
                if self.path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    self._sign(descriptor)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 1000).decode(errors='replace').strip() or 'another process'
            raise InUseError(
                f'output: {str(self.path.parent)!r} is in use by {owner}. Wait for its end, or name another folder '
                'with --output.'
            ) from None
        except OSError as error:
            _logger.warning(
                f'The file system of {str(self.path.parent)!r} does not support locks ({error}): make sure that no '
                'second job uses the same --output, which would corrupt this run.'
            )

    def _sign(self, descriptor: int) -> None:
        text = f'process {os.getpid()} on host {socket.gethostname()} since {time.strftime("%Y-%m-%d %H:%M:%S")}\n'
        self._stale = os.read(descriptor, 1000)
        _write(descriptor, text.encode())

    def release(self, untouched: bool = False) -> None:
        """Let others use the folder.

        Args:
            untouched: Leave the lock file of a process that died in the folder, as everything else in it.
        """
        _held.discard(self._descriptor)
        if untouched and self._stale:
            _write(self._descriptor, self._stale)
        else:
            # Before it is unlocked: the next user would lock a file that is about to be removed.
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(self._descriptor)
        self._remove_created()

    def _remove_created(self) -> None:
        for folder in self._created:
            # Not where something is in it by now.
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder for this process alone within the context; after an error it is left as it was found."""
    lock = FolderLock(folder)
    try:
        yield
    except BaseException:
        lock.release(untouched=True)
        raise
    lock.release()


def _write(descriptor: int, text: bytes) -> None:
    # The lock is held on a full disk, too.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)


def _let_go() -> None:
    """Close the locks in a process that was forked, which may outlive the one that has them."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_let_go)
