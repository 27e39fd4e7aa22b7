"""Ridge regression in closed form: a linear classifier on features, its penalty chosen by exact leave-one-out."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

__all__ = ['PENALTIES', 'Ridge', 'fit_ridge']

PENALTIES = tuple(10 ** (exponent / 2) for exponent in range(-10, 5))
"""Penalties to choose from, per image of standardised features: 1e-5 to 1e2."""

_ROWS = 4096  # features in float64 at a time
_MAX_SCALE = 1e4


@dataclasses.dataclass(frozen=True)
class Ridge:
    """A linear classifier `softmax(features @ weight.T + bias)`.

    Args:
        weight: `[K, D]`, float64.
        bias: `[K]`, float64.
        penalty: The penalty per image that was chosen.
        temperature: Number by which the scores of ridge regression are divided: it is in `weight` and `bias` already.
        accuracy: Top-1 in percent on images that were left out, one at a time.
        loss: Cross-entropy in nats on them.
        spread: How much features differ between images, in relation to their size: roots of the mean squares.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    penalty: float
    temperature: float
    accuracy: float
    loss: float
    spread: float


def fit_ridge(
    features: torch.Tensor,
    target: torch.Tensor,
    num_classes: int,
    *,
    balanced: bool = False,
    penalties: Sequence[float] = PENALTIES,
) -> Ridge:
    """Fit a linear classifier to features in closed form.

    Features are standardised, a class is +1 and the others are -1, and of the penalties the one with the smallest
    squared error is taken where each image is predicted by a fit to all others: scikit-learn's `RidgeClassifierCV`
    behind its `StandardScaler`. One eigendecomposition, of the smaller of the `D x D` and the `N x N` matrix, gives
    all of these fits (Golub, Heath and Wahba, Technometrics 21, 1979). The temperature then makes the softmax as
    confident as it is right on the images left out; its targets are Platt's, so that it stays finite where all are
    right.

    Args:
        features: `[N, D]`, one row per image, of any floating-point type.
        target: Class indices `[N]`.
        num_classes: Number of classes `K`.
        balanced: Give the images of each class together the same weight. A class without images has none.
        penalties: Penalties to choose from, per image.

    Returns:
        The classifier, on the CPU.

    Raises:
        ValueError: If there are fewer than two classes with images, a feature is not finite, or all are constant.
    """
    n = len(features)
    counts = torch.bincount(target.cpu(), minlength=num_classes)
    if int((counts > 0).sum()) < 2:
        raise ValueError(f'A head needs images of at least two classes, got {n} images of {int((counts > 0).sum())}.')
    device = features.device if features.device.type == 'cuda' else torch.device('cpu')
    target = target.to(device)
    weights = torch.ones(n, dtype=torch.float64, device=device)
    if balanced:
        weights = (n / (counts > 0).sum() / counts.clamp(min=1)).double().to(device)[target]
    mean, std = _statistics(features, weights, device)
    varies = std > 0
    if not bool(varies.any()):
        raise ValueError(
            'The features are the same for all images, so that a head cannot be fitted to them: check the model and '
            'its images.'
        )
    spread = float((std.square().sum() / (std.square() + mean.square()).sum()).sqrt())
    std = torch.where(varies, std, torch.ones_like(std))
    signs = -torch.ones(n, num_classes, dtype=torch.float64, device=device)
    signs[torch.arange(n, device=device), target] = 1.0
    offset = weights @ signs / n
    root = weights.sqrt()[:, None]
    z = torch.cat([_standardised(part, mean, std, device) for part in features.split(_ROWS)]) * root
    goal = root * (signs - offset)
    basis, back, spectrum = _decompose(z)
    projected = basis.T @ goal
    best: tuple[float, float, torch.Tensor] | None = None
    for penalty in penalties:
        shrunk = 1 / (spectrum + penalty * n)
        # The share that an image has in its own prediction; the last term is that of the intercept.
        leverage = (basis.square() @ shrunk)[:, None] + weights[:, None] / n
        residual = (goal - basis @ (shrunk[:, None] * projected)) / (1 - leverage).clamp(min=1e-12)
        error = float(residual.square().sum())
        if best is None or error < best[0]:
            best = (error, penalty, signs - residual / root)
    assert best is not None
    _, penalty, left_out = best
    scale = _fit_scale(left_out, target, weights)
    coefficients = back(projected / (spectrum + penalty * n)[:, None]) / std[:, None] * scale
    right = (left_out.argmax(dim=1) == target).double()
    return Ridge(
        weight=coefficients.T.cpu(),
        bias=(scale * offset - mean @ coefficients).cpu(),
        penalty=penalty,
        temperature=1 / scale,
        accuracy=100 * float(right.mean()),
        loss=float(torch.nn.functional.cross_entropy(scale * left_out, target)),
        spread=spread,
    )


def _statistics(
    features: torch.Tensor, weights: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weighted mean and standard deviation `[D]`; 0 for what never changes."""
    n = len(features)
    parts = list(zip(features.split(_ROWS), weights.split(_ROWS), strict=True))
    mean = torch.stack([w @ x.to(device).double() for x, w in parts]).sum(dim=0) / n
    variance = torch.stack([w @ (x.to(device).double() - mean).square() for x, w in parts]).sum(dim=0) / n
    if not bool(torch.isfinite(variance).all()):
        raise ValueError(
            'The features are not finite (NaN or Inf), so that a head cannot be fitted to them: load other weights, '
            'or use float32.'
        )
    std = variance.sqrt()
    # Rounding of a constant is not variation: float32 and the order of its sums leave a few 1e-7 of it.
    return mean, torch.where(std > 1e-6 * mean.abs() + 1e-30, std, torch.zeros_like(std))


def _standardised(part: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, device: torch.device) -> torch.Tensor:
    return (part.to(device).double() - mean) / std


def _decompose(z: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """Return `Q` `[N, R]`, what makes coefficients `[D, K]` of `[R, K]`, and the spectrum `[R]`.

    With them a ridge of penalty `p` predicts `Q / (spectrum + p) Q^T y`.
    """
    n, d = z.shape
    if d <= n:
        spectrum, vectors = torch.linalg.eigh(z.T @ z)
        return z @ vectors, lambda r: vectors @ r, spectrum.clamp(min=0)
    spectrum, vectors = torch.linalg.eigh(z @ z.T)
    kept = spectrum > spectrum[-1] * n * torch.finfo(z.dtype).eps
    spectrum, vectors = spectrum[kept], vectors[:, kept]
    root = spectrum.sqrt()
    return vectors * root, lambda r: z.T @ (vectors @ (r / root[:, None])), spectrum


def _fit_scale(scores: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> float:
    """Return the factor on scores `[N, K]` with the smallest cross-entropy: a root of its derivative, by bisection.

    The targets are smoothed by `1 / (N + 2)`: Platt, Probabilistic Outputs for Support Vector Machines, 1999.
    """
    n, classes = scores.shape
    smoothing = 1 / (n + 2)
    hit = scores.gather(1, target[:, None]).squeeze(1)
    rest = (scores.sum(dim=1) - hit) / (classes - 1)
    wanted = float(weights @ ((1 - smoothing) * hit + smoothing * rest))
    low, high = 1 / _MAX_SCALE, _MAX_SCALE
    for _ in range(60):
        middle = math.sqrt(low * high)
        found = float(weights @ (torch.softmax(middle * scores, dim=1) * scores).sum(dim=1))
        low, high = (middle, high) if found < wanted else (low, middle)
    return math.sqrt(low * high)
