"""What a training step costs, side by side: plain distillation against DFPT-KD, in time, FLOPs and memory.

    python -m benchmarks.step                          # the table, kept in benchmarks/results/step.md
    python -m benchmarks.step resnet50-resnet18 --size 224 --rounds 15
    python -m benchmarks.step --compile                # compiled, kept in benchmarks/results/step-compiled.md
    python -m benchmarks.step --plot                   # cost against batch size and teacher depth
    python -m benchmarks.step resnet50-resnet18 --profile

One process and one thread; every round times each way once, in rotating order, and ratios are taken within a round.
Weights are random, which costs the same. The floor is the arithmetic that DFPT-KD cannot do without,
`F_T + 2 (F_T - F_pre) + 3 F_phi + 3 F_S`, where plain distillation costs `F_T + 3 F_S` (F_T and F_S: forward of teacher
and student, F_pre: of the teacher before the first block, F_phi: of the blocks; all counted, none estimated).
"""
from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import itertools
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.task import LogitDistillationTask, TrainingTask
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_dfpt.models
from timm_dfpt.tasks.baselines import AdaptedTeacher, LogitLossTask
from timm_dfpt.tasks.dfpt import DFPTDistillationTask
from timm_dfpt.teacher.blocks import FusionBlock, PromptBlock

from .measure import PeakMemory, count_flops, interleaved, saved_bytes, spread

_ROOT = Path(__file__).parents[1]
_RESULTS = Path(__file__).parent / 'results'
_INPUT: dict[str, Any] = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}

WAYS = {
    'a': "timm's LogitDistillationTask",
    'b': 'our kd (LogitLossTask)',
    'c': 'DFPT-KD, two plain forwards',
    'd': 'DFPT-KD',
    'e': 'DFPT-KD+',
}


# Of the profile: kinds of operators by what is found in the names of an operator and of its callers, the first counts.
_STEP, _BLOCK, _BACKWARD = 'one step', 'a block', 'autograd::engine'
_KINDS = {
    'blocks, forward': '^$',
    'blocks, backward': '^$',
    'optimizers': 'Optimizer',
    'convolutions, backward': f'(?i)conv.*{_BACKWARD}',
    'convolutions, forward': '(?i)conv',
    'BatchNorm': '(?i)batch_?norm',
    'Python between the operators': f'^{_STEP}$',
    'all other: activations, pooling, additions, losses': '',
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Teacher, student and a batch.

    Args:
        name: For tables and the command line.
        teacher: Makes the teacher.
        student: Makes the student.
        shape: Of the batch `[B, C, H, W]`.
    """

    name: str
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]


def imagenet_pair(teacher: str, student: str, batch: int, size: int) -> Pair:
    """Make a pair of timm models with 1000 classes."""
    fixed = {'img_size': size} if teacher.startswith(('vit', 'swin')) else {}
    short = teacher.removesuffix('_patch16_224').removesuffix('_patch4_window7_224')
    return Pair(
        f'{short}-{student}',
        lambda: timm.create_model(teacher, **fixed),
        lambda: timm.create_model(student),
        (batch, 3, size, size),
    )


def cifar_pair(teacher: str, student: str, batch: int = 16) -> Pair:
    """Make a pair of the CIFAR networks with 100 classes."""

    def create(name: str) -> nn.Module:
        return timm.create_model(f'cifar_{name}', num_classes=100)

    return Pair(f'{teacher}-{student}', lambda: create(teacher), lambda: create(student), (batch, 3, 32, 32))


def quickstart_pair() -> Pair:
    """Make the pair of the embedded default run."""
    recipe = yaml.safe_load((_ROOT / 'train/recipes/quickstart.yaml').read_text(encoding='utf-8'))
    teacher = f'local-dir:{_ROOT / "train/quickstart/teacher"}'
    return Pair(
        'quickstart',
        lambda: timm.create_model(teacher),
        lambda: timm.create_model(recipe['student'], num_classes=10, in_chans=1, **recipe['student_kwargs']),
        (recipe['batch_size'], 1, 28, 28),
    )


def all_pairs(batch: int, size: int) -> list[Pair]:
    """Return the pairs of the table."""
    teachers = ('resnet50', 'convnext_tiny', 'vit_small_patch16_224', 'swin_tiny_patch4_window7_224')
    students = ('resnet18', 'mobilenetv3_small_100')
    cifar = (('resnet32x4', 'resnet8x4'), ('wrn_40_2', 'wrn_16_2'), ('vgg13', 'vgg8'), ('resnet56', 'resnet20'))
    return [
        quickstart_pair(),
        *(imagenet_pair(t, s, batch, size) for s, t in itertools.product(students, teachers)),
        *(cifar_pair(t, s) for t, s in cifar),
    ]


class Steps:
    """The ways of taking a step on one pair, each with models and optimizers of its own.

    Args:
        pair: What to train.
        ways: Which of `WAYS`.
        compile_backend: Compile with this backend.
    """

    def __init__(self, pair: Pair, ways: Sequence[str] = tuple(WAYS), compile_backend: str | None = None) -> None:
        torch.manual_seed(0)
        self.pair = pair
        self.teacher, self.student = pair.teacher(), pair.student()
        self.input = torch.randn(pair.shape)
        num_classes: Any = self.teacher.num_classes
        self.target = torch.randint(num_classes, pair.shape[:1])
        self.tasks = {way: self._create(way) for way in ways}
        self.optimizers = {way: create_optimizers(task) for way, task in self.tasks.items()}
        for task in self.tasks.values():
            task.train()
            if compile_backend:
                # An error rather than a measurement of half-compiled paths.
                task.compile(backend=compile_backend, fullgraph=isinstance(task, DFPTDistillationTask))
                _compile_teacher(task, compile_backend)

    def _create(self, way: str) -> TrainingTask:
        student, teacher = copy.deepcopy(self.student), copy.deepcopy(self.teacher)
        channels = self.pair.shape[1]
        config: dict[str, Any] = {key: values[:channels] for key, values in _INPUT.items()}
        config['input_size'] = self.pair.shape[1:]
        model: Any
        for model in (student, teacher):
            model.pretrained_cfg = {**model.pretrained_cfg, **config}
        if way in 'ab':
            if way == 'a':
                return LogitDistillationTask(student, teacher.requires_grad_(False), verbose=False)
            return LogitLossTask(student, AdaptedTeacher(teacher, config, config), verbose=False)
        wrapped = timm_dfpt.wrap(teacher, variant='dfpt+' if way == 'e' else 'dfpt')
        if way == 'c':
            wrapped.stop_sharing_prefix()
        return DFPTDistillationTask(
            student, wrapped, input_config=config, teacher_input_config=config, verbose=False
        )

    def forward(self, way: str) -> dict[str, torch.Tensor]:
        """Run the forward of a step."""
        return self.tasks[way](self.input, self.target)

    def step(self, way: str) -> None:
        """Run a whole step."""
        self.forward(way)['loss'].backward()
        for optimizer in self.optimizers[way]:
            optimizer.step()
            optimizer.zero_grad()

    def flops(self, way: str) -> int:
        """Count the FLOPs of a step."""
        return count_flops(lambda: self.step(way))

    def saved(self, way: str) -> int:
        """Return the bytes that autograd keeps of a step's forward."""
        task = self.tasks[way]
        teacher: Any = getattr(task, 'teacher', None)
        modules = [task, getattr(teacher, 'prompt_path', nn.Module())]
        tensors = itertools.chain(
            (self.input,), *((*m.parameters(), *m.buffers()) for m in modules), task.teacher.parameters()
        )
        return saved_bytes(lambda: self.forward(way), tensors)

    def peak(self, way: str) -> int:
        """Return the most bytes alive at once beyond weights, optimizer states and the batch."""
        with PeakMemory() as memory:
            self.step(way)
        return memory.peak


def create_optimizers(task: TrainingTask, fused: bool = False) -> list[torch.optim.Optimizer]:
    """Make the optimizers of a task: SGD for the student, AdamW for a prompt path."""
    student: Any = task.get_eval_model()
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(student.parameters(), 1e-3, momentum=0.9, fused=fused)]
    if isinstance(task, DFPTDistillationTask):
        params = [p for group in task.teacher.parameter_groups() for p in group['params']]
        optimizers.append(torch.optim.AdamW(params, 1e-5, fused=fused))
    return optimizers


def _compile_teacher(task: Any, backend: str) -> None:
    if not isinstance(task, DFPTDistillationTask):
        task.teacher.model.compile(backend=backend)


@dataclasses.dataclass
class Floor:
    """Counted parts of the arithmetic of a step, in FLOPs."""

    teacher: int
    prefix: int
    blocks: int
    student: int

    @property
    def kd(self) -> int:
        """Plain distillation."""
        return self.teacher + 3 * self.student

    @property
    def dfpt(self) -> int:
        """What DFPT-KD cannot do without."""
        return self.kd + 2 * (self.teacher - self.prefix) + 3 * self.blocks


@torch.no_grad()
def count_floor(pair: Pair) -> Floor:
    """Count the parts of a step, independently of how the package takes it."""
    torch.manual_seed(0)
    x = torch.randn(pair.shape)
    teacher = timm_dfpt.wrap(pair.teacher())
    model = teacher.unwrap()
    total = count_flops(lambda: model(x))
    prefix = _flops_before(model, teacher.stages[0].module, x)
    blocks = count_flops(lambda: teacher.prompt(x)) - total
    student = pair.student().eval()
    return Floor(total, prefix, blocks, count_flops(lambda: student(x)))


def _flops_before(model: nn.Module, name: str, x: torch.Tensor) -> int:
    found: list[int] = []
    counter = FlopCounterMode(display=False)
    handle = model.get_submodule(name).register_forward_hook(lambda *_: found.append(counter.get_total_flops()))
    with counter:
        model(x)
    handle.remove()
    return found[0]


def measure(
    pair: Pair, rounds: int, ways: Sequence[str] = tuple(WAYS), compile_backend: str | None = None
) -> dict[str, Any]:
    """Measure ways of taking a step, (a) among them, on one pair."""
    steps = Steps(pair, ways, compile_backend)
    floor = count_floor(pair)
    for way in ways:
        steps.step(way)  # compiles, and makes the optimizer states, which are not to be counted below
    counts: dict[str, Any] = {}
    if compile_backend is None:
        # Compiled code is not visible to these counters.
        counts = {
            'flops': {way: steps.flops(way) for way in ways},
            'saved': {way: steps.saved(way) for way in ways},
            'peak': {way: steps.peak(way) for way in ways},
        }
    seconds = interleaved({way: functools.partial(steps.step, way) for way in ways}, rounds)
    return {'pair': pair.name, 'shape': pair.shape, 'floor': floor, 'seconds': seconds, **counts}


def _rows(result: dict[str, Any]) -> list[str]:
    floor, seconds = result['floor'], result['seconds']
    rows = []
    for way in seconds:
        ms, low, high = (1000 * value for value in spread(seconds[way]))
        ratio, ratio_low, ratio_high = spread([t / base for t, base in zip(seconds[way], seconds['a'], strict=True)])
        cells = [f'{ms:.0f} ({low:.0f}-{high:.0f})', f'{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})']
        if 'flops' in result:
            flops = result['flops'][way]
            cells += [f'{flops / 1e9:.2f}', f'{flops / result["flops"]["a"]:.2f}']
        demanded = {'a': 1.0, 'b': 1.0, 'd': floor.dfpt / floor.kd}.get(way)
        cells += [f'{demanded:.2f}', f'**{ratio / demanded:.2f}**' if way == 'd' else f'{ratio / demanded:.2f}'] if (
            demanded
        ) else ['', '']
        if 'flops' in result:
            cells += [f'{result[key][way] / 2**20:.0f}' for key in ('saved', 'peak')]
        rows.append(f'| {result["pair"] if way == "a" else ""} | {way} | ' + ' | '.join(cells) + ' |')
    return rows


def table(results: Sequence[dict[str, Any]], rounds: int, how: str) -> str:
    """Return the table in Markdown."""
    counted = 'flops' in results[0]
    columns = ['pair', 'way', 'CPU ms a step', 'time / (a)']
    columns += ['GFLOP', 'FLOPs / (a)'] if counted else []
    columns += ['floor / (a)', 'time over floor']
    columns += ['MiB kept for backward', 'MiB at peak'] if counted else []
    lines = [
        f'# Cost of a step, {how}',
        '',
        f'timm {timm.__version__}, torch {torch.__version__}, {platform.machine()} CPU, 1 thread, float32, {rounds} '
        'rounds: median (quartiles). Made by `python -m benchmarks.step`. A step is forward, backward and optimizers.',
        '',
        *(f'- ({way}) {name}' for way, name in WAYS.items()),
        '',
        'Batches: ' + ', '.join(f'{r["pair"]} {"x".join(map(str, r["shape"]))}' for r in results) + '.',
        '',
        '| ' + ' | '.join(columns) + ' |',
        '|---|---|' + '---:|' * (len(columns) - 2),
    ]
    for result in results:
        lines += _rows(result)
    return '\n'.join(lines) + '\n'


def plot(rounds: int) -> None:
    """Plot how the cost of a step grows with the batch and with the teacher's depth."""
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    batches = [(batch, cifar_pair('resnet56', 'resnet20', batch)) for batch in (4, 8, 16, 32, 64)]
    depths = [(depth, cifar_pair(f'resnet{depth}', 'resnet20', 32)) for depth in (20, 32, 44, 56, 110)]
    lines = ['| pair | batch | (a) ms | (c) / (a) | (d) / (a) | floor / (a) |', '|---|---:|---:|---:|---:|---:|']
    for axis, pairs, label in ((axes[0], batches, 'batch size'), (axes[1], depths, "teacher's depth")):
        medians: dict[str, list[float]] = {way: [] for way in 'acd'}
        floors: list[float] = []
        for _, pair in pairs:
            steps, floor = Steps(pair, 'acd'), count_floor(pair)
            seconds = interleaved({way: functools.partial(steps.step, way) for way in 'acd'}, rounds)
            for way in 'acd':
                medians[way].append(1000 * spread(seconds[way])[0])
            floors.append(medians['a'][-1] * floor.dfpt / floor.kd)
            base = medians['a'][-1]
            ratios = [f'{value / base:.2f}' for value in (medians['c'][-1], medians['d'][-1], floors[-1])]
            lines.append(f'| {pair.name} | {pair.shape[0]} | {base:.0f} | {" | ".join(ratios)} |')
            print(lines[-1], flush=True)
        xs = [x for x, _ in pairs]
        for way in 'acd':
            axis.plot(xs, medians[way], marker='o', label=f'({way}) {WAYS[way]}')
        axis.plot(xs, floors, 'k--', label="floor: (a) x its FLOP ratio")
        axis.set(xlabel=label, ylabel='CPU ms a step', ylim=0)
    axes[0].set_title('resnet56 -> resnet20')
    axes[1].set_title('resnet-N -> resnet20, batch 32')
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(_RESULTS / 'step-growth.png', dpi=110)
    text = '# Growth of the cost of a step\n\nMade by `python -m benchmarks.step --plot`.\n\n' + '\n'.join(lines) + '\n'
    (_RESULTS / 'step-growth.md').write_text(text, encoding='utf-8')


def profile(pair: Pair, rounds: int) -> None:
    """Print where the time of (a) and (d) goes: by kind of operator, those of the blocks by themselves."""
    steps = Steps(pair, 'ad')
    wrapped: Any = steps.tasks['d'].teacher
    for module in wrapped.prompt_path.modules():
        if isinstance(module, (PromptBlock, FusionBlock)):
            module.forward = _recorded(module.forward)  # type: ignore[method-assign]
    milliseconds: dict[str, list[collections.Counter[str]]] = {'a': [], 'd': []}
    for turn in range(-1, rounds):
        for way in 'ad':
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities) as profiler, torch.profiler.record_function(_STEP):
                steps.step(way)
            if turn >= 0:
                milliseconds[way].append(_by_kind(profiler.events()))
    print(f'| {pair.name}, ms | {WAYS["a"]} | {WAYS["d"]} |\n|---|---:|---:|')
    medians = {
        kind: [statistics.median(counter[kind] for counter in milliseconds[way]) for way in 'ad'] for kind in _KINDS
    }
    for kind, (a, d) in {**medians, 'sum': map(sum, zip(*medians.values(), strict=True))}.items():
        print(f'| {kind} | {a:.1f} | {d:.1f} |')


def _recorded(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(_BLOCK):
            return forward(*args, **kwargs)

    return call


def _by_kind(events: Any) -> collections.Counter[str]:
    """Sum the profiler's events of a step, in milliseconds without what they call."""

    def ancestry(event: Any) -> list[str]:
        return [event.name, *ancestry(event.cpu_parent)] if event.cpu_parent else [event.name]

    callers = [(event, ancestry(event)) for event in events]
    # What the backward calls has the numbers of what the forward called.
    numbers = {event.sequence_nr for event, names in callers if _BLOCK in names and event.sequence_nr >= 0}

    def own(event: Any) -> bool:
        backward = event.name.startswith(_BACKWARD) and event.sequence_nr in numbers
        return event.name == _BLOCK or backward or (event.cpu_parent is not None and own(event.cpu_parent))

    total: collections.Counter[str] = collections.Counter()
    for event, names in callers:
        text = ' '.join(names)
        if own(event):
            kind = 'blocks, backward' if _BACKWARD in text else 'blocks, forward'
        else:
            kind = next(kind for kind, pattern in _KINDS.items() if re.search(pattern, text))
        total[kind] += event.self_cpu_time_total / 1000
    return total


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pairs', nargs='*', help='names of pairs (default: all, and the table is kept)')
    parser.add_argument('--rounds', type=int, default=5, help='times each way is timed')
    parser.add_argument('--batch', type=int, default=4, help='batch size of the pairs with 1000 classes')
    parser.add_argument('--size', type=int, default=96, help='image size of these pairs')
    parser.add_argument('--ways', default=''.join(WAYS), help='letters of the ways to measure, a among them')
    parser.add_argument('--compile', action='store_true', help='compile with inductor')
    parser.add_argument('--plot', action='store_true', help='plot cost against batch size and depth instead')
    parser.add_argument('--profile', action='store_true', help='print where the time goes instead')
    args = parser.parse_args()
    torch.set_num_threads(1)
    _RESULTS.mkdir(exist_ok=True)
    if args.plot:
        plot(args.rounds)
        return
    known = {pair.name: pair for pair in all_pairs(args.batch, args.size)}
    names = args.pairs or (['quickstart', 'resnet32x4-resnet8x4'] if args.compile else list(known))
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f'{unknown[0]!r} is no pair; there are {", ".join(known)}')
    if 'a' not in args.ways or not set(args.ways) <= set(WAYS):
        parser.error(f'--ways must be some of {"".join(WAYS)}, a among them, got {args.ways!r}')
    if args.profile:
        for name in names:
            profile(known[name], args.rounds)
        return
    results = []
    for name in names:
        results.append(measure(known[name], args.rounds, args.ways, 'inductor' if args.compile else None))
        print('\n'.join(_rows(results[-1])), flush=True)
        text = table(results, args.rounds, 'compiled with inductor' if args.compile else 'eager')
        if not args.pairs:
            # After each pair: a table of some of them is better than none.
            (_RESULTS / ('step-compiled.md' if args.compile else 'step.md')).write_text(text, encoding='utf-8')
    print(text)


if __name__ == '__main__':
    main()
