"""Steps of the tasks on the device, against float64 on the CPU, against timm, and against the device's patience."""
from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_cases import computing, distance, gradients, make_batch, make_task, trained
from timm.task import LogitDistillationTask, TrainingTask

import timm_dfpt
from timm_dfpt.tasks import METHODS

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
SIZE = 32
# Relative to the whole gradient of a float64 step.
GRADIENT = {'float32': 1e-4, 'bf16': 0.2, 'fp16': 0.05}
LOSS = {'float32': 1e-5, 'bf16': 3e-2, 'fp16': 5e-3}
WITH_TEACHER = tuple(name for name, method in METHODS.items() if method.needs_teacher)


def optimizers_of(task: TrainingTask, **options: Any) -> list[torch.optim.Optimizer]:
    """SGD for the student and AdamW for the rest, as in a run."""
    params = trained(task)
    prompt = [p for name, p in params.items() if name.startswith('prompt_path.')]
    student = [p for name, p in params.items() if not name.startswith('prompt_path.')]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(student, 0.01, momentum=0.9, **options)]
    return [*optimizers, torch.optim.AdamW(prompt, 1e-3, **options)] if prompt else optimizers


def step(
    task: TrainingTask,
    optimizers: list[torch.optim.Optimizer],
    x: torch.Tensor,
    y: torch.Tensor,
    precision: str = 'float32',
) -> torch.Tensor:
    # Around the forward alone: autocast keeps its copies of the weights until it is left.
    with computing(x.device, precision):
        loss = task(x, y)['loss']
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize('precision', GRADIENT)
@pytest.mark.parametrize(
    ('method', 'family'),
    [('dfpt', 'resnet'), ('dfpt+', 'resnet'), ('dfpt', 'vit'), ('dfpt', 'convnext'), ('dfpt', 'swin')],
)
def test_a_step_is_that_of_float64_on_the_cpu(method: str, family: str, precision: str, device: torch.device) -> None:
    reference = make_task(method, torch.device('cpu'), family, SIZE).to(torch.float64)
    task = make_task(method, device, family, SIZE)
    x, y = make_batch(torch.device('cpu'), batch=8, size=SIZE)
    expected = reference(x.double(), y)
    expected['loss'].backward()
    with computing(device, precision):
        result = task(x.to(device), y.to(device))
    result['loss'].backward()
    assert float(result['loss'].detach()) == pytest.approx(float(expected['loss'].detach()), rel=LOSS[precision])
    assert distance(gradients(task), gradients(reference)) < GRADIENT[precision]


def test_plain_distillation_is_timms(device: torch.device) -> None:
    task: Any = make_task('kd', device, size=SIZE)
    timms = LogitDistillationTask(
        copy.deepcopy(task.get_eval_model()), task.teacher.model, temperature=4.0, device=device, verbose=False
    )
    timms.to(device)
    timms.get_trainable_module().train()
    x, y = make_batch(device, batch=8, size=SIZE)
    results = [each(x, y) for each in (task, timms)]
    for result in results:
        result['loss'].backward()
    assert float(results[0]['loss'].detach()) == pytest.approx(float(results[1]['loss'].detach()), rel=1e-6)
    assert distance(gradients(task), gradients(timms)) < 1e-6


def test_before_training_the_student_learns_what_plain_distillation_teaches(device: torch.device) -> None:
    """Both paths say the same then, so that the student's gradient is that of timm's task with the weight c + d."""
    task: Any = make_task('dfpt', device, size=SIZE)
    teacher = timm_dfpt.wrap(task.teacher.unwrap())
    student = task.get_eval_model()
    config = {'input_size': (3, SIZE, SIZE), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}
    dual = timm_dfpt.DFPTDistillationTask(
        student, teacher, input_config=config, teacher_input_config=config, device=device, verbose=False
    )
    x, y = make_batch(device, batch=8, size=SIZE)
    grads = []
    for variant in ('dual', 'timm'):
        student.zero_grad()
        if variant == 'dual':
            dual(x, y)['loss'].backward()
        else:
            model = teacher.unwrap()
            model.eval().requires_grad_(False).pretrained_cfg = student.pretrained_cfg
            kd = LogitDistillationTask(
                student, model, temperature=4.0, task_loss_weight=1.0, distill_loss_weight=2.0, device=device,
                verbose=False,
            )  # fmt: skip
            kd.to(device)(x, y)['loss'].backward()
        grads.append({name: p.grad.cpu().double() for name, p in student.named_parameters()})
    assert distance(grads[0], grads[1]) < 1e-5


def test_a_gradient_scaler_skips_an_overflow_for_both_optimizers(device: torch.device) -> None:
    task = make_task('dfpt', device, size=SIZE)
    optimizers = optimizers_of(task)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, backoff_factor=2.0**-8)
    x, y = make_batch(device, batch=8, size=SIZE)
    before = {name: p.detach().clone() for name, p in trained(task).items()}
    scales, moved = [], []
    for _ in range(6):
        with computing(device, 'fp16'):
            loss = task(x, y)['loss']
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scales.append(scaler.get_scale())
        scaler.update()
        moved.append([name for name, p in trained(task).items() if not torch.equal(p, before[name])])
    assert moved[0] == []
    assert scaler.get_scale() < scales[0]
    assert any(name.startswith('student.') for name in moved[-1])
    assert any(name.startswith('prompt_path.') for name in moved[-1])
    assert all(p.isfinite().all() for p in trained(task).values())


@pytest.mark.parametrize('method', ['kd', 'dfpt'])
def test_channels_last_computes_the_same_and_blocks_stay_in_it(method: str, device: torch.device) -> None:
    plain, last = make_task(method, device, size=SIZE), make_task(method, device, size=SIZE)
    last.to(memory_format=torch.channels_last)
    seen: list[bool] = []
    if method == 'dfpt':
        teacher: Any = last.teacher

        def look(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            seen.extend(t.is_contiguous(memory_format=torch.channels_last) for t in (args[0], output))

        for block in (*teacher.prompt_path.blocks, *teacher.prompt_path.fusions):
            block.register_forward_hook(look)
    x, y = make_batch(device, batch=8, size=SIZE)
    expected = plain(x, y)['loss']
    loss = last(x.contiguous(memory_format=torch.channels_last), y)['loss']
    for each in (expected, loss):
        each.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert distance(gradients(last), gradients(plain)) < 1e-3
    assert all(seen)
    assert bool(seen) == (method == 'dfpt')


@pytest.mark.parametrize('options', [{'foreach': True}, {'fused': True}], ids=['foreach', 'fused'])
def test_optimizers_for_many_tensors_at_once_take_the_same_steps(
    options: dict[str, bool], device: torch.device
) -> None:
    x, y = make_batch(device, batch=8, size=SIZE)
    weights = []
    for each in ({'foreach': False}, options):
        task = make_task('dfpt', device, size=SIZE)
        optimizers = optimizers_of(task, **each)
        for _ in range(3):
            step(task, optimizers, x, y)
        weights.append({name: p.detach().cpu().double() for name, p in trained(task).items()})
    assert distance(weights[1], weights[0]) < 1e-5


@pytest.mark.parametrize('precision', ['float32', 'bf16'])
@pytest.mark.parametrize('method', WITH_TEACHER)
def test_no_step_waits_for_the_device(method: str, precision: str, gpu: torch.device) -> None:
    task = make_task(method, gpu, size=SIZE)
    optimizers = optimizers_of(task)
    x, y = make_batch(gpu, batch=8, size=SIZE)
    for turn in range(12):
        if turn == 2:
            torch.cuda.set_sync_debug_mode('error')
        step(task, optimizers, x, y, precision)


@pytest.fixture(autouse=True)
def _no_debug_mode_left(device: torch.device) -> Any:
    yield
    if device.type == 'cuda':
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('method', ['kd', 'dfpt', 'dfpt+'])
def test_memory_stays_level(method: str, device: torch.device) -> None:
    task = make_task(method, device, size=SIZE)
    optimizers = optimizers_of(task)
    x, y = make_batch(device, batch=8, size=SIZE)
    early, late = (20, 200) if device.type == 'cuda' else (3, 8)

    def held() -> int:
        gc.collect()
        if device.type == 'cuda':
            return torch.cuda.memory_allocated(device)
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    amounts = {}
    for turn in range(1, late + 1):
        step(task, optimizers, x, y)
        if turn in (early, late):
            amounts[turn] = held()
    assert amounts[late] <= amounts[early]


@pytest.mark.slow
@pytest.mark.parametrize('method', ['dfpt', 'dfpt+'])
def test_two_processes_take_the_step_of_one(method: str, device: torch.device, tmp_path: Path) -> None:
    """With gloo on one device, with NCCL where there are two GPUs; half a batch each."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(Path(__file__).parent), os.environ.get('PYTHONPATH'))))
    processes = []
    for rank in range(2):
        variables = {'RANK': str(rank), 'PYTHONPATH': path}
        script = [sys.executable, str(Path(__file__).with_name('two_ranks.py')), str(tmp_path), device.type, method]
        processes.append(subprocess.Popen(script, env={**os.environ, **variables}, cwd=ROOT))
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f'rank{rank}.pt') for rank in range(2)]
    task = make_task(method, device, size=SIZE)
    # Statistics of half a batch are others.
    task.get_trainable_module().eval()
    x, y = make_batch(device, batch=8, size=SIZE)
    task(x, y)['loss'].backward()
    for each in ranks:
        assert distance(each, gradients(task)) < 1e-5
