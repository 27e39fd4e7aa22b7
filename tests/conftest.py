"""One thread a test process: pytest-xdist runs one process a core, and more threads would only fight."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')

from collections.abc import Callable, Iterator  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

torch.set_num_threads(1)


def _forget() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[Callable[[], None]]:
    """What accelerate keeps for as long as a process lives would be that of the job, or of the file, before."""
    _forget()
    yield _forget
    _forget()
