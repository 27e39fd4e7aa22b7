"""Run the study of foreign teachers: every student of `plan.yaml` that is not recorded yet.

    python -m benchmarks.foreign.run --work DIR --records DIR/records --budget-seconds 3600
    python -m benchmarks.foreign.run --work DIR --progress

`DIR/data` and `DIR/weights` hold what `benchmarks.foreign.data` and `benchmarks.foreign.weights` make. A student that
was interrupted is trained from its start when the command is given again; what is recorded is not trained again.
Several processes may work in one folder. Records are lines of JSON, one file per regime, to which lines are only added.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.foreign.meter import Meter
from benchmarks.foreign.plan import PLAN_FILE, Cell, Plan
from benchmarks.foreign.ways import go, train
from timm_dfpt.training.run import close
from timm_dfpt.version import __version__

__all__ = ['RECORDS', 'main', 'read_records']

RECORDS = Path(__file__).with_name('records')


def read_records(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """Read all records, in the order of files and lines."""
    return [
        json.loads(line)
        for file in sorted(folder.glob('*.jsonl'))
        for line in file.read_text(encoding='utf-8').splitlines()
    ]


def _key(record: dict[str, Any]) -> tuple[str, str, int, str]:
    return record['regime'], record['arm'], record['seed'], record['phase']


@contextlib.contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Take a piece of work; say whether no other process has it. A process that ends gives back what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', encoding='utf-8') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def make_teachers(plan: Plan) -> None:
    """Train the teachers that are not there."""
    for name, config in plan.teachers().items():
        with _claim(plan.work / 'claims' / f'teacher-{name}') as mine:
            folder = Path(str(config.output))
            if not mine or (folder / 'done.json').is_file():
                continue
            shutil.rmtree(folder, ignore_errors=True)
            meter = Meter()
            setup, _ = train(config, meter)
            close(setup)
            (folder / 'done.json').write_text(json.dumps({'cpu_s': meter.seconds}), encoding='utf-8')


def run_cell(plan: Plan, cell: Cell) -> dict[str, Any]:
    """Train a student and return its record."""
    folder = plan.work / 'runs' / re.sub(r'[^\w.+-]', '.', '-'.join(map(str, cell.key)))
    shutil.rmtree(folder, ignore_errors=True)
    start, load = time.monotonic(), os.getloadavg()[0]
    outcome = go(plan, cell, folder)
    shutil.rmtree(folder)
    # None where only the time matters.
    last: dict[str, Any] = outcome['metrics'].get('test') or outcome['metrics'].get('val') or {}
    return {
        **dataclasses.asdict(cell),
        'student_top1': _rounded(last.get('student', {}).get('top1')),
        'path_top1': _rounded(last.get('prompt_path', {}).get('top1')),
        'teacher_top1': _rounded(last.get('teacher', {}).get('top1')),
        'total_cpu_s': round(sum(outcome.get('cpu_s', ())), 2),
        **{key: _rounded(value) for key, value in outcome.items()},
        'stages': [
            {key: value for key, value in dataclasses.asdict(stage).items() if value} for stage in plan.stages(cell)
        ],
        'plan': plan.digest(cell.regime) if cell.phase == 'final' else None,
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'elapsed_s': round(time.monotonic() - start, 1),
        'load': round(load, 2),
        'machine': _machine(),
        'versions': {
            'timm_dfpt': __version__, 'timm': timm.__version__, 'torch': str(torch.__version__),
            'python': platform.python_version(),
        },
        'commit': _commit(),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def _machine() -> dict[str, Any]:
    names = re.findall(r'^model name\s*: (.*)$', Path('/proc/cpuinfo').read_text(encoding='utf-8'), re.MULTILINE)
    return {'cpu': names[0] if names else platform.processor(), 'cores': os.cpu_count(), 'threads': 1}


def _commit() -> str:
    git = ['git', '-C', str(Path(__file__).parent), 'rev-parse', 'HEAD']
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def run_missing(path: Path, work: Path, records: Path, budget: float, only: Sequence[str] = ()) -> None:
    """Train what is not recorded and no other process is at, until the budget of seconds is spent."""
    begin = time.monotonic()
    failed: set[tuple[str, str, int, str]] = set()
    records.mkdir(parents=True, exist_ok=True)
    while time.monotonic() - begin < budget:
        recorded = read_records(records)
        # Anew each time: the finals follow from what was tuned.
        plan, done = Plan(path, work, recorded), set(map(_key, recorded)) | failed
        for cell in plan.cells():
            if cell.key in done or (only and cell.phase not in only and cell.regime not in only):
                continue
            with _claim(plan.work / 'claims' / re.sub(r'[^\w.+-]', '.', '-'.join(map(str, cell.key)))) as mine:
                if not mine or cell.key in set(map(_key, read_records(records))):
                    continue
                try:
                    record = run_cell(plan, cell)
                except (TypeError, ValueError) as error:
                    # One arm that cannot be trained must not hold up a night's work.
                    failed.add(cell.key)
                    print(f'FAILED {cell.key}: {error}', flush=True)
                    break
                with open(records / f'{cell.regime}.jsonl', 'a', encoding='utf-8') as file:
                    file.write(json.dumps(record) + '\n')
                print(f'RECORD {cell.key} {record["student_top1"]} {record["total_cpu_s"]} s', flush=True)
                break
        else:
            return


def progress(plan: Plan, records: Path) -> str:
    """Say how many of the students are recorded, by step of the order."""
    done = set(map(_key, read_records(records)))
    asked: Counter[tuple[str, str]] = Counter()
    there: Counter[tuple[str, str]] = Counter()
    for cell in dict.fromkeys(plan.cells()):
        asked[cell.phase, cell.regime] += 1
        there[cell.phase, cell.regime] += cell.key in done
    lines = [f'{phase:6} {regime:24} {there[phase, regime]:4} of {count}' for (phase, regime), count in asked.items()]
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work', type=Path, required=True, help='folder with data/ and weights/')
    parser.add_argument('--plan', type=Path, default=PLAN_FILE, help='the study (%(default)s)')
    parser.add_argument('--records', type=Path, default=RECORDS, help='folder of the records (%(default)s)')
    parser.add_argument('--budget-seconds', type=float, default=float('inf'), help='begin no student after so long')
    parser.add_argument('--only', nargs='+', default=[], help='phases or regimes to run')
    parser.add_argument('--progress', action='store_true', help='say how far it is, and run nothing')
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    plan = Plan(args.plan, args.work.resolve(), read_records(args.records))
    if args.progress:
        print(progress(plan, args.records))
        return 0
    make_teachers(plan)
    run_missing(args.plan, args.work.resolve(), args.records, args.budget_seconds, args.only)
    return 0


if __name__ == '__main__':
    sys.exit(main())
