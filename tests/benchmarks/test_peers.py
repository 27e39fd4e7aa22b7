from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.table import figures, table

ROOT = Path(__file__).parents[2]


def a_run(scale: float) -> dict[str, Any]:
    """A run of 5 steps of 0.5 s (times `scale`), 2 s to the first one, of which 0.25 s are apart and 0.5 evaluation."""
    first = {'cpu': 2 * scale, 'clock': 1000 + 3 * scale, 'mib': 600.0 * scale}
    last = {'cpu': 4 * scale, 'clock': 1000 + 6 * scale, 'mib': 700.0 * scale}
    return {
        'cpu': 5 * scale, 'mib': 800.0 * scale, 'wall': 8 * scale, 'began': 1000.0, 'first': first, 'last': last,
        'steps': 5, 'apart': 0.25 * scale, 'evaluation': 0.5 * scale,
    }  # fmt: skip


def test_columns_of_a_run() -> None:
    assert figures(a_run(1)) == {
        'all': 4.75, 'start': 1.25, 'evaluation': 0.5, 'step': 500, 'end': 1, 'mib': 800, 'mib_first': 600, 'wall': 8,
        'wall_first': 3,
    }  # fmt: skip


def test_ratios_are_of_pairs_in_a_round_and_the_end_is_a_difference() -> None:
    # The machine is four times slower in one round: medians of each are far apart, ratios are not.
    slowness, factors = [1.0, 4.0, 1.0, 2.0, 1.0], [1.5, 1.25, 2.0, 1.0, 1.5]
    rounds = [{'own': a_run(a * b), 'timm': a_run(a)} for a, b in zip(slowness, factors, strict=True)]
    lines = [line.split(' | ') for line in table(rounds, 'timm').splitlines()]
    own, timm, compared = lines[2], lines[3], lines[-1]
    low, middle, high = statistics.quantiles([4.75 * a * b for a, b in zip(slowness, factors, strict=True)], n=4,
                                             method='inclusive')  # fmt: skip
    assert own[:2] == ['| own', f'{middle:.2f} ({low:.2f}-{high:.2f})']
    assert timm[1] == '4.75 (4.75-9.50)'
    low, middle, high = statistics.quantiles(factors, n=4, method='inclusive')
    assert compared[:4] == ['| own', *3 * [f'{middle:.2f} ({low:.2f}-{high:.2f})']]
    differences = [a * b - a for a, b in zip(slowness, factors, strict=True)]
    low, middle, high = statistics.quantiles(differences, n=4, method='inclusive')
    assert compared[4] == f'{middle:.2f} ({low:.2f}-{high:.2f})'


def test_one_participant_is_not_compared() -> None:
    assert len(table([{'own': a_run(1)}], 'timm').splitlines()) == 3


@pytest.mark.slow
def test_this_project_alone(tmp_path: Path) -> None:
    argv = [sys.executable, '-m', 'benchmarks.peers', '--job', 'tiny', '--rounds', '1', '--out', str(tmp_path / 'out')]
    printed = ''
    for more in ([], ['--more']):
        done = subprocess.run([*argv, *more], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    assert 'timm is left out' in printed
    assert 'torchdistill is left out' in printed
    rounds = json.loads((tmp_path / 'out.json').read_text())['rounds']
    assert len(rounds) == 2
    assert rounds[0]['this project']['steps'] == 3
    for turn in rounds:
        shown = figures(turn['this project'])
        assert all(value > 0 for value in shown.values())
        parts = shown['start'] + shown['evaluation'] + 2 * shown['step'] / 1000 + shown['end']
        assert shown['all'] == pytest.approx(parts)
        assert shown['mib'] >= shown['mib_first']
    assert table(rounds, 'timm') in (tmp_path / 'out.md').read_text()
