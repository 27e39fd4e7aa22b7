"""What `import timm_dfpt` costs beyond `import timm`: CPU time, in fresh processes.

    python -m benchmarks.import_time --rounds 9
"""
from __future__ import annotations

import argparse
import compileall
import subprocess
import sys
from pathlib import Path

import timm_dfpt

from .measure import spread

_HEAVY = ('accelerate', 'datasets', 'matplotlib', 'transformers')
# One after the other in the same process: two processes differ by more than what is to be found.
_PROGRAM = """
import time
start = time.process_time()
import timm
between = time.process_time()
import timm_dfpt
print(between - start, time.process_time() - between)
"""


def measure() -> tuple[float, float]:
    """Return CPU seconds of `import timm`, and of `import timm_dfpt` after it, in a new process."""
    output = subprocess.run([sys.executable, '-c', _PROGRAM], capture_output=True, text=True, check=True).stdout
    timm, own = map(float, output.split())
    return timm, own


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=7)
    rounds = parser.parse_args().rounds
    # As pip does when it installs, and as Python does at the first import, except where that is switched off.
    compileall.compile_dir(Path(timm_dfpt.__file__).parent, quiet=1)
    measure()  # warms the disk's cache
    seconds = [measure() for _ in range(rounds)]
    print('| import | CPU ms (quartiles) |\n|---|---:|')
    for name, values in zip(('timm', 'timm_dfpt after it'), zip(*seconds, strict=True), strict=True):
        middle, low, high = (1000 * value for value in spread(values))
        print(f'| {name} | {middle:.0f} ({low:.0f}-{high:.0f}) |')
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
