"""One thread a test process: pytest-xdist runs one process a core, and more threads would only fight."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')

import torch  # noqa: E402

torch.set_num_threads(1)
