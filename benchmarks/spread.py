"""The middle of a few measurements, and how far they lie apart."""
from __future__ import annotations

import statistics
from collections.abc import Sequence

__all__ = ['spread']


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive')
    return middle, low, high
