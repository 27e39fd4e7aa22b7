"""The student of a run in the formats of other runtimes."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..data.datasets import DataSplits
from ..data.loader import ImageDataset, create_loader
from ..deploy.measure import CALIBRATION_IMAGES, ExportJob, export_student_files
from ..hub.build import WEIGHTS
from ..hub.repo import Source, open_source
from ..hub.student import build_student
from ..job.options import TrainConfig
from .run_folder import RunFolder

__all__ = ['export_files', 'export_job']

_BATCH = 32


def export_files(
    config: TrainConfig, data: DataSplits, input_config: dict[str, Any], folder: RunFolder
) -> list[dict[str, Any]]:
    """Write the saved student of a run as `config.export` says, and measure each file on the validation data.

    Args:
        config: The options.
        data: The splits.
        input_config: timm's data config of the run.
        folder: The run folder, with its student.

    Returns:
        Rows of `timm_dfpt.deploy.measure.export_student_files`.
    """
    job = export_job(
        open_source(folder.student), folder.exported, data, input_config,
        batch_size=config.validation_batch_size or config.batch_size or _BATCH,
        include_preprocessing=config.include_preprocessing,
    )  # fmt: skip
    return export_student_files(job, config.export)


def export_job(
    source: Source,
    folder: Path,
    data: DataSplits,
    input_config: dict[str, Any],
    *,
    batch_size: int = _BATCH,
    include_preprocessing: bool = False,
) -> ExportJob:
    """Return what is exported of a saved student, and what it is calibrated and measured with.

    Args:
        source: Where the student is.
        folder: Where the files go.
        data: Training images to calibrate int8 with, and validation images to measure the files on.
        input_config: timm's data config of the student.
        batch_size: Images per batch in measuring.
        include_preprocessing: Whether the files take pixels.
    """
    rows = torch.linspace(0, len(data.train) - 1, min(CALIBRATION_IMAGES, len(data.train))).long().tolist()
    images = ImageDataset(data.train, input_config, None, 0, cache=False)
    batches = [images.__getitems__(rows[start : start + _BATCH])[0] for start in range(0, len(rows), _BATCH)]
    return ExportJob(
        student=build_student(source),
        saved=source.get(WEIGHTS).parent,
        folder=folder,
        data_config=input_config,
        class_names=data.class_names,
        calibration=torch.cat(batches),
        # Not the run's own loader, which several processes share.
        validation=create_loader(data.val, data_config=input_config, batch_size=batch_size, is_training=False),
        include_preprocessing=include_preprocessing,
    )
