"""What a GPU is, and the most it does: facts for the record, and two ceilings that are measured first."""
from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch

__all__ = ['ceilings', 'clock', 'computing', 'facts', 'timed']

PRECISIONS = {'bf16': torch.bfloat16, 'tf32': torch.float32, 'fp32': torch.float32}
_QUERY = 'name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu'


def facts(device: torch.device) -> dict[str, Any]:
    """Return date, versions, processor, and of a GPU its name and memory."""
    known: dict[str, Any] = {
        'date': datetime.date.today().isoformat(),
        'device': platform.processor() or platform.machine(),
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'python': platform.python_version(),
        'torch': str(torch.__version__),
        'timm': timm.__version__,
    }
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        known |= {
            'device': properties.name,
            'memory_gib': round(properties.total_memory / 2**30, 1),
            'multiprocessors': properties.multi_processor_count,
            'cuda': torch.version.cuda,
            'cudnn': torch.backends.cudnn.version(),
            'idle': clock(),
        }
    return known


def clock() -> dict[str, str]:
    """Return what the driver says of clocks, power and temperature now; nothing where it cannot be asked."""
    command = ['nvidia-smi', f'--query-gpu={_QUERY}', '--format=csv,noheader']
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_QUERY.split(','), (value.strip() for value in answer.splitlines()[0].split(',')), strict=False))


@contextmanager
def computing(device: torch.device, precision: str) -> Iterator[None]:
    """Compute in `bf16` (autocast), or in float32 with products in `tf32` or `fp32`."""
    tf32 = precision != 'fp32'
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision('high' if tf32 else 'highest')
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == 'bf16'):
        yield


def timed(
    run: Callable[[], Any], device: torch.device, seconds: float = 1.5, least: int = 10, most: int = 60
) -> list[float]:
    """Run something again and again; return the milliseconds of each time, without a wait in between.

    Args:
        run: What to time; it has been warmed up.
        device: Where it runs.
        seconds: How long to go on, if that is no fewer times than `least` and no more than `most`.
        least: Fewest times.
        most: Most times.
    """
    start = time.perf_counter()
    run()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    once = time.perf_counter() - start
    count = min(most, max(least, int(seconds / max(once, 1e-6))))
    if device.type != 'cuda':
        marks = [time.perf_counter()]
        for _ in range(count):
            run()
            marks.append(time.perf_counter())
        return [1000 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def ceilings(device: torch.device, tiny: bool = False) -> dict[str, Any]:
    """Measure a large matrix product in each precision (FLOP/s), and a large copy (bytes/s, read and written)."""
    found: dict[str, Any] = {}
    for precision, dtype in PRECISIONS.items():
        size = 128 if tiny else 4096 if precision == 'fp32' else 8192
        # Random: products of zeros are faster.
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        with computing(device, precision), torch.autocast(device.type, enabled=False):
            for _ in range(3):
                a @ b
            milliseconds = sorted(timed(functools.partial(torch.matmul, a, b), device, 1.0))
        found[f'matmul_{precision}'] = 2 * size**3 / (milliseconds[len(milliseconds) // 2] / 1000)
    if device.type == 'cuda':
        found['clock_after_matmul'] = clock()
    source = torch.randn(2**18 if tiny else 2**29, device=device)
    target = torch.empty_like(source)
    milliseconds = sorted(timed(lambda: target.copy_(source), device, 0.5))
    found['copy'] = 2 * source.nbytes / (milliseconds[len(milliseconds) // 2] / 1000)
    return found
