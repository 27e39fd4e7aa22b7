"""One way to check dataclasses that are read from files: types from the annotations, ranges next to the fields.

Use with `huggingface_hub.dataclasses.strict`, which takes the types from the annotations; so no module with such a
class may have `from __future__ import annotations`, which turns them into strings.
"""
import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import validated_field

from ..utils.messages import shorten

__all__ = ['check_fields', 'limited']


def limited(allowed: str, fits: Callable[[Any], bool] = lambda value: True, **options: Any) -> Any:
    """Return a field of a strict dataclass with a range.

    Args:
        allowed: The range in words, to end "... must be".
        fits: Whether a value of the right type is in the range.
        **options: Further arguments of `dataclasses.field`, such as `default`.
    """

    def check(value: Any) -> None:
        if not fits(value):
            raise ValueError(allowed)

    return validated_field(check, metadata={'allowed': allowed}, **options)


def check_fields(record: Any, where: str = '') -> None:
    """Check types and ranges of a strict dataclass; lists become tuples where the type asks for a tuple.

    Called explicitly, because `strict` checks by `__setattr__`, which a frozen dataclass does not call.

    Args:
        record: The dataclass.
        where: What to put before the name of a field in the message, such as `'PromptConfig.'`.

    Raises:
        ValueError: If a value is of another type or out of its range; one line with key, value and what is allowed.
    """
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, list) and typing.get_origin(field.type) is tuple:
            value = tuple(value)
            object.__setattr__(record, field.name, value)
        try:
            for validator in record.__validators__[field.name]:
                validator(value)
        except (TypeError, ValueError):
            raise ValueError(f'{where}{field.name} must be {_allowed(field)}, got {shorten(value)}.') from None


def _allowed(field: dataclasses.Field[Any]) -> str:
    if 'allowed' in field.metadata:
        return str(field.metadata['allowed'])
    if typing.get_origin(field.type) is typing.Literal:
        return f'one of {typing.get_args(field.type)}'
    return 'True or False' if field.type is bool else f'of type {getattr(field.type, "__name__", field.type)}'
