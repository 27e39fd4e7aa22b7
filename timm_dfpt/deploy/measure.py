"""Exported files of a student, each run at once: how well it agrees with timm's model, and how fast it is."""
from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..hub.build import WEIGHTS
from .form import deployed_form, has_deployed_form
from .inputs import to_pixels
from .onnx_files import EXTRA, OUTPUT, missing_packages, open_session, to_float16, to_int8, to_onnx, write_onnx
from .programs import INPUT, export_pt2

__all__ = ['CALIBRATION_IMAGES', 'ExportJob', 'check_formats', 'export_student_files']

_logger = logging.getLogger(__name__)

CALIBRATION_IMAGES = 256
"""Training images that int8 is calibrated with: half for the ranges, half to choose what is quantized."""
_LARGEST_DIFFERENCE = 1e-4
_LARGEST_LOSS = 1.0

Run = Callable[[torch.Tensor], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ExportJob:
    """What is exported, and what it is measured with.

    Args:
        student: The student as it is saved.
        saved: Folder of the saved student.
        folder: Where the files go.
        data_config: How images are prepared.
        class_names: Names of the classes.
        calibration: Training images `[N, C, H, W]`, prepared as for evaluation.
        validation: Batches whose first two parts are images and class indices; iterated over once for every file.
        include_preprocessing: Whether the files take pixels.
    """

    student: nn.Module
    saved: Path
    folder: Path
    data_config: Mapping[str, Any]
    class_names: Sequence[str]
    calibration: torch.Tensor
    validation: Iterable[Any]
    include_preprocessing: bool = False


def check_formats(formats: Sequence[str]) -> None:
    """Refuse formats that cannot be written here.

    Raises:
        ValueError: If packages are missing; the message says how to install them.
    """
    missing = missing_packages() if 'onnx' in formats else []
    if missing:
        raise ValueError(f'export=onnx needs {", ".join(missing)}: {EXTRA}')


def export_student_files(job: ExportJob, formats: Sequence[str]) -> list[dict[str, Any]]:
    """Write a student in other formats, and measure each file.

    What fails is a row that says so, and a warning; the other files are written all the same.

    Args:
        job: What is exported.
        formats: `'onnx'`, `'pt2'` or both.

    Returns:
        Rows with `format`, `file` (in the run folder), `bytes`, `largest_difference` (of the logits from timm's, as a
        share of the largest logit), `agreement` and `top1` (percent, on the validation data; `None` where there are no
        classes or labels), `images_per_second` (median of five batches), and `note`. The first row is timm's own model.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, tuple[str, Callable[[Path], Any]]] = {}
    models: dict[str, Any] = {}

    def onnx_model() -> Any:
        if not models:
            models['float32'] = to_onnx(job.student, job.data_config, job.class_names, job.include_preprocessing)
        return models['float32']

    def calibration() -> np.ndarray:
        return to_pixels(job.calibration, job.data_config) if job.include_preprocessing else job.calibration.numpy()

    if 'onnx' in formats:
        writers |= {
            'ONNX float32': ('model.onnx', lambda path: write_onnx(onnx_model(), path)),
            'ONNX float16': ('model_fp16.onnx', lambda path: write_onnx(to_float16(onnx_model()), path)),
            'ONNX int8': ('model_quantized.onnx', lambda path: write_onnx(to_int8(onnx_model(), calibration()), path)),
        }
    if 'pt2' in formats:
        options: dict[str, Any] = {'data_config': job.data_config, 'class_names': job.class_names}
        included = job.include_preprocessing
        writers['torch.export'] = (
            'model.pt2', lambda path: export_pt2(job.student, path, **options, include_preprocessing=included)
        )  # fmt: skip
    # What an earlier export has left is not of this student.
    for name in ('model.onnx', 'model_fp16.onnx', 'model_quantized.onnx', 'model.pt2'):
        (job.folder / name).unlink(missing_ok=True)
    plain = job.student.to('cpu', torch.float32).eval()
    deployed = deployed_form(plain)
    expected = _Expected(_numpy(plain), job.validation, has_classes=bool(getattr(plain, 'num_classes', 1)))
    weights = job.saved / WEIGHTS
    note = 'as trained; speed of the form that is deployed' if has_deployed_form(plain) else ''
    rows = [_row('timm', weights, expected.measure(_numpy(deployed)), note)]
    for name, (file, write) in writers.items():
        path = job.folder / file
        try:
            write(path)
            measured = expected.measure(_opened(path, job))
            rows.append(_row(name, path, measured, _note(name, path, measured, rows[0])))
        except Exception as error:  # noqa: BLE001
            reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
            _logger.warning(f'exporting {name} failed ({reason}); everything else in the run folder is complete.')
            path.unlink(missing_ok=True)
            rows.append({'format': name, 'file': None, 'note': f'failed: {reason}'})
    return rows


class _Expected:
    """The predictions of timm's model on the validation data."""

    def __init__(self, run: Run, batches: Iterable[Any], has_classes: bool) -> None:
        self.batches, self.has_classes = batches, has_classes
        self.logits = [run(batch[0]) for batch in batches]
        self.largest = max(float(np.abs(logits).max()) for logits in self.logits)

    def measure(self, run: Run) -> dict[str, float | None]:
        largest, same, right, count, labelled = 0.0, 0, 0, 0, self.has_classes
        example = None
        for batch, expected in zip(self.batches, self.logits, strict=True):
            example = batch[0] if example is None else example
            logits = run(batch[0])
            largest = max(largest, float(np.abs(logits - expected).max()))
            same += int((logits.argmax(1) == expected.argmax(1)).sum())
            right += int((logits.argmax(1) == batch[1].numpy()).sum())
            labelled &= bool((batch[1] >= 0).all())
            count += len(logits)
        assert example is not None
        return {
            'largest_difference': largest / self.largest,
            'agreement': 100 * same / count if self.has_classes else None,
            'top1': 100 * right / count if labelled else None,
            'images_per_second': _speed(run, example),
        }


def _speed(run: Run, example: torch.Tensor) -> float:
    times = []
    for _ in range(6):
        start = time.perf_counter()
        run(example)
        times.append(time.perf_counter() - start)
    # The first batch warms caches up.
    return len(example) / statistics.median(times[1:])


def _numpy(module: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    def run(images: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            logits: np.ndarray = module(images).numpy()
        return logits

    return run


def _opened(path: Path, job: ExportJob) -> Run:
    """Open a file as its users would, and return it as a function of normalised images."""
    def prepare(images: torch.Tensor) -> np.ndarray:
        return to_pixels(images, job.data_config) if job.include_preprocessing else images.numpy()

    if path.suffix == '.pt2':
        program = torch.export.load(path).module()
        return lambda images: _numpy(program)(torch.from_numpy(prepare(images)))
    session = open_session(str(path))
    return lambda images: np.asarray(session.run([OUTPUT], {INPUT: prepare(images)})[0])


def _row(name: str, path: Path, measured: Mapping[str, float | None], note: str) -> dict[str, Any]:
    file = f'{path.parent.name}/{path.name}'
    return {'format': name, 'file': file, 'bytes': path.stat().st_size, **measured, 'note': note}


def _note(name: str, path: Path, measured: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    notes = []
    if measured['top1'] is not None and reference['top1'] - measured['top1'] > _LARGEST_LOSS:
        notes.append(f'LOSES {reference["top1"] - measured["top1"]:.1f} points')
    elif measured['top1'] is None and (measured['agreement'] or 100) < 100 - _LARGEST_LOSS:
        notes.append('DIFFERS in more than 1 of 100 images')
    if name == 'ONNX int8':
        import onnx  # of the extra `onnx`

        facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        notes.append(f'{facts["quantized"]}, {facts["calibration_images"]} images')
    elif name != 'ONNX float16' and measured['largest_difference'] > _LARGEST_DIFFERENCE:
        notes.append(f'differs by more than {_LARGEST_DIFFERENCE:g}')
    return '; '.join(notes)
