"""Checkpoints that are whole or not there: accelerate's state, written aside, verified and renamed."""
from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator

__all__ = ['latest_checkpoint', 'save_checkpoint', 'write_atomic']

_logger = logging.getLogger(__name__)

_MANIFEST = 'checksums.json'
_NAME = re.compile(r'update-(\d{8})')


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = path.with_name(path.name + '.incomplete')
    with open(temporary, 'wb') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def save_checkpoint(accelerator: Accelerator, folder: Path, updates: int, keep: int) -> Path:
    """Save everything that was prepared or registered with `accelerator`.

    Args:
        accelerator: What to save.
        folder: Where the checkpoints of the run are.
        updates: Number of optimizer updates done, which names the checkpoint.
        keep: Number of checkpoints to keep; older ones are removed after the new one is safe.

    Returns:
        The folder of the checkpoint.
    """
    final = folder / f'update-{updates:08d}'
    temporary = final.with_name(final.name + '.incomplete')
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = sorted(p for p in temporary.rglob('*') if p.is_file())
        checksums = {str(p.relative_to(temporary)): _checksum(p) for p in files}
        write_atomic(temporary / _MANIFEST, json.dumps(checksums, indent=1).encode())
        for path in files:
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _fsync(folder)
        for old in _checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole, or `None`; a damaged one is named in a warning and passed over."""
    for path in _checkpoints(folder):
        damage = _damage(path)
        if damage is None:
            return path
        _logger.warning(f'Checkpoint {path} is damaged ({damage}); taking the one before.')
    return None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob('update-*') if _NAME.fullmatch(p.name)), reverse=True)


def _damage(path: Path) -> str | None:
    try:
        checksums = json.loads((path / _MANIFEST).read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        return f'{_MANIFEST}: {error}'
    for name, checksum in checksums.items():
        if not (path / name).is_file():
            return f'{name} is missing'
        if _checksum(path / name) != checksum:
            return f'{name} has another checksum'
    return None
