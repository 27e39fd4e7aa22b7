"""Checkpoints that are whole or not there: written aside, checksummed and renamed."""
from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from timm.utils import unwrap_model
from torch import nn

from ..hub.base import fingerprint
from ..hub.files import sync
from ..job.devices import load_optimizer_state, load_weights, optimizer_state, whole_weights

__all__ = [
    'changes', 'describe_teachers', 'latest_checkpoint', 'remove_leftovers', 'restore_checkpoint', 'save_checkpoint',
]  # fmt: skip

_logger = logging.getLogger(__name__)

_MANIFEST = 'checksums.json'
_PROGRESS = 'progress.json'
_SCALER = 'scaler.pt'
_INCOMPLETE = '.incomplete'
_NAME = re.compile(r'step-(\d{8})')
# What writing to a full disk ends in: torch's zip writer and safetensors have errors of their own.
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def _checksum(path: Path) -> str:
    with open(path, 'rb') as file:
        return sha_fileobj(file).hex()


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    keep: int,
    modules: Mapping[str, nn.Module],
    progress: Mapping[str, Any],
) -> Path:
    """Save everything that was prepared with `accelerator`, and what else is given.

    Every file is flushed to the disk before the folder gets its name, so that a checkpoint is whole or not there,
    whatever happens to the process or the machine.

    Args:
        accelerator: What to save: modules, optimizers and the gradient scaler.
        folder: Where the checkpoints of the run are; with several machines, a folder that they share.
        step: Number of steps done, which names the checkpoint.
        keep: Number of checkpoints to keep; older ones are removed after the new one is safe.
        modules: Modules that were not prepared, such as averages of weights, by name.
        progress: Where the run is: values of JSON.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: If the checkpoint cannot be written; nothing is left of it, and the one before is untouched.
    """
    final = folder / f'step-{step:08d}'
    temporary = final.with_name(final.name + _INCOMPLETE)
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        _save_state(accelerator, temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _complete(temporary, modules, progress)
    except _WRITE_ERRORS as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f'The checkpoint {str(final)!r} cannot be written: {error}. Make room (checkpoint_hist={keep} are kept) or '
            'repair the disk, then continue with --resume; the checkpoint before it is untouched.'
        ) from error
    if accelerator.is_main_process:
        _put_in_place(temporary, final)
        _remove_others(folder, final, keep)
    accelerator.wait_for_everyone()
    return final


def _complete(folder: Path, modules: Mapping[str, nn.Module], progress: Mapping[str, Any]) -> None:
    for name, module in modules.items():
        save_model(module, str(folder / f'{name}.safetensors'))
    (folder / _PROGRESS).write_text(json.dumps(progress), encoding='utf-8')
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    checksums = {str(p.relative_to(folder)): _checksum(p) for p in files}
    (folder / _MANIFEST).write_text(json.dumps(checksums, indent=1), encoding='utf-8')
    for path in (*folder.rglob('*'), folder):
        sync(path)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Give a checkpoint that is whole its name, which an older one may have.

    At any moment one of them is whole under a name that is found again: `remove_leftovers` calls this once more.
    """
    old = final.with_name(f'{final.name}.old{_INCOMPLETE}')
    # The new one must be known to the disk before the old one is not.
    sync(final.parent)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(temporary, final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove_others(folder: Path, newest: Path, keep: int) -> None:
    # Those after the newest are of a run that was resumed from before them, because they were damaged.
    names = [path for path in _checkpoints(folder) if path.name <= newest.name]
    for path in _checkpoints(folder):
        if path not in names[:keep]:
            shutil.rmtree(path)


def restore_checkpoint(
    accelerator: Accelerator, folder: Path, modules: Mapping[str, nn.Module], origin: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole into what was prepared with `accelerator` and into `modules`.

    Weights are safetensors and the rest of the state JSON, except optimizers and the gradient scaler, which torch
    writes as pickle: these are loaded with `weights_only=True`.

    Args:
        accelerator: What was prepared as in the run that saved.
        folder: Where the checkpoints of the run are.
        modules: As given to `save_checkpoint`.
        origin: What the run is made from, to be compared with `progress['origin']` where that was saved; it applies in
            the main process. See `describe_data` and `describe_teachers`.

    Returns:
        The progress that was saved, or `None` if there is no checkpoint.

    Raises:
        ValueError: If all checkpoints are damaged, or the newest is of other data, teachers, models or optimizers.
    """
    found: list[Any] = [_find(folder, origin or {}) if accelerator.is_main_process else None]
    # Checksums cost time on large models, and all processes must mean the same checkpoint.
    path, problem = broadcast_object_list(found)[0]
    if problem is not None:
        raise ValueError(problem)
    if path is None:
        return None
    try:
        _load_state(accelerator, path)
        for name, module in modules.items():
            load_model(module, str(path / f'{name}.safetensors'))
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f'The checkpoint {str(path)!r} does not fit the models of this run: {error}. Was it copied from another '
            'run? Remove it, or continue the run that it belongs to.'
        ) from error
    accelerator.print(f'resuming from {path}')
    return _read_progress(path)


def _read_progress(path: Path) -> dict[str, Any]:
    progress: dict[str, Any] = json.loads((path / _PROGRESS).read_text(encoding='utf-8'))
    return progress


def _find(folder: Path, origin: Mapping[str, str]) -> tuple[Path | None, str | None]:
    """Return the checkpoint to go on from, if there is one, and why the run cannot go on, if so."""
    path = latest_checkpoint(folder)
    if path is None:
        if _checkpoints(folder):
            return None, (
                f'resume: all checkpoints in {str(folder)!r} are damaged. Restore one of them from a copy, or remove '
                'the folder to begin again.'
            )
        return None, None
    before = _read_progress(path).get('origin')
    changed = changes(before, origin) if before else []
    if changed:
        return None, (
            f'resume: the run in {str(folder.parent)!r} was started with something else: {"; ".join(changed)}. Put '
            'back what it was started with, or start another run with another --output.'
        )
    return path, None


def _save_state(accelerator: Accelerator, folder: Path) -> None:
    # Not accelerate's save_state, which would pickle the weights that are sharded.
    main = accelerator.is_main_process
    for i, module in enumerate(accelerator._models):
        with whole_weights(module):
            if main:
                # Without the names that wrappers add: a run may go on with another number of processes.
                save_model(unwrap_model(module), str(folder / _numbered('model', i, '.safetensors')))
    for i, optimizer in enumerate(accelerator._optimizers):
        state = optimizer_state(optimizer)
        if main:
            torch.save(state, folder / _numbered('optimizer', i, '.bin'))
    if accelerator.scaler is not None and main:
        torch.save(accelerator.scaler.state_dict(), folder / _SCALER)


def _load_state(accelerator: Accelerator, folder: Path) -> None:
    for i, module in enumerate(accelerator._models):
        load_weights(module, folder / _numbered('model', i, '.safetensors'))
    for i, optimizer in enumerate(accelerator._optimizers):
        load_optimizer_state(optimizer, _load(folder / _numbered('optimizer', i, '.bin')))
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(_load(folder / _SCALER))


def _load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location='cpu', weights_only=True)
    return state


def _numbered(name: str, number: int, suffix: str) -> str:
    return f'{name}_{number}{suffix}' if number else f'{name}{suffix}'


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole, or `None`; a damaged one is named in a warning and passed over."""
    for path in _checkpoints(folder):
        damage = _damage(path)
        if damage is None:
            return path
        _logger.warning(f'Checkpoint {str(path)!r} is damaged ({damage}); using the one before it.')
    return None


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves have left in a run folder: nothing else is called `*.incomplete`.

    A checkpoint that lacks nothing but its name gets it.
    """
    for path in list(folder.glob(f'checkpoints/*{_INCOMPLETE}')):
        final = path.with_name(path.name.removesuffix(_INCOMPLETE))
        if _NAME.fullmatch(final.name) and _damage(path) is None:
            _put_in_place(path, final)
    places = ('', 'checkpoints/', 'teacher_heads/')
    for path in [path for place in places for path in folder.glob(f'{place}*{_INCOMPLETE}')]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob('step-*') if _NAME.fullmatch(p.name)), reverse=True)


def _damage(path: Path) -> str | None:
    try:
        checksums = json.loads((path / _MANIFEST).read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        return f'{_MANIFEST}: {error}'
    if not isinstance(checksums, dict) or _PROGRESS not in checksums:
        return f'{_MANIFEST} is not a list of checksums'
    for name, checksum in checksums.items():
        if not (path / name).is_file():
            return f'{name} is missing'
        if _checksum(path / name) != checksum:
            return f'{name} has another checksum'
    return None


def describe_teachers(teachers: Mapping[str, nn.Module | None]) -> dict[str, str]:
    """Describe teachers so that others are described otherwise.

    Args:
        teachers: The frozen model by name of the learner, `None` for those without.

    Returns:
        By what it is about, the number of parameters and a hash of all weights.
    """
    known: dict[int, str] = {}
    described = {}
    for name, teacher in teachers.items():
        if teacher is None:
            continue
        if id(teacher) not in known:
            found = fingerprint(teacher)
            digest = hashlib.sha256(f'{found.shapes} {found.weights}'.encode()).hexdigest()
            known[id(teacher)] = f'{found.parameters:,} parameters, hash {digest[:16]}'
        described[f'teacher of {name}'] = known[id(teacher)]
    return described


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> Sequence[str]:
    """Return in words what is described otherwise now than before."""
    return [
        f'{name}: {before.get(name, "none")} when the run was started, {now.get(name, "none")} now'
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
