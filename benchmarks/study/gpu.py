"""Run a plan of students at the scale of the literature on a GPU, in commands of a few minutes each.

    python -m benchmarks.study.gpu --work DIR --out gpu.jsonl              # again and again, until all is done
    python -m benchmarks.study.gpu --work DIR --out gpu.jsonl --report     # the contrasts
    python -m benchmarks.study.gpu --work TRY --out try.jsonl --device cpu --limit 16 --plan-seconds 30    # a dry run

`DIR/data` holds the dataset as `benchmarks.study.device` packs it (34 MiB: carry it along; fonts are not needed).
Images are kept on the device and augmented there. The arms of a seed train side by side in one process, on the same
batches, each by the package's own `Trainer`, `Learner` and task; the teacher's logits are computed once for all of
them.

One after another within a step, not stacked by `torch.func.vmap`: that is right (gradients and statistics of four
resnet8x4 under KD within 5e-7), but only students of one method can be stacked, the frozen layers that keep less have
no rule for it, the package's tasks and optimizers would be passed by, and convolutions become grouped ones, 1.6 times
as slow on a CPU. Where launches bind, `compile` and `compile_mode` in the plan are the remedy.

How many epochs are run follows from measured steps, so that the whole plan ends in `--plan-seconds`; what was chosen
is shown and kept in `DIR/chosen.json`. Each command ends by `--budget-seconds` with a checkpoint, and goes on from
there when it is given again, also after a kill. Records are lines of JSON, added as soon as the students of a seed
are trained.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import timm_dfpt
import timm_dfpt.models
from benchmarks.gpu.machine import facts
from benchmarks.study.analysis import CONTRASTS, Study
from benchmarks.study.device import DeviceImages, create_device_loader, load_split
from benchmarks.study.plan import Cell, Plan
from timm_dfpt.job.devices import create_accelerator
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.job.stopping import Preempted
from timm_dfpt.reports.intervals import difference_text
from timm_dfpt.tasks.evaluation import evaluate
from timm_dfpt.tasks.methods import METHODS
from timm_dfpt.training.build import create_learners, resolve_input_config
from timm_dfpt.training.checkpoint import describe_teachers
from timm_dfpt.training.learner import Learner
from timm_dfpt.training.run_folder import RunFolder
from timm_dfpt.training.teacher_heads import TeacherHeads
from timm_dfpt.training.trainer import Trainer

__all__ = ['Bench', 'GPU_PLAN', 'choose_epochs', 'main']

GPU_PLAN = Path(__file__).with_name('study_gpu.yaml')
# Of the whole time: what the teacher may take, and what is kept for evaluations, checkpoints and starts.
_TEACHER, _RESERVE = 0.15, 0.15
# Steps before those that are measured, and the seconds after which these are enough.
_WARMUP, _PATIENCE = 5, 10.0


class Bench:
    """The device with the images of a plan on it, and what is trained there.

    Args:
        plan: What to train.
        device: `cuda` or `cpu`.
        deadline: `time.monotonic()` at which training stops with a checkpoint.
        limit: Use only so many images of each split, in batches of no more than half of them; for dry runs.
    """

    def __init__(self, plan: Plan, device: str, deadline: float, limit: int | None = None) -> None:
        self.plan, self.deadline, self.limit = plan, deadline, limit
        self.device = torch.device(device)
        self._splits: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor, list[str]]] = {}

    def config(self, config: TrainConfig, epochs: int | None = None) -> TrainConfig:
        """Return options for this device and a number of epochs."""
        epochs = config.epochs if epochs is None else epochs
        more: dict[str, Any] = {'cpu': True, 'mixed_precision': 'no'} if self.device.type == 'cpu' else {}
        if self.limit is not None:
            more['batch_size'] = min(_batch_size(config), self.limit // 2)
        warmup = min(config.warmup_epochs, epochs // 5)
        return dataclasses.replace(config, epochs=epochs, val_interval=epochs, warmup_epochs=warmup, **more)

    def images(self, config: TrainConfig, split: str, augment: bool = False) -> DeviceImages:
        """Return a split of the dataset that the options name, on the device."""
        key = (str(config.dataset), split)
        if key not in self._splits:
            self._splits[key] = load_split(Path(key[0]), split, self.device)
        images, labels, _ = self._splits[key]
        more: dict[str, Any] = {'padding': config.crop_padding, 'hflip': config.hflip} if augment else {}
        if config.no_aug:
            more = {}
        part = slice(self.limit)
        return DeviceImages(images[part], labels[part], config.mean, config.std, seed=config.seed, **more)

    def learners(self, arms: Mapping[str, TrainConfig], accelerator: Accelerator, steps: int) -> list[Learner]:
        """Create the learners of some options by name."""
        first = next(iter(arms.values()))
        input_config = resolve_input_config(first)
        self.images(first, 'train')
        names = self._splits[str(first.dataset), 'train'][2]
        # Teachers are trained on these classes, so that none gets another head, for which images would be needed.
        no_images: Any = None
        heads = TeacherHeads(names, no_images, input_config, accelerator)
        return create_learners(arms, names, input_config, accelerator, steps, heads)

    def step_seconds(self, arms: Mapping[str, TrainConfig], count: int = 20) -> float:
        """Measure the median step of learners side by side, after a few steps that are not counted.

        Args:
            arms: Options by name.
            count: Steps to measure; fewer where they take long.
        """
        config = next(iter(arms.values()))
        accelerator = create_accelerator(config)
        loader = create_device_loader(self.images(config, 'train', augment=True), _batch_size(config), True)
        learners = self.learners(arms, accelerator, len(loader))
        times: list[float] = []
        batches = _endless(loader)
        for turn in range(_WARMUP + count):
            if sum(times[_WARMUP:]) > _PATIENCE:
                break
            batch = next(batches)
            start = time.perf_counter()
            if config.compile_mode == 'reduce-overhead':
                # As the trainer does, without which a learner would overwrite the logits that the next one reads.
                torch.compiler.cudagraph_mark_step_begin()
            known: dict[Any, Any] = {}
            for learner in learners:
                learner.train()
                with accelerator.accumulate(learner.module):
                    learner.set_progress(0, turn)
                    learner.step(batch[0], batch[1], turn, known)
            _wait(self.device)
            times.append(time.perf_counter() - start)
        accelerator.free_memory()
        return statistics.median(times[_WARMUP:])

    def train(self, arms: Mapping[str, TrainConfig], folder: RunFolder) -> tuple[list[Learner], dict[str, Any]]:
        """Train learners side by side, from a checkpoint in the folder if there is one.

        Args:
            arms: Options by name, those with a prompt path first; seed, epochs and data are those of the first.
            folder: Where to keep metrics and checkpoints.

        Returns:
            The learners; and `seconds`, and by name the metrics by split.

        Raises:
            Preempted: The time is over, or a signal asked to stop; a checkpoint was saved.
        """
        config = next(iter(arms.values()))
        accelerator = create_accelerator(config)
        size = _batch_size(config)
        train = create_device_loader(self.images(config, 'train', augment=True), size, True)
        evaluated = {
            name: accelerator.prepare(create_device_loader(self.images(config, split), size, False))
            for name, split in (('val', 'validation'), ('test', 'test'), ('train', 'train'))
        }
        learners = self.learners(arms, accelerator, len(train))
        last = time.monotonic()

        def after_epoch(line: Mapping[str, Any]) -> None:
            nonlocal last
            now = time.monotonic()
            if line['epoch'] < config.epochs and now + 1.5 * (now - last) > self.deadline:
                # The trainer's own way to stop: with a checkpoint, and to the same bits when it goes on.
                signal.raise_signal(signal.SIGTERM)
            last = now

        folder.open(config, accelerator)
        trainer = Trainer(
            config=config,
            accelerator=accelerator,
            learners=learners,
            train_loader=accelerator.prepare(train),
            val_loader=evaluated['val'],
            folder=folder,
            after_epoch=after_epoch,
            origin=describe_teachers({each.name: each.teacher for each in learners}),
        )
        found: dict[str, Any] = {'seconds': trainer.fit()}
        for learner in learners:
            learner.eval()
            found[learner.name] = {
                name: evaluate(learner.outputs, loader, accelerator) for name, loader in evaluated.items()
            }
        accelerator.free_memory()
        return learners, found


def choose_epochs(most: int, step: float, steps_per_epoch: int, seconds: float) -> int:
    """Return how many epochs fit into a time, one at least.

    Args:
        most: Not more than these.
        step: Seconds of a step of all that is trained in turn.
        steps_per_epoch: Steps of an epoch.
        seconds: The time.
    """
    return max(1, min(most, int(seconds / (step * steps_per_epoch))))


def _batch_size(config: TrainConfig) -> int:
    assert config.batch_size is not None
    return config.batch_size


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _groups(plan: Plan) -> dict[tuple[str, int, float], list[Cell]]:
    """Return what trains side by side: seed by seed, and what trains longer at the end."""
    groups: dict[tuple[str, int, float], list[Cell]] = {}
    for cell in sorted(plan.cells(), key=lambda cell: (plan.arm(cell)[1], cell.seed)):
        groups.setdefault((cell.regime, cell.seed, plan.arm(cell)[1]), []).append(cell)
    return groups


def _arms(bench: Bench, cells: Sequence[Cell], epochs: int, folder: Path) -> dict[str, TrainConfig]:
    common = bench.config(bench.plan.config(cells[0], folder), epochs)
    arms = {}
    for cell in cells:
        arm, _ = bench.plan.arm(cell)
        arms[arm.name] = common.for_method(arm.method, **arm.changes)
    # Those with a prompt path compute the teacher's logits on the way.
    return dict(sorted(arms.items(), key=lambda item: METHODS[item[1].method].variant is None))


def make_teacher(bench: Bench, name: str, config: TrainConfig, epochs: int) -> None:
    """Train a teacher and save it, if it is not there yet."""
    folder = RunFolder(str(config.output))
    if (folder.student / 'model.safetensors').is_file():
        return
    (learner,), found = bench.train({name: bench.config(config, epochs)}, folder)
    student: Any = learner.published_student
    options = {'label_names': student.pretrained_cfg['label_names'], 'data_config': resolve_input_config(config)}
    timm_dfpt.save_student(student, folder.student, **options)
    accuracies = {split: round(metrics['student']['top1'], 2) for split, metrics in found[name].items()}
    print(f'teacher {name}: {epochs} epochs in {found["seconds"]:.0f} s, top-1 {accuracies}', flush=True)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)


def choose(bench: Bench, work: Path, seconds: float) -> dict[str, Any]:
    """Choose the epochs of teachers and students from measured steps, and keep the choice.

    Teachers that the students' steps are measured with are trained first.

    Returns:
        `teachers` by name and `share`, that of the plan's epochs which all students get.

    Raises:
        ValueError: If the folder was begun with another number of images.
    """
    file = work / 'chosen.json'
    plan = bench.plan
    chosen: dict[str, Any] = {'teachers': {}, 'limit': bench.limit}
    if file.is_file():
        chosen = json.loads(file.read_text(encoding='utf-8'))
    if chosen.get('limit') != bench.limit:
        # A teacher of a dry run must not teach.
        raise ValueError(f'--work {work} was begun with --limit {chosen.get("limit")}: give a folder of its own.')
    teachers = {name: bench.config(config) for name, config in plan.teachers().items()}
    for name, config in teachers.items():
        if name not in chosen['teachers']:
            steps = len(bench.images(config, 'train')) // _batch_size(config)
            step = bench.step_seconds({name: config})
            epochs = choose_epochs(config.epochs, step, steps, _TEACHER * seconds / len(teachers))
            chosen['teachers'][name] = epochs
            file.write_text(json.dumps(chosen), encoding='utf-8')
            print(f'teacher {name}: a step takes {1000 * step:.1f} ms: {epochs} of {config.epochs} epochs', flush=True)
        make_teacher(bench, name, config, chosen['teachers'][name])
    if 'share' not in chosen:
        groups = _groups(plan)
        needed, steps_of = 0.0, {}
        for (regime, _, longer), cells in groups.items():
            if (regime, longer) not in steps_of:
                arms = _arms(bench, cells, 1, work)
                steps_of[regime, longer] = bench.step_seconds(arms)
                shown = f'{1000 * steps_of[regime, longer]:.1f} ms'
                print(f'{regime}: a step of {", ".join(arms)} side by side takes {shown}', flush=True)
            config = bench.config(plan.config(cells[0], work))
            steps = len(bench.images(config, 'train')) // _batch_size(config)
            needed += steps_of[regime, longer] * steps * config.epochs
        left = (1 - _TEACHER - _RESERVE) * seconds
        chosen |= {'share': min(1.0, left / needed), 'needed_s': needed, 'seconds': seconds}
        file.write_text(json.dumps(chosen), encoding='utf-8')
        fit = f'{chosen["share"]:.0%} of the epochs'
        print(f'the plan would take {needed:.0f} s, and there are {left:.0f} s: {fit} are run', flush=True)
    return chosen


def run_plan(bench: Bench, work: Path, out: Path, seconds: float) -> bool:
    """Train what has no record yet, until all is done or the time is over; return whether all is done."""
    plan = bench.plan
    chosen = choose(bench, work, seconds)
    machine = facts(bench.device)
    for (regime, seed, longer), cells in _groups(plan).items():
        done = {(r['regime'], r['arm'], r['seed'], r['phase']) for r in read_records(out)}
        if all(cell.key in done for cell in cells):
            continue
        if time.monotonic() > bench.deadline:
            return False
        folder = RunFolder(work / 'runs' / f'{regime}-{seed}-{longer}')
        planned = plan.config(cells[0], work).epochs
        epochs = max(1, round(planned * chosen['share']))
        arms = _arms(bench, cells, epochs, folder.path)
        _, found = bench.train(arms, folder)
        lines = folder.read_metrics()
        with out.open('a', encoding='utf-8') as file:
            for cell in cells:
                if cell.key in done:
                    continue
                name = plan.arm(cell)[0].name
                metrics = found[name]
                record = {
                    **dataclasses.asdict(cell),
                    'epochs': epochs,
                    'planned_epochs': planned,
                    'batch_size': arms[name].batch_size,
                    'images': len(bench.images(arms[name], 'train')),
                    'val_top1': metrics['val']['student']['top1'],
                    'test_top1': metrics['test']['student']['top1'],
                    'train_top1': metrics['train']['student']['top1'],
                    'prompt_top1': metrics['test'].get('prompt_path', {}).get('top1'),
                    # Of all arms of the seed together.
                    'group_s': round(found['seconds'], 1),
                    'config': {key: value for key, value in plan.options(cell).items() if key != 'longer'},
                    'metrics': metrics,
                    'curve': [{'epoch': line['epoch'], 'train': line[name]['train']} for line in lines],
                    'machine': machine,
                }
                file.write(json.dumps(record) + '\n')
                print(f'{cell.arm}, seed {seed}, {epochs} epochs: test {record["test_top1"]:.2f}%', flush=True)
        shutil.rmtree(folder.path)
    return True


def read_records(out: Path) -> list[dict[str, Any]]:
    """Read the records; a last line that was cut off is none."""
    if not out.is_file():
        return []
    text = out.read_text(encoding='utf-8')
    whole = text[: text.rfind('\n') + 1]
    if whole != text:
        out.write_text(whole, encoding='utf-8')
    return [json.loads(line) for line in whole.splitlines()]


def report(plan: Plan, records: Sequence[Mapping[str, Any]]) -> str:
    """Return arms and contrasts over the seeds, in Markdown."""
    study = Study(plan, records)
    lines = ['| regime | arm | epochs | seeds | train | test top-1 |', '|---|---|---:|---:|---:|---:|']
    for regime in study.regimes('final'):
        for arm, rows in study.arms(regime).items():
            means = [statistics.fmean(row[key] for row in rows) for key in ('train_top1', 'test_top1')]
            shown = f'{rows[0]["epochs"]} | {len(rows)} | {means[0]:.2f} | {means[1]:.2f}'
            lines.append(f'| {regime} | {arm} | {shown} |')
    lines += ['', '| regime | contrast | difference [95% interval] | wins |', '|---|---|---:|---:|']
    contrasts = [*CONTRASTS, ('dfpt+', 'kd w=1'), ('dfpt', 'kd-time'), ('dfpt+', 'kd-time')]
    for regime in study.regimes('final'):
        for arm, base in contrasts:
            found = study.difference(regime, arm, base)
            if found is not None:
                shown = f'{difference_text(found)} | {found["wins"]} of {found["n"]}'
                lines.append(f'| {regime} | {arm} - {base} | {shown} |')
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 0 where all is done, and 3 where the time was over before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work', type=Path, required=True, help='folder with data/, for teachers and checkpoints')
    parser.add_argument('--out', type=Path, required=True, help='file to which records are added')
    parser.add_argument('--plan', type=Path, default=GPU_PLAN, help='the plan (%(default)s)')
    parser.add_argument('--plan-seconds', type=float, default=1500, help='time of the whole plan (%(default)s)')
    parser.add_argument('--budget-seconds', type=float, default=540, help='time of this command (%(default)s)')
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'), help='where to train (%(default)s)')
    parser.add_argument('--limit', type=int, help='use so many images of each split, 4 or more: a dry run')
    parser.add_argument('--report', action='store_true', help='print what the records say instead')
    args = parser.parse_args(argv)
    work = args.work.resolve()
    plan = Plan(args.plan, work)
    if args.report:
        print(report(plan, read_records(args.out)))
        return 0
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('there is no GPU; a dry run is --device cpu --limit 16 --plan-seconds 30')
    if args.limit is not None and args.limit < 4:
        parser.error(f'--limit {args.limit}: two batches of two images are the least; use 4 or more')
    bench = Bench(plan, args.device, time.monotonic() + args.budget_seconds, args.limit)
    try:
        done = run_plan(bench, work, args.out, args.plan_seconds)
    except Preempted:
        done = False
    print('all is done' if done else 'the time is over: the same command goes on from here', flush=True)
    return 0 if done else 3


if __name__ == '__main__':
    sys.exit(main())
