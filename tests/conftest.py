"""One thread per test process: pytest-xdist runs one process per core, and more threads would only fight."""
import atexit
import os
import shutil
import signal
import tempfile

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')

# Started in the background or by nohup, the tests and all that they start would ignore these.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The copies that `datasets` makes of what the tests make must not fill the user's cache.
if 'HF_DATASETS_CACHE' not in os.environ:
    os.environ['HF_DATASETS_CACHE'] = tempfile.mkdtemp(prefix='timm_dfpt-datasets-')
    atexit.register(shutil.rmtree, os.environ['HF_DATASETS_CACHE'], ignore_errors=True)

from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

# Else assertions in it would fail without the values.
pytest.register_assert_rewrite('tests.training.learner_steps')

from tests.tiny import default_job, make_accelerator, tiny  # noqa: E402, F401

torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
if os.environ.get('TEST_WITHOUT_ONEDNN'):
    # torch has no variable of its own for it; see .ci/kernels.
    torch.backends.mkldnn.set_flags(_enabled=False)


def _forget() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[Callable[[], None]]:
    """What accelerate keeps for as long as a process lives would be that of the job, or of the file, before."""
    _forget()
    yield _forget
    _forget()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the device of the tests in tests/gpu; here, since a conftest further down is read too late."""
    parser.addoption('--gpu-device', help='device of the tests in tests/gpu (default: cuda where there is a GPU)')


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` read tests/gpu alone: other files import what a machine with a GPU may not have."""
    elsewhere = collection_path.suffix == '.py' and collection_path.parent.name != 'gpu'
    return True if elsewhere and config.option.markexpr.startswith('gpu') else None
