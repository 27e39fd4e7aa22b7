"""Compiled steps against eager ones: what inductor makes of both paths, and whether CUDA graphs take them."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_cases import computing, distance, gradients, make_batch, make_task, trained
from test_gpu_steps import optimizers_of, step

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SIZE = 32
COUNTERS = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    COUNTERS.clear()
    yield
    torch._dynamo.reset()


def compare(method: str, family: str, device: torch.device, precision: str, mode: str | None, steps: int = 4) -> None:
    """Compare the first gradient, and the losses of some steps, with those of the eager task."""
    plain, compiled = (make_task(method, device, family, SIZE) for _ in range(2))
    # Of C++ a compiler takes minutes; the graph is the same.
    backend = 'inductor' if device.type == 'cuda' else 'aot_eager'
    # A graph broken in two would be an error.
    compiled.compile(backend, mode, **({'fullgraph': True} if method.startswith('dfpt') else {}))
    x, y = make_batch(device, batch=8, size=SIZE)
    losses, grads = [], []
    for task in (plain, compiled):
        with computing(device, precision):
            task(x, y)['loss'].backward()
        grads.append({name.replace('_orig_mod.', ''): grad for name, grad in gradients(task).items()})
        for p in trained(task).values():
            p.grad = None
        optimizers = optimizers_of(task)
        losses.append([float(step(task, optimizers, x, y, precision)) for _ in range(steps)])
    assert COUNTERS['stats']['unique_graphs'] >= 1
    assert distance(grads[1], grads[0]) < (1e-3 if precision == 'float32' else 0.2)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if precision == 'float32' else 5e-2)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize(
    ('method', 'family', 'precision'),
    [
        ('dfpt', 'resnet', 'float32'),
        ('dfpt', 'vit', 'bf16'),
        ('dfpt+', 'resnet', 'float32'),
        ('kd', 'resnet', 'float32'),
    ],
)
def test_a_compiled_step_is_the_eager_one(method: str, family: str, precision: str, device: torch.device) -> None:
    compare(method, family, device, precision, None)


def test_tuned_kernels_take_the_eager_step(gpu: torch.device) -> None:
    compare('dfpt', 'resnet', gpu, 'float32', 'max-autotune-no-cudagraphs')


@pytest.mark.parametrize('family', ['resnet', 'vit'])
@pytest.mark.parametrize('method', ['dfpt', 'kd'])
def test_cuda_graphs_take_the_eager_steps(method: str, family: str, gpu: torch.device) -> None:
    compare(method, family, gpu, 'float32', 'reduce-overhead', steps=10)
    print(f'CUDA graphs left out: {COUNTERS["inductor"]["cudagraph_skips"]}')
    assert COUNTERS['inductor']['cudagraph_skips'] == 0


def test_the_whole_step_can_be_captured_in_a_cuda_graph(gpu: torch.device) -> None:
    """Without a compiler: forward, backward and optimizers recorded once and replayed on other images."""
    eager, captured = make_task('dfpt', gpu, size=SIZE), make_task('dfpt', gpu, size=SIZE)
    batches = [make_batch(gpu, batch=8, size=SIZE, seed=seed) for seed in range(8)]
    expected = optimizers_of(eager, foreach=True)
    losses = [float(step(eager, expected, x, y)) for x, y in batches]
    optimizers = optimizers_of(captured, foreach=True)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if 'capturable' in group:
                group['capturable'] = True
    x, y = (t.clone() for t in batches[0])
    found = []
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for images, labels in batches[:3]:
            x.copy_(images)
            y.copy_(labels)
            found.append(float(step(captured, optimizers, x, y)))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(captured, optimizers, x, y)
    for images, labels in batches[3:]:
        x.copy_(images)
        y.copy_(labels)
        graph.replay()
        found.append(float(loss))
    assert found == pytest.approx(losses, rel=1e-4)
