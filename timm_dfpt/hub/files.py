"""Reading and writing the kinds of file that are exchanged: small JSON or YAML, and safetensors. Never a pickle."""
from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

__all__ = [
    'MAX_JSON_BYTES',
    'TensorSpec',
    'atomic',
    'check_finite',
    'check_tensors',
    'parse_yaml',
    'read_json',
    'read_specs',
    'read_tensors',
    'sync',
    'write_json',
    'write_tensors',
    'write_text',
    'writing',
]

_REMEDY = 'Make room or repair the disk, then save again: a run goes on with --resume.'
# A config with the names and descriptions of 22,000 classes has some 2 MB.
MAX_JSON_BYTES = 16 * 2**20
_MAX_TENSORS = 100_000
_MAX_YAML_CHARS = 2**17
_MAX_YAML_VALUES = 10_000
_MAX_LEVELS = 32
_DTYPES = {
    'F64': torch.float64,
    'F32': torch.float32,
    'F16': torch.float16,
    'BF16': torch.bfloat16,
    'I64': torch.int64,
    'I32': torch.int32,
    'I16': torch.int16,
    'I8': torch.int8,
    'U8': torch.uint8,
    'BOOL': torch.bool,
}

TensorSpec = tuple[tuple[int, ...], torch.dtype]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, refusing what is too large, too deep or not finite.

    Raises:
        ValueError: If the file is not such an object.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f'{path.name} has {size:,} bytes, more than the limit of {MAX_JSON_BYTES:,}.')
    try:
        data = json.loads(path.read_text(encoding='utf-8'), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path.name} is not valid JSON: {error}') from error
    if not isinstance(data, dict):
        raise ValueError(f'{path.name} must hold a JSON object, got {type(data).__name__}.')
    level: list[Any] = [data]
    for _ in range(_MAX_LEVELS):
        inner = (value for values in level for value in (values.values() if isinstance(values, dict) else values))
        level = [value for value in inner if isinstance(value, (dict, list))]
    if level:
        raise ValueError(f'{path.name} is nested more than {_MAX_LEVELS} levels deep.')
    return data


class _Loader(yaml.SafeLoader):
    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number: int = super().construct_yaml_int(node)
        if abs(number) >= 2**63:
            raise ValueError('it has an integer of more than 64 bits')
        return number


_Loader.add_constructor('tag:yaml.org,2002:int', _Loader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """Read YAML, refusing what is too large or too deep once its aliases stand for what they name.

    Raises:
        ValueError: If the text is not such YAML.
    """
    if len(text) > _MAX_YAML_CHARS:
        raise ValueError(f'it has {len(text):,} characters, more than the limit of {_MAX_YAML_CHARS:,}')
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        values, levels = _measure(node, {})
        if values > _MAX_YAML_VALUES or levels > _MAX_LEVELS:
            raise ValueError(
                f'it has more than {_MAX_YAML_VALUES:,} values or {_MAX_LEVELS} levels, counting what aliases stand for'
            )
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError('it is nested too deep') from error
    except yaml.YAMLError as error:
        raise ValueError(' '.join(str(error).split())) from error
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return how many values a node stands for, and how many levels they have; each alias counts as what it names."""
    key = id(node)
    if key not in known:
        known[key] = None
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
        inner = [_measure(child, known) for child in children]
        known[key] = (1 + sum(count for count, _ in inner), 1 + max((levels for _, levels in inner), default=0))
    found = known[key]
    if found is None:
        raise ValueError('it has an alias that stands for a value around it')
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f'{name} is not allowed')


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` as JSON, completely or not at all.

    Raises:
        OSError: If it cannot be written, because the disk is full for example.
        ValueError: If a number in it is not finite.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + '\n'
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, completely or not at all.

    Raises:
        OSError: If it cannot be written; the message names the file and the remedy.
    """
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, completely or not at all.

    Tensors that share memory or are in another memory format are written as plain copies.

    Raises:
        OSError: If they cannot be written, because the disk is full for example.
        ValueError: If a value is not finite.
    """
    plain = {name: _plain_copy(tensor) for name, tensor in tensors.items()}
    check_finite(path.name, plain)
    with atomic(path) as temporary:
        # transformers refuses a file that does not say for which framework it is.
        save_file(plain, temporary, metadata={'format': 'pt', **(metadata or {})})


def _plain_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to('cpu', copy=True, memory_format=torch.contiguous_format)


@contextlib.contextmanager
def atomic(path: Path, remedy: str = _REMEDY) -> Iterator[Path]:
    """Yield a temporary path to write to, which takes the place of `path` at the end, or is removed after an error.

    A reader, or a crash of the process or the machine, sees the old content or the new, never a part.

    Args:
        path: The file; its folder exists.
        remedy: What to do about a full disk, for the message.

    Raises:
        OSError: If the file cannot be written; the message names it and the remedy.
    """
    # Several processes may write the same file, each aside of the others.
    temporary = path.with_name(f'{path.name}.{os.getpid()}.incomplete')
    try:
        with writing(path, remedy):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Let an error of a full or broken disk say what was being written and what to do about it.

    Raises:
        OSError: If what is done in the context cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f'{str(path)!r} cannot be written: {error}. {remedy}') from error


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if os.name == 'nt' and path.is_dir():
        # Windows opens no folders.
        return
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_specs(path: Path) -> dict[str, TensorSpec]:
    """Read names, shapes and dtypes from the header of a safetensors file, and no tensor.

    Raises:
        ValueError: If it is not a safetensors file (a pickle with that name included).
    """
    try:
        with safe_open(path, framework='pt') as file:
            names = file.keys()
            if len(names) > _MAX_TENSORS:
                raise ValueError(f'{path.name} holds {len(names):,} tensors, more than {_MAX_TENSORS:,}.')
            specs = {}
            for name in names:
                tensor = file.get_slice(name)
                specs[name] = (tuple(tensor.get_shape()), _dtype_of(path, name, tensor.get_dtype()))
            return specs
    except SafetensorError as error:
        raise ValueError(
            f'{path.name} is not a safetensors file, or it is incomplete ({error}); no other format is read.'
        ) from error


def _dtype_of(path: Path, name: str, code: str) -> torch.dtype:
    if code not in _DTYPES:
        raise ValueError(f'{path.name}: tensor {name!r} has dtype {code}, which timm models do not use.')
    return _DTYPES[code]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file onto the CPU.

    Raises:
        ValueError: If it is not a safetensors file, or a value is not finite.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f'{path.name} is not a safetensors file, or it is incomplete ({error}).') from error
    check_finite(path.name, tensors)
    return tensors


def check_finite(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors of a file with values that are not finite.

    Args:
        name: The file, for messages.
        tensors: The tensors.

    Raises:
        ValueError: If one of them has such a value.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f'{name}: tensor {key!r} holds values that are not finite (NaN or infinity). Such weights are neither '
                'saved nor loaded: take a checkpoint from before training diverged.'
            )


def check_tensors(name: str, found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]) -> None:
    """Compare names, shapes and dtypes of a file's tensors with those of a model.

    Args:
        name: The file, for messages.
        found: What the file holds.
        expected: What the model has.

    Raises:
        ValueError: If they differ in anything; the message says in what.
    """
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise ValueError(
            f'{name} does not match its config: {_some("missing", missing)}{_some("unexpected", extra)}of '
            f'{len(expected)} tensors. The files do not belong to the same model.'
        )
    for key, spec in expected.items():
        if found[key] != spec:
            raise ValueError(
                f'{name}: tensor {key!r} has shape {list(found[key][0])} and dtype {found[key][1]}, but its config '
                f'asks for {list(spec[0])} and {spec[1]}. The files do not belong to the same model.'
            )


def _some(kind: str, names: list[str]) -> str:
    shown = ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
    return f'{len(names)} {kind} ({shown}) ' if names else ''
