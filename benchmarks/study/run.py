"""Run the study: every student of `study.yaml` that is not in `results/` yet, or any single one again.

    python -m benchmarks.study.run --work DIR                       # teachers, then all that is missing
    python -m benchmarks.study.run --work DIR --regime glyphs-l-s --arm dfpt --seed 100

`DIR/data` holds the datasets that `benchmarks.study.data` makes. Several workers may share a folder: each takes what
no other has taken. Students of a regime and a seed train side by side, up to eight, on the same batches and from the
same weights; alone each would become the same, bit for bit. A single one is trained alone and held against its record.
What was interrupted goes on from its last checkpoint when it is started again, and ends in the same bits.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator

from benchmarks.study.plan import PLAN_FILE, Cell, Plan
from timm_dfpt import DualForwardPathTeacher
from timm_dfpt.data.datasets import load_splits
from timm_dfpt.data.loader import create_loader
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.tasks.evaluation import evaluate
from timm_dfpt.training.compare import Arm, compare
from timm_dfpt.training.run import run
from timm_dfpt.training.run_folder import ComparisonFolder, RunFolder

RESULTS = Path(__file__).with_name('results')
# More side by side do not fit into the caches of a core: with 36 of them each took twice as long.
_TOGETHER = 8


def read_records(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Read all records, in the order of files and lines."""
    return [
        json.loads(line)
        for file in sorted(folder.glob('*.jsonl'))
        for line in file.read_text(encoding='utf-8').splitlines()
    ]


def train_students(plan: Plan, cells: Sequence[Cell], folder: Path) -> list[dict[str, Any]]:
    """Train students of one regime, seed, phase and length side by side.

    Args:
        plan: The study.
        cells: The students.
        folder: Folder of the run: a new one, or that of an attempt that was interrupted.

    Returns:
        A record each.
    """
    config = plan.config(cells[0], folder)
    arms = {cell: plan.arm(cell)[0] for cell in cells}
    resumed = dataclasses.replace(config, resume=ComparisonFolder(folder).arms.is_file())
    assistants = [assistant for cell in cells for assistant in plan.assistants(cell)]
    with _spending(folder) as spent:
        for assistant in assistants:
            run(assistant)
        compare(resumed, list(arms.values()), [config.seed], reference=arms[cells[0]].name)
        records = _make_records(plan, arms, config, folder)
    for cell, record in zip(arms, records, strict=True):
        # As written down: where the teachers are says nothing to others.
        record['config'] = {key: value for key, value in plan.options(cell).items() if key != 'longer'}
        # What the machine really spent, on all of the group.
        record |= {key: round(value / len(cells), 2) for key, value in spent().items()}
        record['commit'] = _commit()
    for assistant in assistants:
        shutil.rmtree(str(assistant.output))
    return records


@contextmanager
def _spending(folder: Path) -> Iterator[Callable[[], dict[str, float]]]:
    """Measure time, that of earlier attempts in this folder included."""
    file = folder / 'spent.json'
    before = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {'cpu_s': 0.0, 'elapsed_s': 0.0}
    cpu_start, start = time.process_time(), time.perf_counter()

    def spent() -> dict[str, float]:
        now = {'cpu_s': time.process_time() - cpu_start, 'elapsed_s': time.perf_counter() - start}
        return {key: before[key] + value for key, value in now.items()}

    try:
        yield spent
    finally:
        if folder.is_dir():
            file.write_text(json.dumps(spent()), encoding='utf-8')


def _make_records(
    plan: Plan, arms: Mapping[Cell, Arm], config: TrainConfig, folder: Path
) -> list[dict[str, Any]]:
    run_folder = ComparisonFolder(folder).seed(config.seed)
    summary, lines = run_folder.read_summary(), run_folder.read_metrics()
    records = []
    for cell, arm in arms.items():
        result = summary['arms'][arm.name]
        metrics = {split: {who: model[key] for who, model in result['models'].items()}
                   for split, key in (('val', 'val_metrics'), ('test', 'metrics'))}
        metrics['train'] = _on_training_images(config, run_folder.arm(arm.name))
        if cell.phase == 'tune':
            # What is missing cannot be inspected.
            del metrics['test']
        seconds, flops = result['step']['ms'] / 1000, result['step']['flops']
        for assistant in plan.assistants(cell):
            seconds += RunFolder(str(assistant.output)).read_summary()['train_seconds'] / summary['steps']
        records.append({
            'regime': cell.regime,
            'arm': cell.arm,
            'seed': cell.seed,
            'phase': cell.phase,
            'epochs': config.epochs,
            'val_top1': metrics['val']['student']['top1'],
            'test_top1': metrics.get('test', {}).get('student', {}).get('top1'),
            'train_top1': metrics['train']['student']['top1'],
            'prompt_top1': metrics.get('test', metrics['val']).get('prompt_path', {}).get('top1'),
            # Of this student alone, teacher included: the median step, timed in turns with the others of the group.
            'wall_s': round(seconds * summary['steps'], 2),
            'flops': flops * summary['steps'],
            'metrics': _rounded(metrics),
            'curve': [_point(line, arm.name) for line in lines],
        })
    return records


def _point(line: dict[str, Any], arm: str) -> dict[str, Any]:
    train = {key: value for key, value in line[arm]['train'].items() if key.endswith('_loss') or 'agree' in key}
    return _rounded({'epoch': line['epoch'], 'train': train, 'val': line[arm].get('val')})


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items() if part is not None}
    return round(value, 4) if isinstance(value, float) else value


def _on_training_images(config: TrainConfig, folder: RunFolder) -> dict[str, dict[str, float]]:
    """Evaluate what was saved, as a user would load it, on the training images without augmentation."""
    data = load_splits(str(config.dataset))
    keys = ('input_size', 'mean', 'std', 'crop_pct')
    loader = create_loader(
        data.train,
        batch_size=128,
        is_training=False,
        data_config={'interpolation': 'bilinear', **{key: tuple_or(getattr(config, key)) for key in keys}},
        seed=0,
        cache_images='auto',
    )
    student = timm.create_model(f'local-dir:{folder.student}', pretrained=True).eval()
    teacher = None
    if folder.prompt_path.is_dir():
        # The base is our own, and nowhere published, so that it has to be given.
        base = timm.create_model(str(config.teacher), pretrained=True)
        teacher = DualForwardPathTeacher.from_pretrained(str(folder.prompt_path), base).eval()

    def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = {'student': student(x)}
        if teacher is not None:
            paths = teacher(x)
            outputs |= {'prompt_path': paths.prompt, 'teacher': paths.original}
        return outputs

    return evaluate(forward, loader, Accelerator(cpu=True))


def tuple_or(value: Any) -> Any:
    """Return lists as the tuples that timm's data configs hold."""
    return tuple(value) if isinstance(value, list) else value


def _commit() -> str:
    here = Path(__file__).parent
    git = ['git', '-C', str(here), 'rev-parse', '--short', 'HEAD']
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Take a piece of work; say whether no other worker has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink()


def _missing(plan: Plan, results: Path) -> dict[tuple[Any, ...], list[Cell]]:
    """Group what is not recorded yet: same regime, phase, seed and length, a few at a time."""
    done = {(r['regime'], r['arm'], r['seed'], r['phase']) for r in read_records(results)}
    alike: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in plan.cells():
        if plan.is_retired(cell):
            continue
        alike.setdefault((cell.phase, cell.regime, cell.seed, plan.arm(cell)[1]), []).append(cell)
    # Counted over all of them, so that a group stays the same while others are recorded.
    groups = {
        (*key, start): [cell for cell in cells[start : start + _TOGETHER] if cell.key not in done]
        for key, cells in alike.items()
        for start in range(0, len(cells), _TOGETHER)
    }
    return {key: cells for key, cells in groups.items() if cells}


def _same_arms(plan: Plan, cells: Sequence[Cell], folder: ComparisonFolder) -> bool:
    """Say whether a folder has these students begun; the plan may have changed since."""
    arms = [plan.arm(cell)[0] for cell in cells]
    now = {arm.name: {'method': arm.method, **arm.changes} for arm in arms}
    return folder.arms.is_file() and folder.read_arms() == now


def run_missing(plan: Plan, work: Path, results: Path, only: str | None = None) -> None:
    """Train teachers and students until nothing is missing that no other worker is at."""
    for name, config in plan.teachers().items():
        with _claim(work / 'claims' / f'teacher-{name}') as mine:
            if mine and not RunFolder(str(config.output)).summary.is_file():
                run(config)
    results.mkdir(exist_ok=True)
    while True:
        for group, cells in _missing(plan, results).items():
            if only and not cells[0].regime.startswith(only):
                continue
            teacher = Path(str(plan.config(cells[0], work).teacher).removeprefix('local-dir:'))
            if not teacher.is_dir():
                continue
            name = '-'.join(str(part) for part in group)
            with _claim(work / 'claims' / name) as mine:
                # Another worker may have finished it since the records were read.
                if not mine or group not in _missing(plan, results):
                    continue
                folder = work / 'runs' / name
                if not _same_arms(plan, cells, ComparisonFolder(folder)):
                    shutil.rmtree(folder, ignore_errors=True)
                records = train_students(plan, cells, folder)
                with open(results / f'{cells[0].regime}.jsonl', 'a', encoding='utf-8') as file:
                    file.write(''.join(json.dumps(record) + '\n' for record in records))
                shutil.rmtree(folder)
                break
        else:
            return


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 1 if a student that is run again is not as recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work', type=Path, required=True, help='folder with data/, for teachers and runs')
    parser.add_argument('--plan', type=Path, default=PLAN_FILE, help='the study (%(default)s)')
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the records (%(default)s)')
    parser.add_argument('--only', help='run only regimes whose name starts like this')
    parser.add_argument('--regime', help='run a single student again: its regime')
    parser.add_argument('--arm', help='its arm')
    parser.add_argument('--seed', type=int, help='its seed')
    parser.add_argument('--phase', default='final', choices=('tune', 'final'), help='its phase (%(default)s)')
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    work = args.work.resolve()
    plan = Plan(args.plan, work)
    if args.regime is None:
        run_missing(plan, work, args.results, args.only)
        return 0
    cell = Cell(args.regime, args.arm, args.seed, args.phase)
    if cell not in set(plan.cells()):
        parser.error(f'{cell} is none of the study; see {args.plan}')
    if plan.is_retired(cell):
        parser.error(f'{cell} has options that were removed; train it at the commit that its record names')
    folder = work / 'runs' / 'single'
    shutil.rmtree(folder, ignore_errors=True)
    record = train_students(plan, [cell], folder)[0]
    shutil.rmtree(folder)
    print(json.dumps({key: value for key, value in record.items() if key not in ('metrics', 'curve')}, indent=2))
    kept = [r for r in read_records(args.results) if (r['regime'], r['arm'], r['seed'], r['phase']) == cell.key]
    same = True
    for other in kept:
        same = all(record[key] == other[key] for key in ('val_top1', 'test_top1', 'train_top1', 'prompt_top1'))
        print('as recorded' if same else f'recorded: {[other[k] for k in ("val_top1", "test_top1", "train_top1")]}')
    return 0 if same else 1


if __name__ == '__main__':
    sys.exit(main())
