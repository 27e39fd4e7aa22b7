"""The benchmark for a GPU, with tiny networks on the CPU: what is measured, named, kept and not lost."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import data
from benchmarks.gpu.__main__ import Budget, main, rows_of
from benchmarks.gpu.report import report
from benchmarks.gpu.steps import ARMS, PAIRS, Row, measure

ROOT = Path(__file__).parents[2]
PAIR = 'resnet50 -> resnet18'


def run(out: Path, *more: str) -> list[dict[str, Any]]:
    main(['--device', 'cpu', '--tiny', '--out', str(out), *more])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_arm_of_every_pair_is_measured_at_both_batch_sizes() -> None:
    rows = {part: rows_of(part) for part in (1, 2, 3)}
    for part, batch in ((1, 64), (3, 256)):
        eager = {(row.pair, row.arm) for row in rows[part] if not row.channels_last}
        assert eager == {(pair, arm) for pair in PAIRS for arm in ARMS}
        assert {(row.batch, row.mode, row.precision) for row in rows[part]} == {(batch, 'eager', 'bf16')}
    for mode, precision in (('default', 'bf16'), ('eager', 'tf32')):
        wanted = {(pair, arm) for pair in (PAIR, 'vit_base -> vit_tiny') for arm in ARMS}
        assert {(r.pair, r.arm) for r in rows[2] if (r.mode, r.precision) == (mode, precision)} == wanted
    assert {row.arm for row in rows[2] if row.mode == 'reduce-overhead'} == set(ARMS)
    assert all(len(each) == len(set(each)) for each in rows.values())


def test_rows_that_do_not_fit_into_the_budget_are_skipped_and_named(tmp_path: Path) -> None:
    for part in (1, 2, 3, 4):
        machine, ceilings, *rows = run(tmp_path / f'{part}.jsonl', '--part', str(part), '--budget-seconds', '0')
        assert [machine['kind'], ceilings['kind']] == ['machine', 'ceilings']
        assert {row['kind'] for row in rows} == {'skipped'}
        if part < 4:
            assert [row['row'] for row in rows] == [str(row) for row in rows_of(part)]
    found = report([tmp_path / f'{part}.jsonl' for part in (1, 4)])
    assert f'- {PAIR}, timm kd, 64 images, bf16, eager: 0 s of the budget' in found
    assert '- 1 workers: ' in found


def test_the_longest_row_of_a_kind_says_what_fits() -> None:
    budget = Budget(100.0)
    assert budget.fits('eager', 15.0)
    assert not budget.fits('compiled', 90.0)
    budget.took('eager', 3.0)
    budget.took('eager', 90.0)
    budget.took('eager', 3.0)
    assert not budget.fits('eager', 15.0)
    assert budget.fits('compiled', 75.0)


def test_a_row_for_which_memory_does_not_suffice_is_a_row(tmp_path: Path) -> None:
    cpu = torch.device('cpu')
    large = measure(Row(PAIR, 'scratch', batch=2**40), cpu, True, 1e12)
    assert 'allocate' in large['failed']
    small = measure(Row(PAIR, 'scratch', batch=2), cpu, True, 1e12)
    assert 'failed' not in small
    file = tmp_path / 'rows.jsonl'
    lines = [json.dumps({'kind': 'step', 'part': 1, **row}) for row in (large, small)]
    # The last line is that of a run that was killed.
    file.write_text('\n'.join([*lines, lines[1][:40]]))
    found = report([file])
    assert large['failed'][:40] in found
    assert f'{small["images_per_s"]:,.0f}' in found


def test_an_image_of_many_names_is_as_many_images(tmp_path: Path) -> None:
    folder = data.write_jpegs(10, 16, links=3)
    try:
        files = sorted((folder / 'train').rglob('*.jpg'))
        assert (len(files), len({file.stat().st_ino for file in files})) == (30, 10)
    finally:
        data.remove(folder)


@pytest.mark.slow
def test_images_are_fed_where_there_is_no_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for there, loader in ((True, 'timm_dfpt'), (False, 'timm')):
        if not there:
            monkeypatch.setitem(sys.modules, 'datasets', None)
        rows = run(tmp_path / f'{loader}.jsonl', '--part', '4')[2:]
        assert [row['kind'] for row in rows] == 2 * ['loader'] + 3 * ['fed']
        assert {row['loader'] for row in rows} == {loader}
        assert min(row['images_per_s'] for row in rows) > 0
        assert '| 1 |' in report([tmp_path / f'{loader}.jsonl'])


@pytest.mark.slow
def test_what_is_run_on_a_gpu_starts_where_there_is_no_datasets() -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        'import benchmarks.gpu.__main__, benchmarks.study.gpu, pytest\n'
        "sys.exit(pytest.main(['--collect-only', '-p', 'no:cacheprovider', '-m', 'gpu']))"
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'tests/gpu/test_gpu_jobs.py' in done.stdout
    assert 'error' not in done.stdout
