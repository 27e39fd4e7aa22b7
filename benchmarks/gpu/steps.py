"""A row of the table: one way of taking a step on one pair, timed, counted and profiled on the device."""
from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.task import ClassificationTask, TrainingTask
from torch import nn

from timm_dfpt.teacher.blocks import FusionBlock, PromptBlock

from ..measure import count_flops, spread
from ..ways import Floor, Pair, Steps, count_floor, create_optimizers
from .machine import computing, timed

__all__ = ['ARMS', 'PAIRS', 'Row', 'failure', 'measure', 'prepare']

# By worth; the letters are ways of `benchmarks.ways`.
ARMS = {'timm kd': 'a', 'kd': 'b', 'dfpt': 'd', 'dfpt+': 'e', 'frozen path': 'f', 'scratch': ''}
PAIRS = {
    'resnet50 -> resnet18': ('resnet50', 'resnet18'),
    'vit_base -> vit_tiny': ('vit_base_patch16_224', 'vit_tiny_patch16_224'),
    'convnext_base -> convnext_atto': ('convnext_base', 'convnext_atto'),
    'swin_base -> mobilenetv3': ('swin_base_patch4_window7_224', 'mobilenetv3_large_100'),
}
# The same kinds for a dry run.
_TINY: dict[str, dict[str, Any]] = {
    'resnet50': {'layers': (1, 1, 1, 1), 'channels': (8, 8, 16, 16)},
    'resnet18': {'layers': (1, 1, 1, 1), 'channels': (8, 8, 8, 8)},
    'vit_base_patch16_224': {'img_size': 32, 'embed_dim': 32, 'depth': 4, 'num_heads': 2, 'patch_size': 8},
    'vit_tiny_patch16_224': {'img_size': 32, 'embed_dim': 16, 'depth': 2, 'num_heads': 2, 'patch_size': 8},
    'convnext_base': {'depths': (1, 1, 1, 1), 'dims': (8, 8, 16, 16)},
    'convnext_atto': {'depths': (1, 1, 1, 1), 'dims': (8, 8, 8, 8)},
    'swin_base_patch4_window7_224': {
        'img_size': 32, 'embed_dim': 8, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 2, 2), 'window_size': 2,
    },
    'mobilenetv3_large_100': {},
}  # fmt: skip
_BLOCK, _BACKWARD = 'a prompt block', 'autograd::engine'


@dataclasses.dataclass(frozen=True)
class Row:
    """What to measure.

    Args:
        pair: Key of `PAIRS`.
        arm: Key of `ARMS`.
        batch: Images per step.
        precision: `bf16`, `tf32` or `fp32`.
        mode: `eager`, or the mode of the compiler.
        channels_last: Memory format of images and weights.
    """

    pair: str
    arm: str
    batch: int = 64
    precision: str = 'bf16'
    mode: str = 'eager'
    channels_last: bool = False

    def __str__(self) -> str:
        layout = ', channels_last' if self.channels_last else ''
        return f'{self.pair}, {self.arm}, {self.batch} images, {self.precision}, {self.mode}{layout}'


@functools.lru_cache(maxsize=1)
def _networks(pair: str, tiny: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher, student = (timm.create_model(name, **(_TINY[name] if tiny else {})) for name in PAIRS[pair])
    return teacher, student


@functools.lru_cache(maxsize=1)
def _floor_of_two(pair: str, tiny: bool) -> Floor:
    # BatchNorm in training wants more than one image.
    return count_floor(_pair(pair, 2, tiny, torch.device('cpu')))


def _pair(pair: str, batch: int, tiny: bool, device: torch.device) -> Pair:
    # Made once for all arms: drawing the weights of a large network takes seconds.
    teacher, student = _networks(pair, tiny)
    size = 32 if tiny else 224
    return Pair(
        pair,
        lambda: copy.deepcopy(teacher).to(device),
        lambda: copy.deepcopy(student).to(device),
        (batch, 3, size, size),
    )


def _floor(row: Row, tiny: bool) -> int:
    """Return the FLOPs that the arm cannot do without."""
    two = _floor_of_two(row.pair, tiny)
    teacher, prefix, blocks, student = two.teacher, two.prefix, two.blocks, 3 * two.student
    demanded = {
        'scratch': student,
        'timm kd': two.kd,
        'kd': two.kd,
        'dfpt': two.dfpt,
        # The copy of the backbone is trained, and the first block has weights before it.
        'dfpt+': teacher + 3 * teacher + 3 * blocks + student,
        'frozen path': teacher + teacher - prefix + blocks + student,
    }
    return row.batch * demanded[row.arm] // 2


class Step:
    """A step of a row, ready to be taken.

    Args:
        row: What to take.
        device: Where.
        tiny: With tiny networks.
    """

    def __init__(self, row: Row, device: torch.device, tiny: bool) -> None:
        self.row, self.device = row, device
        pair = _pair(row.pair, row.batch, tiny, device)
        way = ARMS[row.arm]
        self.task: TrainingTask
        if way:
            self.task = Steps(pair, (way,)).tasks[way]
        else:
            self.task = ClassificationTask(pair.student(), verbose=False)
        self.task.to(device)
        self.task.train()
        if row.channels_last:
            self.task.to(memory_format=torch.channels_last)
        self.optimizers = create_optimizers(self.task)
        generator = torch.Generator().manual_seed(0)
        self.input = torch.randn(pair.shape, generator=generator).to(device)
        if row.channels_last:
            self.input = self.input.contiguous(memory_format=torch.channels_last)
        self.target = torch.randint(1000, pair.shape[:1], generator=generator).to(device)

    def compile(self) -> None:
        """Compile what the task compiles."""
        mode = None if self.row.mode == 'default' else self.row.mode
        self.task.compile(mode=mode)

    def __call__(self) -> None:
        """Take the step."""
        with computing(self.device, self.row.precision):
            loss = self.task(self.input, self.target)['loss']
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def prepare(row: Row, device: torch.device, tiny: bool) -> tuple[Step, dict[str, Any]]:
    """Make the step of a row, count its FLOPs, compile it, and take it for the first time.

    Returns:
        The step, and what was found on the way: `floor`, `flops`, `build_s`, `first_step_s`.
    """
    found: dict[str, Any] = {'floor': _floor(row, tiny)}
    start = time.perf_counter()
    step = Step(row, device, tiny)
    found['build_s'] = time.perf_counter() - start
    # Before it is compiled, since compiled code cannot be counted.
    found['flops'] = count_flops(step)
    if row.mode != 'eager':
        step.compile()
    start = time.perf_counter()
    step()
    _wait(device)
    found['first_step_s'] = time.perf_counter() - start
    return step, found


def measure(row: Row, device: torch.device, tiny: bool, ceiling: float) -> dict[str, Any]:
    """Measure a row.

    Args:
        row: What to measure.
        device: Where.
        tiny: With tiny networks, for a dry run.
        ceiling: FLOP/s of a large matrix product in the row's precision.

    Returns:
        The row with `ms` (median, `ms_low` and `ms_high` quartiles), `images_per_s`, `flops`, `floor`,
        `share_of_ceiling`, `peak_mib`, and what the profiler sees; `failed` where memory did not suffice.
    """
    found: dict[str, Any] = dataclasses.asdict(row)
    step: Step | None = None
    try:
        step, more = prepare(row, device, tiny)
        found |= more
        for _ in range(2 if tiny else 5):
            step()
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(device)
        least, most = (2, 3) if tiny else (10, 60)
        ms, low, high = spread(timed(step, device, least=least, most=most))
        found |= {'ms': ms, 'ms_low': low, 'ms_high': high, 'images_per_s': 1000 * row.batch / ms}
        found['share_of_ceiling'] = found['flops'] / (ms / 1000) / ceiling
        if device.type == 'cuda':
            found['peak_mib'] = torch.cuda.max_memory_allocated(device) / 2**20
        found |= _profile(step, ms)
    except Exception as error:
        # A table with a hole is better than none.
        found['failed'] = failure(error)
    finally:
        del step
        if row.mode != 'eager':
            torch._dynamo.reset()
        gc.collect()
        if device.type == 'cuda':
            torch.cuda.empty_cache()
    return found


def failure(error: Exception) -> str:
    """Say in a line why a row failed, and print where unless memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError):
        return f'out of memory: {str(error).splitlines()[0][:200]}'
    traceback.print_exception(error)
    return f'{type(error).__name__}: {str(error)[:300]}'


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _profile(step: Step, ms: float) -> dict[str, Any]:
    """Return kernels per step, their time, the share of it in the blocks, and the share of the step without any."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if step.device.type == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with _marked_blocks(step), torch.profiler.profile(activities=activities) as profiler:
        step()
        _wait(step.device)
    events = profiler.events() or []
    device_type: Any = torch.autograd.DeviceType
    kernels = [e for e in events if e.device_type == device_type.CUDA and not getattr(e, 'is_user_annotation', False)]
    found: dict[str, Any] = {}
    if kernels:
        busy = _covered((e.time_range.start, e.time_range.end) for e in kernels) / 1000
        found = {'kernels': len(kernels), 'kernel_ms': busy, 'outside_kernels': max(0.0, 1 - busy / ms)}
    if step.row.mode == 'eager':
        own, total = _block_time(events, on_device=bool(kernels))
        found['blocks_share'] = own / total if total else None
    return found


def _covered(spans: Iterator[tuple[float, float]]) -> float:
    """Return the length of the union of spans."""
    total, end = 0.0, float('-inf')
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


@contextmanager
def _marked_blocks(step: Step) -> Iterator[None]:
    """Name the blocks in the profile."""
    teacher: Any = getattr(step.task, 'teacher', None)
    path = getattr(teacher, 'prompt_path', None)
    modules = path.modules() if isinstance(path, nn.Module) and step.row.mode == 'eager' else ()
    blocks = [module for module in modules if isinstance(module, (PromptBlock, FusionBlock))]
    for block in blocks:
        block.forward = _recorded(block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _recorded(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(_BLOCK):
            return forward(*args, **kwargs)

    return call


def _block_time(events: Any, on_device: bool) -> tuple[float, float]:
    """Return the time in the blocks (both passes) and in all: of kernels by the operator that launched them."""
    own: dict[int, bool] = {}
    numbers: set[int] = set()

    def inside(event: Any) -> bool:
        if id(event) not in own:
            backward = event.name.startswith(_BACKWARD) and event.sequence_nr in numbers
            parent = event.cpu_parent
            own[id(event)] = event.name == _BLOCK or backward or (parent is not None and inside(parent))
        return own[id(event)]

    cpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    # What the backward calls has the numbers of what the forward called.
    numbers |= {event.sequence_nr for event in cpu if event.sequence_nr >= 0 and inside(event)}
    own.clear()
    totals = [0.0, 0.0]
    for event in cpu:
        spent = sum(kernel.duration for kernel in event.kernels) if on_device else event.self_cpu_time_total
        totals[1] += spent
        totals[0] += spent if inside(event) else 0
    return totals[0], totals[1]
