"""The ways of taking a training step that are compared, pairs of teacher and student, and the floor of the FLOPs."""
from __future__ import annotations

import copy
import dataclasses
import itertools
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
from timm_dfpt.losses import DFPTWeights
from timm_dfpt.tasks.base import StudentTask
from timm_dfpt.tasks.baselines import LogitLossTask
from timm_dfpt.tasks.dfpt import DFPTDistillationTask

from .measure import PeakMemory, count_flops, saved_bytes

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / 'results'
_INPUT: dict[str, Any] = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}

WAYS = {
    'a': "timm's LogitDistillationTask",
    'b': 'our kd (LogitLossTask)',
    'c': 'DFPT-KD, two plain forwards',
    'd': 'DFPT-KD',
    'e': 'DFPT-KD+',
    'f': 'DFPT-KD, path frozen',
    'g': 'DFPT-KD, a = c = 0',
    'h': 'DFPT-KD, a = c = 0, path frozen',
    'i': 'DFPT-KD+, a = c = 0',
    'j': 'DFPT-KD+, a = c = 0, path frozen',
    'k': 'DFPT-KD, a = c = 0, path frozen, its logits kept',
    'l': 'norms of its own and head, a = c = 0',
    'm': 'norms of its own, blocks and head, a = c = 0',
    'n': 'DFPT-KD+ with norms of its own, without blocks, a = c = 0',
    'o': 'the same, path frozen',
}
USUAL = 'abcde'
"""Ways of a run at whose end the path is still tuned, with the default weights."""
_PLUS, _ALONE, _FROZEN, _OWN_NORMS, _BARE = 'eijno', 'ghijklmno', 'fhjko', 'lmno', 'lno'


@dataclasses.dataclass(frozen=True)
class Pair:
    """Teacher, student and a batch.

    Args:
        name: For tables and the command line.
        teacher: Makes the teacher.
        student: Makes the student.
        shape: Of the batch `[B, C, H, W]`.
        stages: After which modules a path has blocks; `None` for the usual ones.
    """

    name: str
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    stages: Sequence[str] | None = None


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
    recipe = yaml.safe_load((ROOT / 'train/recipes/quickstart.yaml').read_text(encoding='utf-8'))
    teacher = f'local-dir:{ROOT / "train/quickstart/teacher"}'
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

    def __init__(self, pair: Pair, ways: Sequence[str] = USUAL, compile_backend: str | None = None) -> None:
        torch.manual_seed(0)
        self.pair = pair
        self.teacher, self.student = pair.teacher(), pair.student()
        self.input = torch.randn(pair.shape)
        num_classes: Any = self.teacher.num_classes
        self.target = torch.randint(num_classes, pair.shape[:1])
        self.kept = torch.randn(pair.shape[0], num_classes)
        self.tasks = {way: self._create(way) for way in ways}
        self.optimizers = {way: create_optimizers(task) for way, task in self.tasks.items()}
        for task in self.tasks.values():
            task.train()
            if compile_backend:
                # An error rather than a measurement of half-compiled paths.
                task.compile(backend=compile_backend, fullgraph=isinstance(task, StudentTask))

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
            return LogitLossTask(student, teacher, input_config=config, teacher_input_config=config, verbose=False)
        parts: dict[str, Any] = {'block': False, 'fusion': 'none'} if way in _BARE else {}
        prompt = timm_dfpt.PromptConfig(norms='own' if way in _OWN_NORMS else 'teacher', **parts)
        variant: Any = 'dfpt+' if way in _PLUS else 'dfpt'
        wrapped = timm_dfpt.wrap(teacher, stages=self.pair.stages, variant=variant, prompt=prompt)
        if way == 'c':
            wrapped.stop_sharing_prefix()
        return DFPTDistillationTask(
            student,
            wrapped,
            weights=DFPTWeights(prompt_teacher=0, student_teacher=0, student_prompt=2) if way in _ALONE else None,
            prompt_epochs=0 if way in _FROZEN else None,
            input_config=config,
            teacher_input_config=config,
            verbose=False,
        )

    def forward(self, way: str) -> dict[str, torch.Tensor]:
        """Run the forward of a step."""
        known = {'prompt_logits': self.kept} if way == 'k' else {}
        return self.tasks[way](self.input, self.target, **known)

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
        if params:
            optimizers.append(torch.optim.AdamW(params, 1e-5, fused=fused))
    return optimizers


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
    teacher = timm_dfpt.wrap(pair.teacher(), stages=pair.stages)
    model = teacher.model
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
