"""From what was noted of each run to a table: medians with quartiles, and ratios within a round."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..spread import spread

__all__ = ['figures', 'table']

_COLUMNS = {
    'all': 'CPU s in all',
    'start': 'CPU s to the end of the first step',
    'evaluation': "CPU s of the teacher's evaluation",
    'step': 'CPU ms a step',
    'end': 'CPU s after the last step',
    'mib': 'peak MiB',
    'mib_first': 'peak MiB at the first step',
    'wall': 'wall s',
    'wall_first': 'wall s to the first step',
}
_DIGITS = {'step': 1, 'mib': 0, 'mib_first': 0, 'wall': 1, 'wall_first': 1}


def figures(run: Mapping[str, Any]) -> dict[str, float]:
    """Return the columns of the table for one run.

    Args:
        run: `cpu` (s), `mib` and `wall` (s) of the whole process; `first` and `last` with `cpu`, `clock` and `mib` at
            the end of those steps; `steps`; CPU seconds `apart` that are the benchmark's own and `evaluation`; `began`
            by the clock.
    """
    first, last = run['first'], run['last']
    return {
        'all': run['cpu'] - run['apart'],
        'start': first['cpu'] - run['apart'] - run['evaluation'],
        'evaluation': run['evaluation'],
        'step': 1000 * (last['cpu'] - first['cpu']) / max(1, run['steps'] - 1),
        'end': run['cpu'] - last['cpu'],
        'mib': run['mib'],
        'mib_first': first['mib'],
        'wall': run['wall'],
        'wall_first': first['clock'] - run['began'],
    }


def table(rounds: Sequence[Mapping[str, Mapping[str, Any]]], base: str) -> str:
    """Return the tables in Markdown.

    Args:
        rounds: For each round the runs by participant.
        base: The participant that the others are compared with, within a round; not compared where it did not run.
    """
    values = [{who: figures(run) for who, run in turn.items()} for turn in rounds]
    names = list(values[0])
    lines = ['| | ' + ' | '.join(_COLUMNS.values()) + ' |', '|---|' + '---:|' * len(_COLUMNS)]
    for who in names:
        cells = [_shown([turn[who][key] for turn in values], _DIGITS.get(key, 2)) for key in _COLUMNS]
        lines.append(f'| {who} | {" | ".join(cells)} |')
    if base in names and len(names) > 1:
        keys = [key for key in _COLUMNS if key != 'evaluation']
        heads = [f'{_COLUMNS[key]}{", more than" if key == "end" else " /"} {base}' for key in keys]
        lines += ['', '| | ' + ' | '.join(heads) + ' |', '|---|' + '---:|' * len(keys)]
        for who in names:
            pairs = {key: [(turn[who][key], turn[base][key]) for turn in values] for key in keys}
            # The end takes next to nothing in one of them: a ratio of it says nothing.
            compared = {key: [a - b if key == 'end' else a / b for a, b in pairs[key]] for key in keys}
            if who != base:
                lines.append(f'| {who} | {" | ".join(_shown(compared[key], 2) for key in keys)} |')
    return '\n'.join(lines) + '\n'


def _shown(values: Sequence[float], digits: int) -> str:
    middle, low, high = (f'{value:.{digits}f}' for value in spread(values))
    return middle if low == middle == high else f'{middle} ({low}-{high})'
