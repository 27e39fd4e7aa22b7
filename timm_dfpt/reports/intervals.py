"""Statistics of a few independent values: mean, spread, and an interval by Student's t."""
from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ['difference_text', 'spread_text', 'summarise', 't_quantile']

# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom.
_T975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip


def t_quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t distribution.

    Args:
        degrees: Degrees of freedom, at least 1. Above 30 the first terms of the expansion about the normal quantile
            are right to four digits (Abramowitz and Stegun, 26.7.5).
    """
    if degrees < 1:
        raise ValueError(f'degrees must be at least 1, got {degrees}: an interval needs two values.')
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Summarise independent values.

    Returns:
        `values`, `mean`, `sd` (of the sample), and `interval`: a 95% confidence interval of the mean by Student's t;
        the last two are `None` for a single value.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {'values': list(values), 'mean': mean, 'sd': None, 'interval': None}
    sd = statistics.stdev(values)
    half = t_quantile(len(values) - 1) * sd / math.sqrt(len(values))
    return {'values': list(values), 'mean': mean, 'sd': sd, 'interval': [mean - half, mean + half]}


def spread_text(summary: Mapping[str, Any], digits: int = 2) -> str:
    """Return mean and standard deviation as `71.20 +- 0.35`, the mean alone where `sd` is `None`.

    Args:
        summary: With `mean` and `sd`, as of `summarise`.
        digits: Digits behind the point.
    """
    sd = summary['sd']
    return f'{summary["mean"]:.{digits}f}' + (f' +- {sd:.{digits}f}' if sd is not None else '')


def difference_text(summary: Mapping[str, Any] | None, none: str = '-', digits: int = 2) -> str:
    """Return a difference as `+0.50 [+0.10, +0.90]`, without brackets where `interval` is `None`.

    Args:
        summary: With `mean` and `interval`, as of `summarise`; `None` where there is no difference.
        none: Text for that.
        digits: Digits behind the point.
    """
    if summary is None:
        return none
    ends = summary['interval']
    form = f'+.{digits}f'
    return f'{summary["mean"]:{form}}' + (f' [{ends[0]:{form}}, {ends[1]:{form}}]' if ends else '')
