"""Students as exported programs of torch (`.pt2`)."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..hub.files import atomic
from .form import deployed_form
from .inputs import Normalised, describe_input

__all__ = ['INPUT', 'export_pt2', 'prepared', 'resolved_config']

INPUT = 'pixel_values'
"""Name of the input, as transformers.js and Optimum have it."""


def resolved_config(student: nn.Module, data_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return how a student's images are prepared: as given, and for the rest as its `pretrained_cfg` says."""
    from timm.data import resolve_model_data_config  # an import of timm.data that only exports need

    resolved: dict[str, Any] = resolve_model_data_config(student)
    return {**resolved, **(data_config or {})}


def prepared(
    student: nn.Module, data_config: Mapping[str, Any], include_preprocessing: bool
) -> tuple[nn.Module, tuple[torch.Tensor], Any]:
    """Return what is exported of a student: the module, an example of its arguments, and their dynamic dimensions."""
    module = deployed_form(student)
    # Two images: torch takes a dimension of one for a constant.
    example = torch.zeros(2, *data_config['input_size'])
    if include_preprocessing:
        module, example = Normalised(module, data_config['mean'], data_config['std']).eval(), example.to(torch.uint8)
    return module, (example,), ({0: torch.export.Dim('batch', min=1)},)


def export_pt2(
    student: nn.Module,
    path: str | os.PathLike[str],
    *,
    data_config: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    include_preprocessing: bool = False,
) -> Path:
    """Write a student as a program that `torch.export.load(path).module()` runs, of any number of images.

    Args:
        student: Classifier made by `timm.create_model`; it is exported in the form that is deployed.
        path: The file, `.pt2`.
        data_config: How its images are prepared, as `timm.data.resolve_data_config` returns it. Default: the model's.
        class_names: Names of the classes, for the metadata.
        include_preprocessing: As for `export_onnx`.

    Returns:
        The file.
    """
    config = resolved_config(student, data_config)
    module, example, dynamic = prepared(student, config, include_preprocessing)
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=dynamic)
    facts = describe_input(config, class_names, include_preprocessing)
    # A file object, since torch insists on a suffix that temporary files do not have.
    with atomic(Path(path)) as temporary, temporary.open('wb') as file:
        torch.export.save(program, file, extra_files=facts)
    return Path(path)
