"""The closed form against fits that do leave one image out, one after the other."""
from __future__ import annotations

import pytest
import torch

from timm_dfpt.teacher.ridge import fit_ridge

PENALTIES = (0.01, 0.1, 1.0, 10.0)


def draw(n: int, d: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + d)
    target = torch.arange(n) % classes
    target[: n // 3] = 0
    centres = torch.randn(classes, d, generator=generator)
    x = 3 + 2 * torch.randn(n, d, generator=generator) + centres[target]
    x[:, 0] = 5.0  # says nothing, and has no spread
    return x, target


def solve(
    z: torch.Tensor, signs: torch.Tensor, weights: torch.Tensor, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normal equations with a column of ones, which is not penalised."""
    ones = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], dim=1)
    shrink = penalty * torch.eye(ones.shape[1], dtype=z.dtype)
    shrink[-1, -1] = 0
    solution = torch.linalg.solve(ones.T @ (weights[:, None] * ones) + shrink, ones.T @ (weights[:, None] * signs))
    return solution[:-1], solution[-1]


@pytest.mark.parametrize('balanced', [False, True])
@pytest.mark.parametrize(('n', 'd'), [(40, 6), (20, 50)])
def test_equals_refitting_without_each_image(n: int, d: int, balanced: bool) -> None:
    x, target = draw(n, d)
    ridge = fit_ridge(x, target, 3, balanced=balanced, penalties=PENALTIES)
    counts = torch.bincount(target).double()
    weights = (n / 3 / counts)[target] if balanced else torch.ones(n, dtype=torch.float64)
    mean = (weights[:, None] * x.double()).sum(0) / n
    std = ((weights[:, None] * (x.double() - mean) ** 2).sum(0) / n).sqrt()
    std[0] = 1
    z = (x.double() - mean) / std
    signs = 2.0 * torch.nn.functional.one_hot(target).double() - 1
    errors, scores = [], []
    for penalty in PENALTIES:
        left_out = torch.empty_like(signs)
        for i in range(n):
            rest = torch.arange(n) != i
            w, b = solve(z[rest], signs[rest], weights[rest], penalty * n)
            left_out[i] = z[i] @ w + b
        scores.append(left_out)
        errors.append(float((weights[:, None] * (left_out - signs) ** 2).sum()))
    best = errors.index(min(errors))
    assert 0 < best < len(PENALTIES) - 1, 'the right penalty must not be at an end'
    assert ridge.penalty == PENALTIES[best]
    accuracy = 100 * (scores[best].argmax(1) == target).double().mean()
    assert ridge.accuracy == pytest.approx(float(accuracy))
    w, b = solve(z, signs, weights, ridge.penalty * n)
    expected = (z @ w + b) / ridge.temperature
    torch.testing.assert_close(x.double() @ ridge.weight.T + ridge.bias, expected, rtol=0, atol=1e-5)
    assert ridge.loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(scores[best] / ridge.temperature, target)), abs=1e-6
    )

    def loss(factor: float) -> float:
        smooth = torch.nn.functional.cross_entropy(
            scores[best] * factor / ridge.temperature, target, label_smoothing=3 / 2 / (n + 2), reduction='none'
        )
        return float((weights * smooth).sum())

    assert loss(1.0) < min(loss(0.99), loss(1.01))


def test_calibrated_where_every_image_is_right() -> None:
    x, target = draw(60, 4)
    ridge = fit_ridge(x + 20 * torch.nn.functional.one_hot(target, 4), target, 3)
    assert ridge.accuracy == 100
    assert 0.001 < ridge.temperature < 10


def test_without_anything_to_tell_classes_apart() -> None:
    with pytest.raises(ValueError, match='at least two classes, got 4 images of 1'):
        fit_ridge(torch.randn(4, 3), torch.ones(4, dtype=torch.long), 3)
    with pytest.raises(ValueError, match='not finite'):
        fit_ridge(torch.full((4, 3), torch.inf), torch.tensor([0, 1, 0, 1]), 2)


def test_rounding_of_a_constant_is_no_feature() -> None:
    x, target = draw(60, 4)
    noise = 7 + 2e-6 * torch.randn(60, 1, generator=torch.Generator().manual_seed(2))
    ridge = fit_ridge(torch.cat([x, noise], dim=1), target, 3)
    assert ridge.weight[:, -1].abs().max() < 1
