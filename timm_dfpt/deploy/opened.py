"""ONNX files as `timm_dfpt.deploy.onnx_files` writes them, opened again from the file alone."""
from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..hub.config import check_data_config, check_label_names
from .inputs import to_pixels
from .onnx_files import EXTRA, OUTPUT, open_session
from .programs import INPUT

__all__ = ['OpenedOnnx', 'open_onnx']

_KEYS = ('input_size', 'mean', 'std', 'crop_pct', 'class_names')
_TEXTS = ('interpolation', 'crop_mode')


@dataclasses.dataclass(frozen=True)
class OpenedOnnx:
    """An ONNX file of a student.

    Args:
        data_config: How images are prepared for `run`.
        class_names: Names of the classes.
        run: From normalised images `[B, C, H, W]` to logits `[B, K]`, on the CPU.
    """

    data_config: Mapping[str, Any]
    class_names: list[str]
    run: Callable[[torch.Tensor], torch.Tensor]


def open_onnx(path: Path) -> OpenedOnnx:
    """Open an ONNX file.

    Args:
        path: The file, whose metadata describe its images and classes.

    Raises:
        ImportError: If onnxruntime is not installed.
        ValueError: If it is not an ONNX file, or not one of a student.
    """
    if importlib.util.find_spec('onnxruntime') is None:
        raise ImportError(f'{path.name}: ONNX files need onnxruntime: {EXTRA}')
    try:
        session = open_session(str(path))
    except Exception as error:
        raise ValueError(f'{str(path)!r} is not an ONNX file that onnxruntime runs: {error}') from error
    facts = session.get_modelmeta().custom_metadata_map
    try:
        config = {key: json.loads(facts[key]) for key in _KEYS} | {key: facts[key] for key in _TEXTS}
        class_names = config.pop('class_names')
        check_data_config(config)
        (taken,) = session.get_inputs()
        channels, classes = taken.shape[1], session.get_outputs()[0].shape[-1]
        check_label_names(class_names, classes)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f'{str(path)!r} does not say what its images and classes are ({error}): take one that timm-dfpt export '
            'has written.'
        ) from error
    pixels = facts.get('preprocessing') == 'included'
    if channels != config['input_size'][0] or (taken.type == 'tensor(uint8)') != pixels:
        raise ValueError(
            f'{str(path)!r} takes other images than its metadata says, as what is made for transformers.js does: take '
            'the model.onnx that timm-dfpt export has written.'
        )

    def run(images: torch.Tensor) -> torch.Tensor:
        images = images.cpu()
        given = to_pixels(images, config) if pixels else images.numpy()
        return torch.from_numpy(np.asarray(session.run([OUTPUT], {INPUT: given})[0]))

    return OpenedOnnx(config, list(class_names), run)
