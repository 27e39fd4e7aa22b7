"""A compiled step is the eager one, as one graph, for every method and whatever changes in the course of training."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_dfpt
from timm_dfpt.losses import DFPTWeights
from timm_dfpt.tasks.base import NoLabels, StudentTask
from timm_dfpt.tasks.methods import METHODS

pytestmark = pytest.mark.slow

SIZE, CLASSES, EPOCHS = 16, 5, 12
NETWORK: dict[str, Any] = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 8, 16], 'num_classes': CLASSES}
CONFIG = {'input_size': (3, SIZE, SIZE), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}
NO_TEACHER = DFPTWeights(prompt_teacher=0.0, student_teacher=0.0, student_prompt=2.0)
# Besides the methods: what the prompt path is made of, when it is frozen, and what the student learns from.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, {}, {'distill_warmup_epochs': 11}) for name in METHODS},
    'supervised': ('supervised', {}, {}),
    'dfpt': ('dfpt', {}, {'student_prompt_weight_end': 3.0}),
    'dfpt+': ('dfpt+', {}, {}),
    'freeze': ('dfpt', {}, {'prompt_epochs': 6}),
    'freeze+': ('dfpt+', {}, {'prompt_epochs': 6, 'weights': NO_TEACHER}),
    'own norms': ('dfpt', {'norms': 'own'}, {}),
    'own norms+': ('dfpt+', {'norms': 'own', 'block': False, 'fusion': 'none'}, {'weights': NO_TEACHER}),
    'unlabelled': ('kd', {}, {'criterion': NoLabels()}),
    'unlabelled dfpt': ('dfpt', {'norms': 'own'}, {'criterion': NoLabels(), 'prompt_epochs': 0}),
    'fitted': ('dfpt', {}, {'prompt_epochs': 6}),
}


def make_task(name: str) -> StudentTask:
    method, prompt, options = VARIANTS[name]
    row = METHODS[method]
    torch.manual_seed(0)
    student = timm.create_model('resnet18', **NETWORK)
    if not row.needs_teacher:
        return row.task(student, verbose=False)
    teacher: nn.Module = timm.create_model('resnet18', **{**NETWORK, 'channels': [8, 8, 16, 16]})
    if name == 'fitted':
        teacher = timm_dfpt.fit_head(teacher, [batch_of(seed) for seed in range(4)], CLASSES)
    options = {'input_config': CONFIG, 'teacher_input_config': CONFIG, 'verbose': False, **options}
    if row.variant is not None:
        teacher = timm_dfpt.wrap(teacher, variant=row.variant, prompt=timm_dfpt.PromptConfig(**prompt))
    elif row.kd_loss is not None:
        options['kd_loss'] = row.kd_loss
    return row.task(student, teacher, **options)


def batch_of(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, SIZE, SIZE, generator=generator), torch.randint(CLASSES, (8,), generator=generator)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize('name', VARIANTS)
def test_a_compiled_step_is_the_eager_one(name: str) -> None:
    plain, compiled = make_task(name), make_task(name)
    # No compiler of C++: the graph is the same. One that is broken in two would be an error.
    compiled.compile('eager', fullgraph=True)
    tasks = (plain, compiled)
    optimizers = []
    for task in tasks:
        module: Any = task.get_trainable_module()
        module.train()
        optimizers.append(torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.01))
    for epoch in range(EPOCHS):
        results = []
        for task, optimizer in zip(tasks, optimizers, strict=True):
            task.set_progress(epoch, epoch, EPOCHS)
            results.append(task(*batch_of(epoch)))
            results[-1]['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert results[0].keys() == results[1].keys()
        for key, value in results[0].items():
            torch.testing.assert_close(results[1][key], value)
    # One graph, another where a number turns out to change, another after the freeze.
    changes = name in ('freeze', 'freeze+', 'fitted') or EPOCHS - 1 in VARIANTS[name][2].values() or name == 'dfpt'
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] <= (2 if changes else 1)
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_evaluated_is_not_the_step() -> None:
    task = make_task('kd')
    task.compile('eager', fullgraph=True)
    x, y = batch_of(0)
    task(x, y)
    graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    task.get_student().eval()
    # Other sizes than that of a step would compile it anew.
    for count in (3, 5):
        assert task.eval_outputs(x[:count])['student'].shape == (count, CLASSES)
        assert task.teacher_logits(x[:count]).shape == (count, CLASSES)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == graphs
