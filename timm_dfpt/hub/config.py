"""`prompt_config.json`: what is stored of a prompt path besides its weights, validated before anything is built."""
import dataclasses
import json
import logging
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import timm
from huggingface_hub.dataclasses import strict

from ..backbone.checks import check_fields, limited
from ..backbone.types import Feature, Stage, is_module_name
from ..teacher.blocks import PromptConfig
from ..teacher.prompt_path import Variant
from ..utils.messages import shorten
from .sources import parse_source

__all__ = [
    'FORMAT_VERSION',
    'Fingerprint',
    'PromptPathRecord',
    'check_arg_names',
    'check_data_config',
    'check_label_names',
    'check_model_args',
]

_logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_FILE = 'prompt_config.json'
_MAX_STAGES = 256
_MAX_CLASSES = 10**6
_MAX_ARGS = 64
_MAX_SIDE = 4096  # of an image, a window, a kernel
_MAX_ARG = 10**6  # a width, a number of classes
# Integers that are bounded, and cost no more than the memory that is compared with the weights.
_WIDE_ARG = re.compile(r'chan|chs|class|dim|feat|head|hidden|plane|temp|theta|width', re.IGNORECASE)
_MAX_VALUES = 1024
_MAX_DEPTH = 16384  # numbers of modules, each of which costs time to build even where it costs no memory
_NAME = re.compile(r'\w+(\.[\w\-]+)*')
_SHA256 = re.compile(r'[0-9a-f]{64}')
_COMMIT = re.compile(r'[0-9a-f]{40}')
_DEPTH_ARG = re.compile(r'depth|layer|block|repeat|stage|group', re.IGNORECASE)
# What makes timm's factory read a file, download, or return something else than a classifier.
_FORBIDDEN_ARG = re.compile(
    r'pretrained.*|checkpoint.*|cache_dir|features_only|feature_cls|feature_cfg|out_indices|scriptable|exportable|no_jit|device|dtype|.*_fn|'
    r'kwargs_filter|model_cfg|model_cls|model_name'
)
_REMEDIES = {
    'pretrained': 'give --student-pretrained (a teacher always has its weights)',
    'checkpoint_path': 'give the weights of a teacher with --teacher-checkpoint, those of a student as '
    '--student local-dir:FOLDER with --student-pretrained',
}
_Record = TypeVar('_Record')


def _is_base_model(value: str | None) -> bool:
    if value is None:
        return True
    if len(value) > 200:
        return False
    try:
        source = parse_source(value)
    except ValueError:
        return False
    if source.revision or str(source) != value:
        # It is written one way, and the revision has a field of its own.
        return False
    known = _NAME.fullmatch(value) is not None and timm.is_model(value.partition('.')[0])
    return source.kind == 'hf-hub' or (source.kind == '' and known)


@strict
@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a base model must be to be the one that a prompt path was tuned on.

    Args:
        dtype: Dtype of its parameters, e.g. `'float32'`.
        parameters: Number of its parameters.
        shapes: sha256 over names, shapes and dtypes of its tensors.
        weights: sha256 over their values.
    """

    dtype: Literal['float64', 'float32', 'float16', 'bfloat16']
    parameters: int = limited('a positive integer', lambda count: 1 <= count <= 10**12)
    shapes: str = limited('a sha256 of 64 hexadecimal digits', lambda digest: _SHA256.fullmatch(digest) is not None)
    weights: str = limited('a sha256 of 64 hexadecimal digits', lambda digest: _SHA256.fullmatch(digest) is not None)

    def __str__(self) -> str:
        weights = f', weights {self.weights[:12]}' if self.weights else ''
        return f'{self.parameters:,} parameters of {self.dtype}, shapes {self.shapes[:12]}{weights}'


@strict
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptPathRecord:
    """All of `prompt_config.json`.

    Args:
        variant: `'dfpt'` or `'dfpt+'`.
        base_model: `'hf-hub:user/name'` or a name that timm has pretrained weights for; `None` where the base can
            only be given by the user.
        base_revision: Commit of the base's repository.
        base_architecture: Name of the base's architecture in timm; `None` for a model that is not timm's.
        base_model_args: Arguments that the architecture is created with.
        base_fingerprint: What the base must be.
        input_size: `(height, width)` that the base was set to; `None` for its own.
        num_classes: Number of classes of the prompt path.
        stages: Behind which modules the blocks stand.
        classifier: Names of the classifier modules.
        prompt: Shape of the blocks.
        label_names: Names of the classes.
        data_config: Preprocessing of the base's input, as timm's `resolve_data_config` returns it.
        fitted_head: What is known of the head that the base has in place of its published one; its tensors are with the
            prompt path's.
        training: Facts about the training, for the reader.
        format_version: Version of this format.
        timm_dfpt_version: Version that wrote it.
        timm_version: timm's version when it was written.
    """

    variant: Variant
    base_model: str | None = limited(
        'null, a timm name such as "resnet50.a1_in1k" or "hf-hub:user/name" (no path and no URL)', _is_base_model
    )
    base_revision: str | None = limited(
        'a commit of 40 hexadecimal digits or null', lambda value: value is None or _COMMIT.fullmatch(value) is not None
    )
    base_architecture: str | None = limited(
        'an architecture that this timm has (a newer timm may have it) or null',
        lambda value: value is None or timm.is_model(value),
    )
    base_model_args: dict[str, Any]
    base_fingerprint: Fingerprint
    num_classes: int = limited(f'1 to {_MAX_CLASSES:,}', lambda count: 1 <= count <= _MAX_CLASSES)
    stages: tuple[Stage, ...] = limited(f'1 to {_MAX_STAGES} stages', lambda found: 0 < len(found) <= _MAX_STAGES)
    classifier: tuple[str, ...] = limited(
        f'1 to {_MAX_STAGES} module names such as "layer1.2"',
        lambda names: 0 < len(names) <= _MAX_STAGES and all(map(is_module_name, names)),
    )
    prompt: PromptConfig
    input_size: tuple[int, int] | None = limited(
        'null or a height and a width from 1 to 4096',
        lambda size: size is None or all(0 < side <= _MAX_SIDE for side in size),
        default=None,
    )
    label_names: list[str] | None = None
    data_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    fitted_head: dict[str, Any] | None = None
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

    def validated(self) -> 'PromptPathRecord':
        """Return what a reader of the file will see, checked as it will be: what cannot be read must not be written.

        Raises:
            ValueError: If a value is not allowed.
        """
        return self.from_dict(json.loads(json.dumps(self.to_dict())))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> 'PromptPathRecord':
        """Validate types and ranges of every value; files of an older format are converted.

        Raises:
            ValueError: If a value is missing or not allowed; the message names it.
        """
        version = data.get('format_version')
        if type(version) is not int or version < 1:
            raise ValueError(f'format_version must be a positive integer, got {shorten(version)}.')
        if version > FORMAT_VERSION:
            raise ValueError(
                f'{_FILE} has format_version {version}, and this timm_dfpt reads up to {FORMAT_VERSION}. '
                'Update it: pip install -U timm_dfpt'
            )
        values = dict(data if version > 1 else _from_version_1(data))
        values['format_version'] = FORMAT_VERSION
        if 'base_fingerprint' in values:
            values['base_fingerprint'] = _read(Fingerprint, values['base_fingerprint'], 'base_fingerprint')
        if isinstance(size := values.get('input_size'), list):
            values['input_size'] = tuple(size)
        if values.pop('train_bn', False) is True and isinstance(values.get('prompt'), Mapping):
            # What versions before the first release called statistics of a copy's own.
            values['prompt'] = {**values['prompt'], 'norms': 'own'}
        if 'prompt' in values:
            values['prompt'] = _read(PromptConfig, values['prompt'], 'prompt')
        stages = values.get('stages')
        # A list that is too long is refused as it is, and not after each of its entries has been read.
        if isinstance(stages, list) and len(stages) <= _MAX_STAGES:
            values['stages'] = [_read_stage(stage, f'stages[{i}]') for i, stage in enumerate(stages)]
        record = _read(cls, values, _FILE)
        check_model_args('base_model_args', record.base_model_args)
        if record.label_names is not None:
            check_label_names(record.label_names, record.num_classes)
        check_data_config(record.data_config)
        return record


def _from_version_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """Give the values of format 1 their names of today, and refuse two ablations, which no longer exist.

    Raises:
        ValueError: If the file is of such an ablation.
    """
    values = {'classifier' if key == 'head' else key: value for key, value in data.items()}
    if not isinstance(data.get('prompt'), Mapping):
        return values
    names = {'reduction': 'rd_ratio', 'head': 'new_head'}
    prompt = {names.get(key, key): value for key, value in data['prompt'].items()}
    norms = {'batch': 'batchnorm2d', 'layer': 'layernorm2d', 'none': None}
    if isinstance(norm := prompt.get('norm_layer'), str):
        prompt['norm_layer'] = norms.get(norm, norm)
    # Which stages are open is said by `stages`.
    prompt.pop('after_last', None)
    if prompt.pop('arrangement', 'parallel') != 'parallel' or prompt.get('fusion') == 'none':
        raise ValueError(
            f"{_FILE}: an arrangement other than 'parallel' and the fusion 'none' were ablations of format 1; this "
            'timm_dfpt cannot build them.'
        )
    return {**values, 'prompt': prompt}


def _read(cls: type[_Record], data: Any, where: str) -> _Record:
    """Build a strict dataclass from JSON and check it. Keys that it lacks are warned about: a newer version wrote them.

    Raises:
        ValueError: If a value is missing or not allowed.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f'{where} must be an object, got {shorten(data)}.')
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(str(key)[:40] for key in data if key not in fields)
    if unknown:
        _logger.warning(f'{where} has unknown keys, which are ignored: {", ".join(unknown[:10])}')
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ValueError(f'{where} lacks {name!r}; it is damaged, or does not belong to a prompt path.')
    record = cls(**{key: value for key, value in data.items() if key in fields})
    check_fields(record, '' if where == _FILE else f'{where}.')
    return record


def _read_stage(data: Any, where: str) -> Stage:
    features = data.get('features') if isinstance(data, Mapping) else None
    if isinstance(features, list):
        data = {**data, 'features': [_read(Feature, feature, f'{where}.features') for feature in features]}
    return _read(Stage, data, where)


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f'{key} must be {allowed}, got {shorten(value)}.')


def _is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def check_model_args(key: str, value: Any) -> None:
    """Check arguments for `timm.create_model` that come from a file.

    Args:
        key: Where they stand, for messages.
        value: The arguments.

    Raises:
        ValueError: If an argument is not a plain value, is absurdly large, or would make timm do something else.
    """
    _require(isinstance(value, dict) and len(value) <= _MAX_ARGS, key, value, f'an object of up to {_MAX_ARGS} values')
    check_arg_names(key, value)
    for name, arg in value.items():
        where = f'{key}.{name}'[:80]
        numbers = _checked_numbers(where, arg, nesting=0)
        sizes = [number for number in numbers if isinstance(number, int)]
        if not _WIDE_ARG.search(name):
            _require(max(map(abs, sizes), default=0) <= _MAX_SIDE, where, arg, f'integers up to {_MAX_SIDE:,}')
        if _DEPTH_ARG.search(name):
            _require(sum(map(abs, numbers)) <= _MAX_DEPTH, where, arg, f'at most {_MAX_DEPTH:,} in all')


def check_arg_names(key: str, args: Mapping[str, Any]) -> None:
    """Check arguments for `timm.create_model` by their names, those that a user gives included.

    Args:
        key: Where they stand, or the option that gives them, for messages.
        args: The arguments.

    Raises:
        ValueError: If one would make timm read a file, download, or return something else than a classifier.
    """
    for name in args:
        if not isinstance(name, str) or not name.isidentifier() or _FORBIDDEN_ARG.fullmatch(name):
            remedy = _REMEDIES.get(name, 'leave it out')
            raise ValueError(
                f'{key}: {shorten(name)[1:-1]} is not an allowed argument of a model: {remedy}.'
            )


def _checked_numbers(where: str, value: Any, nesting: int) -> list[float]:
    """Check that a value is plain, and return the numbers in it."""
    if isinstance(value, (list, tuple, dict)):
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
        ValueError: If they are not a list of `num_classes` non-empty strings.
    """
    _require(isinstance(label_names, (list, tuple)), 'label_names', label_names, 'a list with a name for each class')
    if len(label_names) != num_classes:
        raise ValueError(
            f'label_names has {len(label_names)} names, but the model has {num_classes} classes: give one name per '
            'class.'
        )
    for name in label_names:
        _require(isinstance(name, str) and 0 < len(name) <= 1000, 'label_names', name, 'non-empty strings')


def check_data_config(value: Any) -> None:
    """Check preprocessing that comes from a file.

    Raises:
        ValueError: If a value is of a wrong type or out of its range.
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
