"""The main job with deterministic algorithms, for tests that kill it; started by test_gpu_jobs.py."""
from __future__ import annotations

import os
import sys

# Before CUDA starts: what cuBLAS asks of those who want the same bits again.
os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'

import torch  # noqa: E402

from timm_dfpt.training.run import main  # noqa: E402

if __name__ == '__main__':
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    sys.exit(main(sys.argv[1:]))
