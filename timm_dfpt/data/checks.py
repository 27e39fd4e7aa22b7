"""Options as fields of a dataclass: their types, choices and ranges, and whether a value is one of them."""
from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import operator
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ..utils.messages import shorten

__all__ = ['Kind', 'checked', 'default_of', 'kind_of', 'nearest', 'range_of']

# Keys of a field's metadata: how a number is held against the limit, in words, and as a sign.
_LIMITS: Mapping[str, tuple[Callable[[float, float], bool], str, str]] = {
    'low': (operator.ge, 'at least', '>='),
    'above': (operator.gt, 'greater than', '>'),
    'high': (operator.le, 'at most', '<='),
    'below': (operator.lt, 'less than', '<'),
}


_YAML_WORDS = {True: ('on', 'yes'), False: ('off', 'no')}


class Kind(NamedTuple):
    """What a field may hold: an `item` or a `container` of them, one of the choices if any, `None` if optional."""

    container: type
    item: type
    choices: tuple[str, ...]
    optional: bool


_type_hints = functools.cache(typing.get_type_hints)


def kind_of(owner: type, name: str) -> Kind:
    """Return what a field may hold, from its annotation, and its `choices` where a `Literal` cannot name them.

    Args:
        owner: The dataclass.
        name: Name of the field.
    """
    hint = _type_hints(owner)[name]
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    hint = next(each for each in (typing.get_args(hint) if union else [hint]) if each is not types.NoneType)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return Kind(str, str, args, union)
    fields: Mapping[str, dataclasses.Field[Any]] = owner.__dataclass_fields__  # type: ignore[attr-defined]
    item = args[0] if origin is list else origin or hint
    return Kind(origin or hint, item, tuple(fields[name].metadata.get('choices', ())), union)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the value that a field has when none is given."""
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def range_of(field: dataclasses.Field[Any]) -> str:
    """Return the range of a field in signs, such as `>= 0, < 1`; empty if it has none."""
    limits = (f'{sign} {field.metadata[key]}' for key, (_, _, sign) in _LIMITS.items() if key in field.metadata)
    return ', '.join(limits)


def nearest(name: Any, known: Sequence[str]) -> str:
    """Return a question for the known name that comes closest, to end an error message with, or nothing."""
    close = difflib.get_close_matches(str(name), known, 1)
    return f' Did you mean {close[0]!r}?' if close else ''


def checked(owner: type, field: dataclasses.Field[Any], value: Any) -> Any:
    """Return a value in the type of its field.

    Args:
        owner: The dataclass.
        field: The field. Its metadata may have `choices`, and of numbers the limits `low` and `high`, which they may
            reach, and `above` and `below`, which they may not.
        value: The value. An empty string stands for `None` where that is allowed, so that a command line can take back
            what a recipe says.

    Raises:
        ValueError: If it is of another type, out of range, not finite, or none of the choices.
    """
    kind = kind_of(owner, field.name)
    if kind.container is list:
        return [_checked_item(field, kind, each) for each in (value if isinstance(value, (list, tuple)) else [value])]
    return None if kind.optional and value in (None, '') else _checked_item(field, kind, value)


def _checked_item(field: dataclasses.Field[Any], kind: Kind, value: Any) -> Any:
    name = field.name
    if isinstance(value, bool) and kind.choices:
        # YAML reads the words on, off, yes and no as booleans.
        value = next((word for word in _YAML_WORDS[value] if word in kind.choices), value)
    elif isinstance(value, int) and not isinstance(value, bool) and kind.item in (float, str):
        # A float that is too large for one is infinite.
        value = math.inf if kind.item is float and abs(value) > sys.float_info.max else kind.item(value)
    elif isinstance(value, str) and kind.item is float:
        # YAML reads 1e-3 as a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    fits = isinstance(value, kind.item) and not (kind.item is int and isinstance(value, bool))
    if not fits:
        raise ValueError(f'{name} must be {kind.item.__name__}, got {shorten(value)} ({type(value).__name__}).')
    if kind.choices and value not in kind.choices:
        hint = nearest(value, kind.choices)
        raise ValueError(f'{name} must be one of {", ".join(kind.choices)}, got {shorten(value)}.{hint}')
    if kind.item is float and not math.isfinite(value):
        raise ValueError(f'{name} must be a finite number, got {shorten(value)}.')
    for key, number in value.items() if kind.item is dict else ():
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f'{name}: {key} must be a finite number, got {shorten(number)}.')
    limits = {key: field.metadata[key] for key in _LIMITS if key in field.metadata}
    if not all(_LIMITS[key][0](value, limit) for key, limit in limits.items()):
        allowed = ' and '.join(f'{_LIMITS[key][1]} {limit}' for key, limit in limits.items())
        raise ValueError(f'{name} must be {allowed}, got {shorten(value)}.')
    return value
