"""Networks, batches and tasks for the tests of tests/gpu: real ones on a GPU, tiny ones on the CPU."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from timm.task import TrainingTask
from torch import nn

import timm_dfpt
from timm_dfpt.tasks import METHODS

CLASSES = 10
FAMILIES = ('resnet', 'vit', 'convnext', 'swin')
_REAL = {
    'resnet': ('resnet50', {}),
    'vit': ('vit_small_patch16_224', {}),
    'convnext': ('convnext_tiny', {}),
    'swin': ('swin_tiny_patch4_window7_224', {}),
}
_TINY: dict[str, tuple[str, dict[str, Any]]] = {
    'resnet': ('resnet18', {'layers': [1, 1, 1, 1], 'channels': [8, 8, 16, 16]}),
    'vit': ('test_vit', {'embed_dim': 32, 'depth': 4, 'num_heads': 2, 'patch_size': 8}),
    'convnext': ('convnext_atto', {'depths': (1, 1, 1, 1), 'dims': (8, 8, 16, 16)}),
    'swin': (
        'swin_tiny_patch4_window7_224',
        {'embed_dim': 8, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 2, 2), 'window_size': 2},
    ),
}
PRECISIONS = ('float32', 'tf32', 'bf16', 'fp16')
_HALF = {'bf16': torch.bfloat16, 'fp16': torch.float16}


def skip_tf32_on_cpu(device: torch.device, precision: str) -> None:
    if precision == 'tf32' and device.type != 'cuda':
        pytest.skip('the CPU has no tf32')


@contextlib.contextmanager
def computing(device: torch.device, precision: str) -> Iterator[None]:
    """Compute in float32, float32 with tf32 products, or under autocast in bf16 or fp16."""
    tf32 = precision == 'tf32'
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision('high' if tf32 else 'highest')
    half = _HALF.get(precision)
    with torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=half is not None):
        yield


def image_size(device: torch.device) -> int:
    return 224 if device.type == 'cuda' else 32


def make_model(family: str, device: torch.device, seed: int = 0, size: int | None = None) -> nn.Module:
    """Make a teacher with random weights, drawn on the CPU whatever the device; `size` asks for the tiny network."""
    torch.manual_seed(seed)
    tiny = device.type == 'cpu' or size is not None
    name, kwargs = (_TINY if tiny else _REAL)[family]
    if family in ('vit', 'swin'):
        kwargs = {**kwargs, 'img_size': size or image_size(device)}
    return timm.create_model(name, num_classes=CLASSES, **kwargs).to(device)


def make_student(device: torch.device, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    name, kwargs = _TINY['resnet']
    return timm.create_model(name, num_classes=CLASSES, **kwargs).to(device)


def make_batch(
    device: torch.device, batch: int = 4, size: int | None = None, seed: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make images `[B, 3, H, W]` and labels `[B]`."""
    generator = torch.Generator().manual_seed(seed)
    size = size or image_size(device)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images.to(device), torch.randint(CLASSES, (batch,), generator=generator).to(device)


def stir(teacher: timm_dfpt.DualForwardPathTeacher, seed: int = 3) -> None:
    """Move blocks away from their start at zero, which would hide a wrong gradient."""
    generator = torch.Generator().manual_seed(seed)
    for module in (teacher.prompt_path.blocks, teacher.prompt_path.fusions):
        for param in module.parameters():
            noise = torch.randn(param.shape, generator=generator).to(param)
            param.data.add_(noise, alpha=0.05)


def make_task(method: str, device: torch.device, family: str = 'resnet', size: int | None = None) -> TrainingTask:
    """Make the task of a method that has a teacher on the device, in training mode."""
    cpu = torch.device('cpu')
    size = size or image_size(device)
    teacher = make_model(family, cpu, size=size) if device.type == 'cpu' else make_model(family, device, size=size)
    student = make_student(device)
    config = {'input_size': (3, size, size), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}
    common: dict[str, Any] = {'device': device, 'verbose': False}
    common |= {'input_config': config, 'teacher_input_config': config}
    row = METHODS[method]
    if row.variant is not None:
        teacher = timm_dfpt.wrap(teacher, variant=row.variant)
        stir(teacher)
    elif row.kd_loss is not None:
        common |= {'kd_loss': row.kd_loss, 'temperature': 4.0}
    task = row.task(student, teacher, **common)
    task.to(device)
    task.get_trainable_module().train()
    return task


def trained(task: TrainingTask) -> dict[str, nn.Parameter]:
    """Return what the task trains, by name."""
    return {name: p for name, p in task.get_trainable_module().named_parameters() if p.requires_grad}


def gradients(task: TrainingTask) -> dict[str, torch.Tensor]:
    """Return the gradients of what the task trains, in float64 on the CPU."""
    return {name: p.grad.detach().cpu().double() for name, p in trained(task).items() if p.grad is not None}


def distance(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference over the norm of the reference, all tensors as one vector."""
    assert ours.keys() == reference.keys()
    difference = sum(float((ours[name] - reference[name]).square().sum()) for name in reference)
    return (difference / sum(float(value.square().sum()) for value in reference.values())) ** 0.5
