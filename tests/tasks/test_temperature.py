from __future__ import annotations

import copy
import math

import pytest
import torch

from timm_dfpt.losses import kd_loss
from timm_dfpt.tasks.baselines import GlobalTemperature


def at(module: GlobalTemperature, epoch: int) -> torch.Tensor:
    temperature: torch.Tensor = module(torch.tensor(module.strength(epoch)))
    return temperature


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 5, generator=generator), 3 * torch.randn(8, 5, generator=generator)


def test_starts_as_the_authors_temperature() -> None:
    temperature = at(GlobalTemperature(), 0)
    assert temperature.shape == ()
    assert temperature.item() == pytest.approx(1 + 20 / (1 + math.exp(-1)))


@pytest.mark.parametrize(('raw', 'expected'), [(-50.0, 1.0), (0.0, 11.0), (50.0, 21.0)])
def test_bounds(raw: float, expected: float) -> None:
    module = GlobalTemperature()
    torch.nn.init.constant_(module.raw, raw)
    assert at(module, 3).item() == pytest.approx(expected)


def test_curriculum_is_half_a_cosine() -> None:
    module = GlobalTemperature()
    # The authors' schedule: (cos(i pi / 10) + 1) / 2 - 1 for the epochs i = 1, 2, ..., in size.
    strengths = [module.strength(epoch) for epoch in range(30)]
    expected = [1 - (math.cos(min(i, 10) * math.pi / 10) + 1) / 2 for i in range(1, 31)]
    assert strengths == pytest.approx(expected)


@pytest.mark.parametrize('epoch', [0, 4, 100])
def test_gradient_is_reversed_and_scaled(epoch: int) -> None:
    student, teacher = logits()
    module = GlobalTemperature()
    kd_loss(student, teacher, at(module, epoch)).backward()

    plain = torch.ones((), requires_grad=True)
    kd_loss(student, teacher, 1 + 20 * torch.sigmoid(plain)).backward()
    assert plain.grad is not None
    assert module.raw.grad is not None
    assert plain.grad.abs() > 1e-4
    torch.testing.assert_close(module.raw.grad, -module.strength(epoch) * plain.grad.unsqueeze(0))


def test_one_optimizer_lowers_the_loss_by_the_student_and_raises_it_by_the_temperature() -> None:
    start, teacher = logits()
    for trained in ('student', 'temperature'):
        student, module = start.clone().requires_grad_(), GlobalTemperature()
        before = kd_loss(student, teacher, at(module, 100)).item()
        parameter = student if trained == 'student' else module.raw
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            kd_loss(student, teacher, at(module, 100)).backward()
            optimizer.step()
        after = kd_loss(student, teacher, at(module, 100)).item()
        assert (after < before) == (trained == 'student')


def test_copies_and_saves() -> None:
    module = GlobalTemperature()
    torch.nn.init.constant_(module.raw, -0.3)
    other = GlobalTemperature()
    other.load_state_dict(copy.deepcopy(module).state_dict())
    assert at(other, 0) == at(module, 0)


def test_compiles_into_one_graph() -> None:
    module = GlobalTemperature()
    torch.compile(module, backend='aot_eager', fullgraph=True)(torch.tensor(0.5)).backward()
    expected = GlobalTemperature()
    expected(torch.tensor(0.5)).backward()
    assert module.raw.grad is not None
    torch.testing.assert_close(module.raw.grad, expected.raw.grad)
