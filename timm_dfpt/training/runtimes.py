"""The student of a run in the formats of other runtimes."""
from __future__ import annotations

from typing import Any

import torch

from ..data.datasets import DataSplits
from ..data.loader import ImageDataset, create_loader
from ..deploy.measure import CALIBRATION_IMAGES, ExportJob, export_student_files
from ..hub.repo import open_source
from ..hub.student import build_student
from ..job.options import TrainConfig
from .run_folder import RunFolder

__all__ = ['export_files']

_BATCH = 32


def export_files(
    config: TrainConfig, data: DataSplits, input_config: dict[str, Any], folder: RunFolder
) -> list[dict[str, Any]]:
    """Write the saved student as `config.export` says, and measure each file on the validation data.

    Args:
        config: The options.
        data: The splits.
        input_config: timm's data config of the run.
        folder: The run folder, with its student.

    Returns:
        Rows of `timm_dfpt.deploy.measure.export_student_files`.
    """
    rows = torch.linspace(0, len(data.train) - 1, min(CALIBRATION_IMAGES, len(data.train))).long().tolist()
    images = ImageDataset(data.train, input_config, None, config.seed, cache=False)
    batches = [images.__getitems__(rows[start : start + _BATCH])[0] for start in range(0, len(rows), _BATCH)]
    # Not the run's own loader, which several processes share.
    size = config.validation_batch_size or config.batch_size or _BATCH
    validation = create_loader(data.val, data_config=input_config, batch_size=size, is_training=False)
    job = ExportJob(
        student=build_student(open_source(folder.student)),
        saved=folder.student,
        folder=folder.exported,
        data_config=input_config,
        class_names=data.class_names,
        calibration=torch.cat(batches),
        validation=validation,
        include_preprocessing=config.include_preprocessing,
    )
    return export_student_files(job, config.export)
