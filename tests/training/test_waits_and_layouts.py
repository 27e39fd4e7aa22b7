"""A step asks the device for no number, and copies nothing into another memory layout."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

import timm_dfpt
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.tasks.base import StudentTask
from timm_dfpt.tasks.methods import METHODS
from timm_dfpt.training.build import create_task
from timm_dfpt.training.learner import Learner

SIZE, CLASSES = 32, 5
CONFIG = {'input_size': (3, SIZE, SIZE), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}
STUDENT: dict[str, Any] = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 8, 8], 'num_classes': CLASSES}
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    'resnet': ('resnet18', {'layers': [1, 1, 1, 1], 'channels': [8, 8, 16, 16]}),
    'convnext': ('convnext_atto', {'depths': (1, 1, 1, 1), 'dims': (8, 8, 16, 16)}),
    'efficientnet': ('test_efficientnet', {}),
    'swin': (
        'swin_tiny_patch4_window7_224',
        {
            'img_size': SIZE, 'patch_size': 2, 'embed_dim': 8, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 2, 2),
            'window_size': 2,
        },
    ),
    'vit': ('test_vit', {'img_size': SIZE, 'embed_dim': 32, 'depth': 4, 'num_heads': 2, 'patch_size': 8}),
}
# What makes the host wait for the device: numbers, and shapes that depend on them.
WAITS = {
    'aten::_local_scalar_dense', 'aten::is_nonzero', 'aten::equal', 'aten::nonzero', 'aten::masked_select',
    'aten::_unique2', 'aten::allclose',
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Notes operators, and of those that wait which tensors they wait for."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.waits = known, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in WAITS and id(args[0]) not in self.known:
            self.waits.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def make_learner(method: str, family: str = 'resnet', **options: Any) -> Learner:
    torch.manual_seed(0)
    config = TrainConfig(
        student='resnet18', dataset='unused', method=method, teacher=None if method == 'supervised' else 'unused',
        cpu=True, batch_size=8, epochs=4, **options,
    )  # fmt: skip
    student: Any = timm.create_model('resnet18', **STUDENT)
    name, kwargs = TEACHERS[family]
    teacher: Any = None
    if method != 'supervised':
        teacher = timm.create_model(name, num_classes=CLASSES, **kwargs)
        student.pretrained_cfg = teacher.pretrained_cfg = {**teacher.pretrained_cfg, **CONFIG}
        variant = METHODS[method].variant
        if variant is not None:
            prompt = timm_dfpt.PromptConfig(norms=config.prompt_norms or 'teacher')
            teacher = timm_dfpt.wrap(teacher, variant=variant, prompt=prompt)
    accelerator = Accelerator(cpu=True)
    task: StudentTask = create_task(config, student, teacher, CONFIG, accelerator)
    return Learner(method, config, task, accelerator, 10)


def batches(count: int, channels_last: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randn(8, 3, SIZE, SIZE, generator=generator)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        yield images, torch.randint(CLASSES, (8,), generator=generator)


def take_step(learner: Learner, images: torch.Tensor, labels: torch.Tensor, turn: int, epoch: int = 0) -> None:
    learner.train()
    learner.set_progress(epoch, turn)
    with learner.accelerator.accumulate(learner.module):
        learner.step(images, labels, turn)
    learner.update_average(turn + 1)


@pytest.mark.parametrize(
    ('method', 'options'),
    [
        *((method, {}) for method in METHODS),
        ('kd', {'distill_warmup_epochs': 3, 'clip_grad': 1.0, 'model_ema': True}),
        ('dfpt', {'prompt_epochs': '1', 'prompt_norms': 'own', 'clip_grad': 1.0, 'student_prompt_weight_end': 3.0}),
        ('dfpt+', {'prompt_epochs': '1', 'prompt_teacher_weight': 0.0, 'student_teacher_weight': 0.0}),
        ('kd', {'unlabelled': True}),
    ],
)  # fmt: skip
def test_no_step_waits_for_the_device(method: str, options: dict[str, Any]) -> None:
    """On the CPU: no number is read but the count of updates, which torch's optimizers keep on the host."""
    learner = make_learner(method, **options)
    # In the first step optimizers make their states; from the third on a prompt path with epochs of its own is frozen.
    for turn, (images, labels) in enumerate(batches(4)):
        states = [state for optimizer in learner.optimizers for state in optimizer.state.values()]
        counts = {id(state['step']) for state in states if 'step' in state}
        watch = Watch(counts)
        with watch:
            take_step(learner, images, labels, turn, epoch=turn // 2)
        assert turn == 0 or watch.waits == [], turn


@pytest.mark.parametrize('family', TEACHERS)
@pytest.mark.parametrize('method', ['dfpt', pytest.param('dfpt+', marks=pytest.mark.slow)])
def test_blocks_see_channels_last_from_input_to_gradient(method: str, family: str) -> None:
    """Of NCHW networks in channels_last, and of NHWC and tokens as they are: nothing is permuted by a copy."""
    learner = make_learner(method, family, channels_last=True)
    teacher: Any = learner.task.get_dual_teacher()
    found: dict[str, bool] = {}

    def look(name: str, tensor: torch.Tensor) -> None:
        # Of a slice of tokens, rows lie as in channels_last, with a gap between images.
        channel, row = tensor.stride(1), tensor.stride(3)
        found[name] = channel == 1 and row == tensor.shape[1]

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            for role, tensor in (('input', args[0]), ('output', output)):
                look(f'{name} {role}', tensor)
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad, role=role: look(f'{name} gradient of {role}', grad))

        return hook

    path = teacher.prompt_path
    for kind, modules in (('block', path.blocks), ('fusion', path.fusions)):
        for number, module in enumerate(modules):
            module.register_forward_hook(watch(f'{kind} {number}'))
    for turn, (images, labels) in enumerate(batches(2, channels_last=True)):
        take_step(learner, images, labels, turn)
    assert len(found) >= 6 * len(path.blocks)
    assert [name for name, is_last in found.items() if not is_last] == []
