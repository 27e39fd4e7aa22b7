"""Logits of a frozen model, computed once and kept on disk: exact, or refused.

A row's logits are asked for again in a batch of other rows. On the machines tried they have the same bits there, as
long as the batch has the same size; `check_exact` makes sure of it before the cache is used.
"""
from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..hub.base import fingerprint
from ..hub.files import atomic
from ..teacher.teacher import DualForwardPathTeacher

__all__ = ['TeacherCache', 'cache_key', 'check_exact']

_FORMAT = '2'
_DTYPES = {torch.float32: 'F32', torch.float64: 'F64', torch.bfloat16: 'BF16', torch.float16: 'F16'}
# Options that change what the teacher sees, or by which operations its logits come about.
_OPTIONS = (
    'seed', 'aug_cycle', 'no_aug', 'train_crop_mode', 'crop_padding', 'scale', 'ratio', 'hflip', 'vflip',
    'color_jitter', 'aa', 'reprob', 'jpeg_draft', 'background', 'batch_size', 'mixed_precision', 'channels_last',
    'compile', 'compile_mode', 'teacher_dtype', 'teacher_input_size',
)  # fmt: skip


def cache_key(
    options: Mapping[str, Any],
    teacher: nn.Module,
    data: str,
    input_config: Mapping[str, Any],
    device: torch.device,
    paths: DualForwardPathTeacher | None = None,
) -> dict[str, Any]:
    """Return everything that may change a bit of the teacher's logits, or its prompt path's, as plain JSON types.

    Args:
        options: Options of the run by name.
        teacher: The frozen model.
        data: `dataset_fingerprint` of the training split.
        input_config: What the loader makes of images.
        device: Where the teacher runs.
        paths: The teacher with both of its paths, where logits of the frozen prompt path are meant.
    """
    cpu = (torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()) if device.type == 'cpu' else None
    key = {
        'format': _FORMAT,
        'teacher': dataclasses.asdict(fingerprint(teacher)),
        'data': data,
        'input_config': dict(input_config),
        'options': {name: options[name] for name in _OPTIONS},
        'torch': torch.__version__,
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        'cpu': cpu,
    }
    if paths is not None:
        path = paths.prompt_path
        key['prompt_path'] = {
            'weights': dataclasses.asdict(fingerprint(path)),
            'variant': path.variant,
            'stages': [stage.module for stage in path.stages],
            'config': dataclasses.asdict(path.config),
        }
    return json.loads(json.dumps(key, sort_keys=True, default=str))


@torch.no_grad()
def check_exact(forward: Callable[[torch.Tensor], torch.Tensor], input: torch.Tensor) -> None:
    """Make sure that a row's logits do not depend on its place in a batch and on the other rows.

    Args:
        forward: The teacher, images `[B, C, H, W]` to logits `[B, K]`.
        input: Images of the size of a training batch.

    Raises:
        ValueError: If they do; cached logits would not be those of a run without cache.
    """
    logits = forward(input)
    order = torch.arange(len(input), device=input.device).roll(1)
    others = torch.cat([input[order][: len(input) // 2 + 1], input.flip(0)[len(input) // 2 + 1 :] * 0.5])
    again = forward(others)[: len(input) // 2 + 1]
    expected = logits[order][: len(input) // 2 + 1]
    if not torch.equal(again, expected):
        raise ValueError(
            'cache_teacher: on this device the logits of an image depend on the other images of the batch (by up to '
            f'{(again - expected).abs().max().item():.1e}), so that a cache would change the student. Leave '
            '--cache-teacher out.'
        )


class TeacherCache:
    """Logits `[V, N, K]` of `N` training rows in `V` variants of their augmentation, in a memory-mapped file.

    Filled batch by batch in the first pass of each variant. The file is safetensors at any time; what a crash leaves
    in it is either known and right, or not known.

    Args:
        folder: Where the file is, or will be.
        key: What the logits depend on, see `cache_key`; another key is another file.
        rows: Number of training rows `N`.
        classes: Number of classes `K`.
        variants: Epochs after which the augmentation repeats `V`; 1 without augmentation.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], rows: int, classes: int, variants: int = 1) -> None:
        self.text = json.dumps(key, sort_keys=True)
        self.path = folder / f'{hashlib.sha256(self.text.encode()).hexdigest()[:32]}.safetensors'
        self.shape = (variants, rows, classes)
        self.known = torch.zeros(variants, rows, dtype=torch.bool)
        self.logits: torch.Tensor | None = None
        self._known_on_disk = torch.empty(0)
        if self.path.is_file():
            self._open()

    def get(self, epoch: int, rows: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        """Return the logits `[B, K]` of a batch, or `None` if one of them is not known yet.

        Args:
            epoch: Number of the epoch, whose augmentation is that of `epoch % V`.
            rows: Rows of the batch, int64 `[B]`.
            device: Where the logits are to be.
        """
        variant, rows = epoch % self.shape[0], rows.cpu()
        if self.logits is None or not bool(self.known[variant, rows].all()):
            return None
        return self.logits[variant, rows].to(device, non_blocking=True)

    def put(self, epoch: int, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Keep the logits `[B, K]` of a batch of the size that training batches have.

        Raises:
            OSError: If there is no room for the file.
            RuntimeError: If some are known already, and were others.
        """
        variant, rows, logits = epoch % self.shape[0], rows.cpu(), logits.detach().cpu()
        if self.logits is None:
            self._create(logits.dtype)
        assert self.logits is not None
        before = self.known[variant, rows]
        if not torch.equal(self.logits[variant, rows[before]], logits[before]):
            raise RuntimeError(
                f'The teacher cache {self.path} holds other logits than the teacher gives now for the same images. '
                'Delete the file, and leave --cache-teacher out if it happens again.'
            )
        self.logits[variant, rows] = logits
        self.known[variant, rows] = True

    def flush(self) -> None:
        """Bring everything to the disk: first logits, then the note that they are known."""
        if self.logits is None or torch.equal(self.known, self._known_on_disk.bool()):
            return
        self._sync()
        self._known_on_disk |= self.known.to(torch.uint8)
        self._sync()

    def _create(self, dtype: torch.dtype) -> None:
        if dtype not in _DTYPES:
            raise ValueError(
                f'cache_teacher: logits must be of {sorted(_DTYPES.values())} to be cached, got {dtype}: leave '
                '--cache-teacher out.'
            )
        variants, rows, classes = self.shape
        size = variants * rows * classes * dtype.itemsize
        header = {
            '__metadata__': {'key': self.text},
            'logits': {'dtype': _DTYPES[dtype], 'shape': list(self.shape), 'data_offsets': [0, size]},
            'known': {'dtype': 'U8', 'shape': [variants, rows], 'data_offsets': [size, size + variants * rows]},
        }
        text = json.dumps(header).encode()
        text += b' ' * (-len(text) % 8)
        count = size + variants * rows
        remedy = (
            f'The cache of the teacher takes {count / 2**20:,.0f} MiB: make room or name another --teacher-cache-dir, '
            'or leave --cache-teacher out; then continue with --resume.'
        )
        with atomic(self.path, remedy) as temporary:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, 'wb') as file:
                file.write(len(text).to_bytes(8, 'little') + text)
                _reserve(file, count)
        self._open()

    def _open(self) -> None:
        try:
            with safe_open(self.path, 'pt') as file:
                key = (file.metadata() or {}).get('key')
                shape, dtype = tuple(file.get_slice('logits').get_shape()), file.get_slice('logits').get_dtype()
        except (SafetensorError, OSError) as error:
            raise ValueError(f'cache_teacher: {str(self.path)!r} is damaged ({error}); delete it.') from error
        if key != self.text or shape != self.shape:
            raise ValueError(f'cache_teacher: {str(self.path)!r} is of another teacher or dataset; delete it.')
        kind = next(each for each, name in _DTYPES.items() if name == dtype)
        # safetensors itself gives copies or read-only views; the same bytes mapped can be written, too.
        data = torch.from_file(str(self.path), shared=True, size=self.path.stat().st_size, dtype=torch.uint8)
        variants, rows, classes = shape
        count = variants * rows * classes * kind.itemsize
        start = len(data) - count - variants * rows
        self.logits = data[start : start + count].view(kind).view(shape)
        self._known_on_disk = data[start + count :].view(variants, rows)
        self.known = self._known_on_disk.bool()

    def _sync(self) -> None:
        with open(self.path, 'rb+') as file:
            os.fsync(file.fileno())


def _reserve(file: BinaryIO, count: int) -> None:
    """Append zeros to a file that has just been written, and take the room for them on the disk.

    Without it a disk that is full later would raise no error: writing to mapped memory then kills the process (SIGBUS).
    """
    file.flush()
    if hasattr(os, 'posix_fallocate'):
        try:
            os.posix_fallocate(file.fileno(), file.tell(), count)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    # Not every file system and C library can do that.
    while count > 0:
        count -= file.write(bytes(min(count, 1 << 20)))
