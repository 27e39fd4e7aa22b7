"""Which split is for training, validation and test, by their usual names."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

__all__ = ['assign_roles', 'role_of']

_logger = logging.getLogger(__name__)

_ROLES = {
    **dict.fromkeys(('train', 'training', 'trainval', 'trn', 'tr'), 'train'),
    **dict.fromkeys(('validation', 'val', 'valid', 'validate', 'validating', 'dev', 'development'), 'val'),
    **dict.fromkeys(('test', 'tests', 'testing', 'tst'), 'test'),
    # To validate on, or to test on where there is something else to validate on.
    **dict.fromkeys(('eval', 'evaluation'), 'val'),
}
_EVALUATION = ('eval', 'evaluation')
# What names may have besides, as in `Train_Images` and `val2017`.
_FILLERS = ('set', 'split', 'data', 'dataset', 'images', 'image', 'imgs', 'img')
# The name that applies where several are of one role.
_PLAIN = {'train': ('train',), 'val': ('validation', 'val'), 'test': ('test',)}


def _word(name: str) -> str | None:
    words = [word for word in re.split(r'[^a-z]+', name.casefold()) if word and word not in _FILLERS]
    if len(words) != 1:
        return None
    for filler in _FILLERS:
        if words[0].removesuffix(filler) in _ROLES:
            return words[0].removesuffix(filler)
    return words[0]


def role_of(name: str) -> str | None:
    """Return what a split of this name is usually for.

    Args:
        name: Name of a split or its folder, in any spelling: `Training`, `val_set`, `test2017`.

    Returns:
        `'train'`, `'val'` or `'test'`; `None` if the name is not one of a split.
    """
    return _ROLES.get(_word(name) or '')


def assign_roles(available: Sequence[str], named: Mapping[str, str | None], leave: bool = False) -> dict[str, str]:
    """Choose the splits for training, validation and test, and warn of those that are left over.

    Args:
        available: Names of all splits.
        named: For `train`, `val` and `test` the split that the user named, or `None`.
        leave: Whether splits may be left over without a warning.

    Returns:
        Name of the split by role, for the roles that have one; a single split of any name is for training.

    Raises:
        ValueError: If a name is unknown or taken twice, or a choice is not clear.
    """
    for role, name in named.items():
        if name is not None and name not in available:
            raise ValueError(
                f'{role}_split={name!r} is unknown; the dataset has the splits {list(available)}: name one of them '
                f'with --{role}-split.'
            )
    roles = {role: name for role, name in named.items() if name is not None}
    free = [name for name in available if name not in roles.values()]
    by_role: dict[str, list[str]] = {role: [name for name in free if role_of(name) == role] for role in named}
    evaluation = [name for name in by_role['val'] if _word(name) in _EVALUATION]
    if 'val' in roles or len(evaluation) < len(by_role['val']):
        by_role['val'] = [name for name in by_role['val'] if name not in evaluation]
        by_role['test'] = by_role['test'] or evaluation
    for role, names in by_role.items():
        if role in roles or not names:
            continue
        best = [name for name in names if name in _PLAIN[role]] or names
        if len(best) > 1:
            raise ValueError(f'the splits {best} could both be the {role} split: name one with --{role}-split.')
        roles[role] = best[0]
    if 'train' not in roles and len(available) == 1:
        roles = {'train': available[0]}
    if len(set(roles.values())) < len(roles):
        raise ValueError(
            f'train, val and test splits must differ, got {roles}: name others with --train-split, --val-split and '
            '--test-split.'
        )
    unused = [name for name in available if name not in roles.values()]
    if unused and not leave:
        _logger.warning(
            'The splits %s are not used: to use one, name it with --train-split, --val-split or --test-split', unused
        )
    return roles
