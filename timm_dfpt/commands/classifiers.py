"""MODEL of a command line: a run folder, a saved or published student or prompt path, or an ONNX file."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.image_dataset import ImageDataset
from ..data.image_split import ImageSplit
from ..data.paths import similar_path
from ..deploy.opened import open_onnx
from ..hub.files import read_json
from ..hub.load import load_student
from ..hub.options import LoadOptions, Unpack
from ..hub.prompt_path import PROMPT_CONFIG, build_teacher
from ..hub.repo import Source, open_source
from ..hub.student import DISTILLATION
from ..hub.timm_models import ModelSource
from ..tasks.inputs import input_config_of
from ..teacher.prompt_path import match_dtype
from ..training.run_folder import RunFolder

__all__ = ['HELP', 'Classifier', 'open_classifier', 'run_folder_of']

HELP = 'run folder, folder or Hub id (user/name) of a student or a prompt path, or an .onnx file'


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model that is trained, and all that is needed to use it.

    Args:
        name: What it was called.
        role: `'student'`, or `'prompt_path'`.
        class_names: Names of its classes.
        data_config: How images are prepared, as timm's `resolve_data_config` returns it.
        forward: From normalised images `[B, C, H, W]` to logits `[B, K]`.
        module: What computes that, to be moved to a device; `None` for a file of another runtime.
        background: Color behind transparent images, as in training; `None` where transparency is dropped.
    """

    name: str
    role: str
    class_names: list[str]
    data_config: Mapping[str, Any]
    forward: Callable[[torch.Tensor], torch.Tensor]
    module: nn.Module | None = None
    background: str | None = None

    def images(self, split: ImageSplit) -> ImageDataset:
        """Return the images of a split as the model takes them."""
        return ImageDataset(split, self.data_config, None, seed=0, cache=False)

    def to(self, device: torch.device) -> Classifier:
        """Move the model, in place; what another runtime runs stays where it is."""
        if self.module is not None:
            self.module.to(device)
        return self


def run_folder_of(model: str) -> RunFolder | None:
    """Return the folder of a finished run, if that is what was named.

    Raises:
        ValueError: If it is one of a run that is not finished, or of a comparison.
    """
    folder = RunFolder(Path(model).expanduser())
    if folder.summary.is_file() and folder.student.is_dir():
        return folder
    students = sorted(folder.path.glob('arms/*/student')) or sorted(folder.path.glob('seed-*/arms/*/student'))
    if students:
        raise ValueError(
            f'MODEL {model!r} is the folder of a comparison: name one of its students, such as {students[0]}.'
        )
    if folder.config.is_file() and folder.metrics.is_file():
        raise ValueError(
            f'MODEL {model!r} is the folder of a run that is not finished: continue it with --output {model} --resume.'
        )
    return None


def open_classifier(model: str, base_model: str | None = None, **options: Unpack[LoadOptions]) -> Classifier:
    """Open a model by its name.

    Args:
        model: See `HELP`.
        base_model: The teacher of a prompt path, if not the published one that it names: a timm name,
            `hf-hub:user/name` or `local-dir:folder`.
        **options: See `timm_dfpt.hub.LoadOptions`.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        HubError: If it is unavailable, or what was downloaded is damaged.
        ImportError: If an ONNX file is named, and onnxruntime is not installed.
        ValueError: If it is something else, or has no classes.
    """
    path = Path(model).expanduser()
    if path.suffix == '.onnx' or path.is_file():
        if not path.is_file():
            raise FileNotFoundError(f'MODEL {model!r}: there is no such file{similar_path(model, path.suffix)}.')
        if path.suffix != '.onnx':
            raise ValueError(f'MODEL {model!r} is a file other than .onnx: name {HELP}.')
        if options.get('revision') is not None:
            raise ValueError(f'revision is for models on the Hub, and {model!r} is a file: leave --revision out.')
        _refuse_base_model(model, base_model)
        opened = open_onnx(path)
        return Classifier(model, 'student', opened.class_names, opened.data_config, opened.run)
    run = run_folder_of(model)
    place = str(run.student) if run is not None else model
    source = open_source(place, **options)
    if source.has(PROMPT_CONFIG):
        return _open_prompt_path(model, base_model, source)
    _refuse_base_model(model, base_model)
    module: Any = load_student(place, **options)
    if not module.num_classes:
        raise ValueError(f'MODEL {model!r} has no classes, only features: name a classifier.')
    record = read_json(source.get(DISTILLATION)) if source.has(DISTILLATION) else {}

    def forward(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = module(match_dtype(images, module))
        return logits

    names, config = _names(module.pretrained_cfg, module.num_classes), input_config_of(module)
    return Classifier(model, 'student', names, config, forward, module, _background(record))


def _refuse_base_model(model: str, base_model: str | None) -> None:
    if base_model is not None:
        raise ValueError(f'base_model is of a prompt path, and {model!r} is not one: leave --base-model out.')


def _open_prompt_path(model: str, base_model: str | None, source: Source) -> Classifier:
    base = ModelSource(base_model, 'base_model').create_teacher() if base_model else None
    try:
        teacher = build_teacher(source, base)
    except ValueError as error:
        found, remedy, _ = str(error).partition(': pass that model')
        if not remedy:
            raise
        # The remedy is one for programs.
        raise ValueError(f'{found}. Name it with --base-model.') from error
    record = read_json(source.get(PROMPT_CONFIG))

    def forward(images: torch.Tensor) -> torch.Tensor:
        prompt: torch.Tensor = teacher(images).prompt
        return prompt

    names = _names(record, teacher.prompt_path.num_classes)
    config = input_config_of(teacher.model)
    return Classifier(model, 'prompt_path', names, config, forward, teacher, _background(record.get('training') or {}))


def _names(facts: Mapping[str, Any], count: int) -> list[str]:
    names = facts.get('label_names') or ()
    return list(names) if len(names) == count else [f'LABEL_{i}' for i in range(count)]


def _background(record: Mapping[str, Any]) -> str | None:
    recipe = record.get('recipe')
    color = recipe.get('background') if isinstance(recipe, dict) else None
    return color if isinstance(color, str) else None
