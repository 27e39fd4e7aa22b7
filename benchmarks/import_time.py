"""What `import timm_dfpt` costs beyond `import timm`: CPU time of fresh processes, in turn.

    python -m benchmarks.import_time --rounds 9
"""
from __future__ import annotations

import argparse
import subprocess
import sys

from .measure import spread

_HEAVY = ('accelerate', 'datasets', 'matplotlib', 'transformers')
# The process tells its own CPU time: that of the interpreter's start and end is the same for both.
_PROGRAM = 'import time; start = time.process_time(); import {name}; print(time.process_time() - start)'


def measure(name: str) -> float:
    """Return CPU seconds of `import name` in a new process."""
    program = _PROGRAM.format(name=name)
    return float(subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=7)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {'timm': [], 'timm_dfpt': []}
    for turn in range(-1, rounds):
        for name, values in seconds.items():
            value = measure(name)
            if turn >= 0:  # the first round writes byte code and warms the disk's cache
                values.append(value)
    print('| import | CPU ms (quartiles) |\n|---|---:|')
    for name, values in seconds.items():
        middle, low, high = (1000 * value for value in spread(values))
        print(f'| {name} | {middle:.0f} ({low:.0f}-{high:.0f}) |')
    extra, low, high = (
        1000 * value for value in spread([b - a for a, b in zip(seconds['timm'], seconds['timm_dfpt'], strict=True)])
    )
    print(f'| difference | {extra:.0f} ({low:.0f}-{high:.0f}) |')
    program = f'import sys, timm_dfpt; print([m for m in {_HEAVY} if m in sys.modules])'
    loaded = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True).stdout
    print(f'\nOf {", ".join(_HEAVY)} it imports: {loaded.strip()}')
    program = (
        'import time, torch, timm, timm_dfpt; torch.set_num_threads(1); m = timm.create_model("resnet50");'
        'start = time.process_time(); timm_dfpt.wrap(m); print(time.process_time() - start)'
    )
    wraps = []
    for _ in range(3):
        wraps.append(float(subprocess.run([sys.executable, '-c', program], capture_output=True, text=True).stdout))
    print(f'\n`wrap(resnet50)`, calibration included: {spread(wraps)[0]:.2f} CPU s, 1 thread')


if __name__ == '__main__':
    main()
