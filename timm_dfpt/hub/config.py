"""`prompt_config.json`: what is stored of a prompt path besides its weights, validated before anything is built."""
from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import timm
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..backbone.types import Feature, Stage
from ..teacher.blocks import PromptConfig
from ..teacher.teacher import VARIANTS

__all__ = [
    'FORMAT_VERSION',
    'Fingerprint',
    'PromptPathConfig',
    'check_data_config',
    'check_label_names',
    'check_model_args',
]

_logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_MAX_STAGES = 256
_MAX_CHANNELS = 2**17
_MAX_CLASSES = 10**6
_MAX_ARGS = 64
_MAX_SIDE = 4096
_MAX_ARG = 10**6  # an image side, a width, a number of classes
_MAX_VALUES = 1024
_MAX_DEPTH = 16384  # numbers of modules, each of which costs time to build even where it costs no memory
_MODULE = re.compile(r'\w+(\.\w+)*')
_NAME = re.compile(r'\w+(\.[\w\-]+)*')
_SHA256 = re.compile(r'[0-9a-f]{64}')
_COMMIT = re.compile(r'[0-9a-f]{40}')
_LAYOUTS = ('NCHW', 'NHWC', 'NLC')
_DTYPES = ('float64', 'float32', 'float16', 'bfloat16')
_DEPTH_ARG = re.compile(r'depth|layer|block|repeat|stage|group', re.IGNORECASE)
# What makes timm's factory read a file, download, or return something else than a classifier.
_FORBIDDEN_ARG = re.compile(
    r'pretrained.*|checkpoint.*|cache_dir|features_only|scriptable|exportable|no_jit|device|dtype|.*_fn'
)


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a base model must be to be the one that a prompt path was tuned on.

    Args:
        dtype: Dtype of its parameters, e.g. `'float32'`.
        parameters: Number of its parameters.
        shapes: sha256 over names, shapes and dtypes of its tensors.
        weights: sha256 over their values.
    """

    dtype: str
    parameters: int
    shapes: str
    weights: str

    def __str__(self) -> str:
        weights = f', weights {self.weights[:12]}' if self.weights else ''
        return f'{self.parameters:,} parameters of {self.dtype}, shapes {self.shapes[:12]}{weights}'


@dataclasses.dataclass(frozen=True)
class PromptPathConfig:
    """All of `prompt_config.json`.

    Args:
        variant: `'dfpt'` or `'dfpt+'`.
        base_model: `'hf-hub:user/name'` or a name that timm has pretrained weights for; `None` where the base can
            only be given by the user.
        base_revision: Commit of the base's repository.
        base_architecture: Name of the base's architecture in timm; `None` for a model that is not timm's.
        base_model_args: Arguments that the architecture is created with.
        base_fingerprint: What the base must be.
        num_classes: Number of classes of the prompt path.
        stages: Behind which modules the blocks stand.
        head: Names of the classifier modules.
        prompt: Shape of the blocks.
        label_names: Names of the classes.
        data_config: Preprocessing of the base's input, as timm's `resolve_data_config` returns it.
        train_bn: See `timm_dfpt.wrap`.
        training: Facts about the training, for the reader.
        format_version: Version of this format.
        timm_dfpt_version: Version that wrote it.
        timm_version: timm's version when it was written.
    """

    variant: str
    base_model: str | None
    base_revision: str | None
    base_architecture: str | None
    base_model_args: dict[str, Any]
    base_fingerprint: Fingerprint
    num_classes: int
    stages: tuple[Stage, ...]
    head: tuple[str, ...]
    prompt: PromptConfig
    label_names: list[str] | None = None
    data_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    train_bn: bool = False
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    timm_dfpt_version: str = ''
    timm_version: str = ''

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, in the order in which they are read best."""
        first = ('format_version', 'timm_dfpt_version', 'timm_version')
        data = dataclasses.asdict(self)
        data['prompt'] = self.prompt.to_dict()
        return {key: data[key] for key in first} | {key: data[key] for key in data if key not in first}

    def validated(self) -> PromptPathConfig:
        """Return what a reader of the file will see, checked as it will be: what cannot be read must not be written.

        Raises:
            ValueError: A value is not allowed.
        """
        return self.from_dict(json.loads(json.dumps(self.to_dict())))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PromptPathConfig:
        """Validate types and ranges of every value.

        Raises:
            ValueError: A value is missing or not allowed; the message names it.
        """
        version: Any = data.get('format_version')
        _require(type(version) is int and version >= 1, 'format_version', version, 'a positive integer')
        if version > FORMAT_VERSION:
            raise ValueError(
                f'prompt_config.json has format_version {version}, and this timm_dfpt reads up to {FORMAT_VERSION}. '
                'Update it: pip install -U timm_dfpt'
            )
        data = _known(data, cls, 'prompt_config.json')
        optional = {field.name for field in dataclasses.fields(cls) if _has_default(field)}
        for field in dataclasses.fields(cls):
            if field.name not in data and field.name not in optional:
                raise ValueError(f'prompt_config.json lacks {field.name!r}; it is damaged or not of a prompt path.')
        data['base_fingerprint'] = _parse_fingerprint(data['base_fingerprint'])
        data['stages'] = _parse_stages(data['stages'])
        data['prompt'] = _parse_prompt(data['prompt'])
        data['head'] = _parse_modules('head', data['head'])
        config = cls(**data)
        config._check()
        return config

    def _check(self) -> None:
        _require(self.variant in VARIANTS, 'variant', self.variant, f'one of {VARIANTS}')
        _require(_is_int(self.num_classes, 1, _MAX_CLASSES), 'num_classes', self.num_classes, f'1 to {_MAX_CLASSES:,}')
        _require(isinstance(self.train_bn, bool), 'train_bn', self.train_bn, 'true or false')
        _require(isinstance(self.training, dict), 'training', self.training, 'an object')
        revision = self.base_revision
        _require(
            revision is None or (isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None),
            'base_revision',
            revision,
            'a commit of 40 hexadecimal digits or null',
        )
        architecture = self.base_architecture
        _require(
            architecture is None or (isinstance(architecture, str) and timm.is_model(architecture)),
            'base_architecture',
            architecture,
            'an architecture that this timm has (a newer timm may have it) or null',
        )
        _check_base_model(self.base_model)
        check_model_args('base_model_args', self.base_model_args)
        if self.label_names is not None:
            check_label_names(self.label_names, self.num_classes)
        check_data_config(self.data_config)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f'{shown[:80]}...'
        raise ValueError(f'{key} must be {allowed}, got {shown}.')


def _is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _known(data: Any, cls: type, where: str) -> dict[str, Any]:
    """Keep the keys that the dataclass has, and warn about the others: a newer version may have written them."""
    _require(isinstance(data, Mapping), where, data, 'an object')
    names = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(str(key)[:40] for key in data if key not in names)
    if unknown:
        _logger.warning(f'{where} has keys that this version does not know and ignores: {", ".join(unknown[:10])}')
    return {key: value for key, value in data.items() if key in names}


def _parse_fingerprint(value: Any) -> Fingerprint:
    data = _known(value, Fingerprint, 'base_fingerprint')
    for key in ('shapes', 'weights'):
        digest = data.get(key)
        good = isinstance(digest, str) and _SHA256.fullmatch(digest) is not None
        _require(good, f'base_fingerprint.{key}', digest, 'a sha256 of 64 hexadecimal digits')
    count, dtype = data.get('parameters'), data.get('dtype')
    _require(_is_int(count, 1, 10**12), 'base_fingerprint.parameters', count, 'a positive integer')
    _require(dtype in _DTYPES, 'base_fingerprint.dtype', dtype, f'one of {_DTYPES}')
    return Fingerprint(**data)


def _parse_prompt(value: Any) -> PromptConfig:
    data = _known(value, PromptConfig, 'prompt')
    try:
        return PromptConfig(**data)
    except (TypeError, ValueError) as error:
        raise ValueError(f'prompt_config.json: {error}') from error


def _parse_modules(key: str, value: Any) -> tuple[str, ...]:
    _require(isinstance(value, list) and 0 < len(value) <= _MAX_STAGES, key, value, f'1 to {_MAX_STAGES} module names')
    for name in value:
        _require(
            isinstance(name, str) and len(name) <= 200 and _MODULE.fullmatch(name) is not None,
            key,
            name,
            'a module name such as "layer1.2"',
        )
    return tuple(value)


def _parse_stages(value: Any) -> tuple[Stage, ...]:
    _require(isinstance(value, list) and 0 < len(value) <= _MAX_STAGES, 'stages', value, f'1 to {_MAX_STAGES} stages')
    stages = []
    for i, entry in enumerate(value):
        data = _known(entry, Stage, f'stages[{i}]')
        (module,) = _parse_modules(f'stages[{i}].module', [data.get('module')])
        reduction: Any = data.get('reduction')
        features: Any = data.get('features')
        _require(_is_int(reduction, 1, 4096), f'stages[{i}].reduction', reduction, '1 to 4096')
        good = isinstance(features, list) and 0 < len(features) <= 16
        _require(good, f'stages[{i}].features', features, '1 to 16 features')
        stages.append(Stage(module, reduction, tuple(_parse_feature(f'stages[{i}]', entry) for entry in features)))
    return tuple(stages)


def _parse_feature(where: str, value: Any) -> Feature:
    data = _known(value, Feature, f'{where}.features')
    limits = {'index': (0, 63), 'channels': (1, _MAX_CHANNELS), 'prefix_tokens': (0, 4096)}
    for key, (low, high) in limits.items():
        _require(_is_int(data.get(key), low, high), f'{where}.features.{key}', data.get(key), f'{low} to {high}')
    layout = data.get('layout')
    _require(layout in _LAYOUTS, f'{where}.features.layout', layout, f'one of {_LAYOUTS}')
    return Feature(**data)


def _check_base_model(value: Any) -> None:
    allowed = 'null, a timm name such as "resnet50.a1_in1k" or "hf-hub:user/name" (no path and no URL)'
    _require(value is None or (isinstance(value, str) and len(value) <= 200), 'base_model', value, allowed)
    if value is None:
        return
    if not value.startswith('hf-hub:'):
        known = _NAME.fullmatch(value) is not None and timm.is_model(value.partition('.')[0])
        _require(known, 'base_model', value, allowed)
        return
    try:
        validate_repo_id(value.removeprefix('hf-hub:'))
    except HFValidationError as error:
        raise ValueError(f'base_model must be {allowed}, got {value!r}.') from error


def check_model_args(key: str, value: Any) -> None:
    """Check arguments for `timm.create_model` that come from a file.

    Args:
        key: Where they stand, for messages.
        value: The arguments.

    Raises:
        ValueError: An argument is not a plain value, is absurdly large, or would make timm do something else.
    """
    _require(isinstance(value, dict) and len(value) <= _MAX_ARGS, key, value, f'an object of up to {_MAX_ARGS} values')
    for name, arg in value.items():
        where = f'{key}.{name}'[:80]
        if not name.isidentifier() or _FORBIDDEN_ARG.fullmatch(name):
            raise ValueError(f'{where} is not an argument that a model may be created with from a file.')
        numbers = _checked_numbers(where, arg, nesting=0)
        if _DEPTH_ARG.search(name):
            _require(sum(map(abs, numbers)) <= _MAX_DEPTH, where, arg, f'at most {_MAX_DEPTH:,} in all')


def _checked_numbers(where: str, value: Any, nesting: int) -> list[float]:
    """Check that a value is plain, and return the numbers in it."""
    if isinstance(value, (list, dict)):
        _require(len(value) <= _MAX_VALUES and nesting < 4, where, value, f'up to {_MAX_VALUES} values')
        items = value.values() if isinstance(value, dict) else value
        return [number for item in items for number in _checked_numbers(where, item, nesting + 1)]
    if isinstance(value, str):
        _require(len(value) <= 200, where, value, 'a short string')
    elif value is not None and not isinstance(value, bool):
        _require(_is_number(value, -_MAX_ARG, _MAX_ARG), where, value, f'a number up to {_MAX_ARG:,}')
        return [value]
    return []


def check_label_names(label_names: Any, num_classes: int) -> None:
    """Check the names of the classes.

    Raises:
        ValueError: They are not a list of `num_classes` non-empty strings.
    """
    _require(isinstance(label_names, (list, tuple)), 'label_names', label_names, 'a list with a name for each class')
    if len(label_names) != num_classes:
        raise ValueError(f'label_names has {len(label_names)} names, but the model has {num_classes} classes.')
    for name in label_names:
        _require(isinstance(name, str) and 0 < len(name) <= 1000, 'label_names', name, 'non-empty strings')


def check_data_config(value: Any) -> None:
    """Check preprocessing that comes from a file.

    Raises:
        ValueError: A value is of a wrong type or out of its range.
    """
    _require(isinstance(value, dict), 'data_config', value, 'an object')
    size = value.get('input_size')
    good = isinstance(size, list) and len(size) == 3 and all(_is_int(n, 1, _MAX_SIDE) for n in size)
    _require(size is None or good, 'data_config.input_size', size, 'three integers (C, H, W) from 1 to 4096')
    for key, low in (('mean', -1e3), ('std', 1e-6)):
        numbers = value.get(key)
        good = isinstance(numbers, list) and 0 < len(numbers) <= 1024 and all(_is_number(n, low, 1e3) for n in numbers)
        _require(numbers is None or good, f'data_config.{key}', numbers, f'a list of numbers from {low} to 1000')
    crop = value.get('crop_pct')
    _require(crop is None or _is_number(crop, 0.01, 4), 'data_config.crop_pct', crop, 'a number from 0.01 to 4')
    for key in ('interpolation', 'crop_mode'):
        name = value.get(key)
        good = isinstance(name, str) and len(name) <= 40
        _require(name is None or good, f'data_config.{key}', name, 'a short name')
