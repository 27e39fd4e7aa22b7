"""Tests of what a GPU changes; without one they run on the CPU with tiny networks. See CONTRIBUTING.md."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope='session')
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of `--gpu-device`; by default the GPU where there is one."""
    named: str | None = request.config.getoption('--gpu-device')
    if named is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if torch.device(named).type == 'cuda' and not torch.cuda.is_available():
        raise pytest.UsageError(f'--gpu-device {named}: there is no GPU; leave it out or say --gpu-device cpu.')
    return torch.device(named)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The device, for tests of what only a GPU has."""
    if device.type != 'cuda':
        pytest.skip('the CPU has no tf32, no CUDA graphs, and nothing that waits for a device')
    return device


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Deterministic convolutions and float32 without tf32, unless a test says otherwise."""
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = True, False, False
    torch.set_float32_matmul_precision('highest')
    yield
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = before
    torch.set_float32_matmul_precision(precision)
