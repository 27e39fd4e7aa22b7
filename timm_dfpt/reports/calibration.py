"""Whether a confidence of 80% means that 80% are right, before and after a temperature is fitted."""
from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from .predictions import SplitPredictions

__all__ = ['BINS', 'Calibration', 'Reliability', 'calibrate', 'fit_temperature', 'reliability']

BINS = 15
"""Bins of equal width of the confidence, as in Guo et al., "On Calibration of Modern Neural Networks" (2017)."""

_LARGEST = 100.0
# They leave an interval of a ten-thousandth of the temperature.
_STEPS = 17


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Confidence and accuracy by bins of the confidence.

    Args:
        counts: Images in each bin, `[BINS]`.
        confidence: Their mean confidence, `[BINS]`; 0 in an empty bin.
        accuracy: The share of them that is right, `[BINS]`; 0 in an empty bin.
    """

    counts: torch.Tensor
    confidence: torch.Tensor
    accuracy: torch.Tensor

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance of accuracy and confidence, bins weighted by images."""
        distances = (self.accuracy - self.confidence).abs() * self.counts
        return float(distances.sum() / self.counts.sum())


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The calibration of a model.

    Args:
        temperature: What logits are divided by.
        images: Images that it was measured on.
        before: Reliability as the model is.
        after: Reliability of the logits divided by `temperature`.
        loss_before: Cross entropy in nats of the model as it is.
        loss_after: The same after division.
    """

    temperature: float
    images: int
    before: Reliability
    after: Reliability
    loss_before: float
    loss_after: float


def reliability(confidence: torch.Tensor, correct: torch.Tensor) -> Reliability:
    """Sort predictions into bins by their confidence.

    Args:
        confidence: `[N]`, from 0 to 1.
        correct: Whether the predicted class is right, bool `[N]`.
    """
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    bins = (torch.bucketize(confidence.double(), edges, right=True) - 1).clamp(0, BINS - 1)
    counts = torch.bincount(bins, minlength=BINS).double()
    sums = [torch.bincount(bins, weights=values.double(), minlength=BINS) for values in (confidence, correct)]
    return Reliability(counts, *(each / counts.clamp(min=1) for each in sums))


def fit_temperature(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Return the temperature with the least cross entropy, from 0.01 to 100.

    The cross entropy of `logits * beta` is convex in `beta = 1 / T`: the root of its derivative is found by bisection.

    Args:
        logits: `[N, K]`.
        target: Labels `[N]`.
    """
    logits = logits.double()
    right = logits.gather(1, target[:, None])[:, 0].mean()
    low, high = 1 / _LARGEST, _LARGEST
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5
        slope = (torch.softmax(logits * middle, dim=1) * logits).sum(dim=1).mean() - right
        low, high = (low, middle) if slope > 0 else (middle, high)
    return (low * high) ** -0.5


def calibrate(model: str, fitted_on: SplitPredictions, measured_on: SplitPredictions | None) -> Calibration | None:
    """Fit a temperature and measure calibration before and after on other images.

    Args:
        model: Name of the model.
        fitted_on: Predictions to fit the temperature on.
        measured_on: Predictions to measure on; without them a random half of `fitted_on` takes their place.

    Returns:
        The calibration; `None` without labels, or with too few images for two halves.
    """
    target, said = fitted_on.sampled_target, fitted_on.models.get(model)
    if target is None or said is None or len(target) < 2:
        return None
    logits, other_logits, other_target = said.logits, None, None
    if measured_on is not None and model in measured_on.models:
        other_logits, other_target = measured_on.models[model].logits, measured_on.sampled_target
    if other_logits is None or other_target is None:
        order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
        fit, rest = order[: len(order) // 2], order[len(order) // 2 :]
        other_logits, other_target = logits[rest], target[rest]
        logits, target = logits[fit], target[fit]
    temperature = fit_temperature(logits, target)
    before, after = (_measure(other_logits, other_target, each) for each in (1.0, temperature))
    return Calibration(temperature, len(other_target), before[0], after[0], before[1], after[1])


def _measure(logits: torch.Tensor, target: torch.Tensor, temperature: float) -> tuple[Reliability, float]:
    log_probs = F.log_softmax(logits.double() / temperature, dim=1)
    confidence, classes = log_probs.max(dim=1)
    return reliability(confidence.exp(), classes == target), float(F.nll_loss(log_probs, target))
