"""The fields of a dataclass of options as checked values and as arguments of a command line."""
from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Sequence
from typing import Any

import yaml

__all__ = ['add_argument', 'checked', 'default_of', 'nearest']


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _options(owner: type, name: str) -> tuple[tuple[type, ...], type | None]:
    """Return the types a field may have, and the type of its items if it is a list."""
    hint = _hints(owner)[name]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return tuple(typing.get_args(hint)), None
    if typing.get_origin(hint) is list:
        return (list,), typing.get_args(hint)[0]
    return (typing.get_origin(hint) or hint,), None


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the value that a field has when none is given."""
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def checked(owner: type, field: dataclasses.Field[Any], value: Any) -> Any:
    """Return a value in the type of its field.

    Args:
        owner: The dataclass.
        field: The field; `choices` in its metadata are the values allowed.
        value: The value. The empty string stands for none where there may be none, so that a command line can take
            back what a recipe says.

    Raises:
        ValueError: It is of another type, not finite, or none of the choices.
    """
    allowed, item = _options(owner, field.name)
    if list in allowed and not isinstance(value, list):
        value = list(value) if isinstance(value, tuple) else [value]
    choices = field.metadata.get('choices')
    if item is not None:
        return [_choice(field.name, _number(field.name, v, item), choices) for v in value]
    if value in (None, '') and type(None) in allowed:
        return None
    kind = next(t for t in allowed if t is not type(None))
    return _choice(field.name, _number(field.name, value, kind), choices)


def _choice(name: str, value: Any, choices: Sequence[str] | None) -> Any:
    if choices and value not in choices:
        raise ValueError(f'{name} must be one of {", ".join(choices)}, got {value!r}.{nearest(value, choices)}')
    return value


def _number(name: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f'{name} must be a finite number, got {value!r}.')
        return float(value)
    if kind is float and isinstance(value, str):
        # YAML reads 1e-3 as a string.
        try:
            return _number(name, float(value), float)
        except ValueError:
            pass
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f'{name} must be {kind.__name__}, got {value!r} ({type(value).__name__}).')
    return value


def nearest(name: Any, known: Sequence[str]) -> str:
    """Return a question for the known name that comes closest, to end an error message with, or nothing."""
    close = difflib.get_close_matches(str(name), known, 1)
    return f' Did you mean {close[0]!r}?' if close else ''


def key_value(text: str) -> tuple[str, Any]:
    """Read `key=value` of a command line, the value as YAML does.

    Raises:
        ArgumentTypeError: There is no `=`.
    """
    key, separator, value = text.partition('=')
    if not separator or not key:
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form key=value')
    return key, yaml.safe_load(value)


def add_argument(owner: type, group: Any, field: dataclasses.Field[Any]) -> None:
    """Add the argument of a field to an argument group; what is not given leaves no trace in the result.

    Args:
        owner: The dataclass.
        group: A group of `argparse`.
        field: The field, with `help` and perhaps `choices` in its metadata.
    """
    flag = '--' + field.name.replace('_', '-')
    allowed, item = _options(owner, field.name)
    kind = next(t for t in allowed if t is not type(None))
    default = default_of(field)
    shown = json.dumps(default) if isinstance(default, (list, dict)) else default
    options: dict[str, Any] = {'help': f'{field.metadata["help"]} (default: {shown})', 'default': argparse.SUPPRESS}
    if kind is bool:
        # argparse would read --no-aug as the negation of an option --aug.
        action: Any = 'store_true' if flag.startswith('--no-') else argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, **options)
        return
    if kind is list:
        options |= {'nargs': '*', 'type': item, 'metavar': 'X'}
        if field.metadata.get('choices'):
            options['choices'] = field.metadata['choices']
    elif kind is dict:
        options |= {'nargs': '+', 'type': key_value, 'metavar': 'KEY=VALUE'}
    else:
        options['type'] = kind
        if field.metadata.get('choices'):
            options['choices'] = field.metadata['choices']
        else:
            options['metavar'] = kind.__name__.upper()
    group.add_argument(flag, **options)
