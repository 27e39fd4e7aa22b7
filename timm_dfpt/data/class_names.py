"""Names of classes: which are numbers rather than names, and which class of one list is which of another."""
from __future__ import annotations

import unicodedata
from collections.abc import Sequence

__all__ = ['are_numbers', 'match_classes']


def are_numbers(names: Sequence[str]) -> bool:
    """Say whether classes have no names of their own.

    Numbers are what integer labels are called, here and in a student that was trained on them, and what `save_student`
    writes where it is given none.
    """
    return all(name.removeprefix('LABEL_').removeprefix('-').isdecimal() for name in names)


def match_classes(names: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Find classes among others, by name; where one side has numbers only, by number.

    Args:
        names: Names of the classes.
        known: Names of the others.

    Returns:
        For each class its number among the others; `None` if one is not there.
    """
    names, known = ([unicodedata.normalize('NFC', name) for name in each] for each in (names, known))
    if are_numbers(names) != are_numbers(known) and len(names) == len(known):
        return list(range(len(names)))
    if are_numbers(names) and are_numbers(known):
        names, known = ([name.removeprefix('LABEL_') for name in each] for each in (names, known))
    numbers = {name: number for number, name in enumerate(known)}
    return [numbers[name] for name in names] if all(name in numbers for name in names) else None
