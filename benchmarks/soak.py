"""The default job again and again in one process: does it grow, or leave anything behind?

    python -m benchmarks.soak --minutes 20
    python -m benchmarks.soak --minutes 5 -- --epochs 1 --batch-size 1000

Each run goes to a folder that is removed after it. What is left of a run in the process is measured: resident memory,
open files, child processes, threads, and what lies in the folder for temporary files. Prints a line per run, and at the
end the slope of the memory over the runs after the first two, by least squares.
"""
from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from accelerate.state import AcceleratorState, GradientState

from timm_dfpt.training.run import main as distill

WARM_UP = 2


def left_behind(temporary: Path) -> dict[str, float]:
    """Measure what this process holds (Linux): memory in MiB, and numbers of things."""
    status = Path('/proc/self/status').read_text(encoding='ascii')
    resident = next(line for line in status.splitlines() if line.startswith('VmRSS'))
    children = Path(f'/proc/self/task/{os.getpid()}/children').read_text(encoding='ascii').split()
    return {
        'memory': int(resident.split()[1]) / 1024,
        'files': len(os.listdir('/proc/self/fd')),
        'children': len(children),
        'threads': threading.active_count(),
        'temporary': sum(1 for _ in temporary.rglob('*')),
    }


def soak(minutes: float, runs: int, arguments: list[str]) -> list[dict[str, float]]:
    """Run the job until the time is up.

    Args:
        minutes: How long; the run that is going on then is the last.
        runs: Go on until there are as many runs, however long that takes.
        arguments: Arguments of the job, without `--output`.

    Returns:
        What was left behind after each run.

    Raises:
        RuntimeError: If a run failed.
    """
    measured: list[dict[str, float]] = []
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as root:
        temporary = Path(root, 'temporary')
        temporary.mkdir()
        tempfile.tempdir = str(temporary)
        while time.monotonic() < end or len(measured) < runs:
            start = time.monotonic()
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = distill(['--output', str(Path(root, 'run')), *arguments])
            if code != 0:
                raise RuntimeError(f'the job ended with {code}:\n{said.getvalue()[-2000:]}')
            shutil.rmtree(Path(root, 'run'))
            # What a process that runs one job leaves to its end.
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            gc.collect()
            now = left_behind(temporary)
            measured.append(now)
            shown = ', '.join(f'{key} {value:.0f}' for key, value in now.items())
            print(f'run {len(measured)} ({time.monotonic() - start:.0f} s): {shown}', flush=True)
        tempfile.tempdir = None
    return measured


def main() -> int:
    """Run the soak test from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=20.0, help='how long (default: 20)')
    parser.add_argument('--runs', type=int, default=WARM_UP + 3, help='at least as many (default: %(default)s)')
    parser.add_argument('arguments', nargs='*', metavar='ARGUMENT', help='arguments of the job, after --')
    args = parser.parse_args()
    measured = soak(args.minutes, args.runs, args.arguments)
    steady = measured[WARM_UP:]
    if len(steady) < 3:
        print(f'{len(measured)} runs are too few for a slope: give more --runs.')
        return 1
    slope = np.polyfit(range(len(steady)), [each['memory'] for each in steady], 1)[0]
    first, last = steady[0], steady[-1]
    print(f'{len(measured)} runs; memory: {slope:+.2f} MiB a run, {first["memory"]:.0f} to {last["memory"]:.0f} MiB')
    grown = [key for key in ('files', 'children', 'threads', 'temporary') if last[key] > first[key]]
    print(f'left behind: {", ".join(grown) or "no file handle, process, thread or temporary file"}')
    return 1 if grown else 0


if __name__ == '__main__':
    sys.exit(main())
