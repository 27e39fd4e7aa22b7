"""Say before any run how large a difference so many seeds can see.

    python -m benchmarks.foreign.power     # from the spreads of the earlier study and of what tuning has shown

Two arms of n seeds each, Welch's test at 5%: how many seeds see a difference with a probability of 80%, and what
difference the seeds of the plan see.
"""
from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence

from benchmarks.foreign.plan import PLAN_FILE, Plan
from benchmarks.study.run import read_records
from timm_dfpt.hub.markdown import markdown_table
from timm_dfpt.reports.intervals import t_quantile

__all__ = ['detectable', 'power', 'seeds_for']


def power(difference: float, sd: float, seeds: int) -> float:
    """Return the probability that two arms of so many seeds are found to differ (two-sided, 5%).

    Source: the normal approximation of the noncentral t distribution (Abramowitz and Stegun, 26.7.10).

    Args:
        difference: The true difference.
        sd: Standard deviation over the seeds of each arm.
        seeds: Seeds of each arm, at least two.
    """
    degrees = 2 * seeds - 2
    t, shift = t_quantile(degrees), abs(difference) / (sd * math.sqrt(2 / seeds))
    return statistics.NormalDist().cdf(
        (shift - t * (1 - 1 / (4 * degrees))) / math.sqrt(1 + t * t / (2 * degrees))
    )


def seeds_for(difference: float, sd: float, wanted: float = 0.8) -> int:
    """Return the number of seeds of each arm that see a difference with the wanted probability."""
    return next(seeds for seeds in range(2, 100_000) if power(difference, sd, seeds) >= wanted)


def detectable(sd: float, seeds: int, wanted: float = 0.8) -> float:
    """Return the smallest difference, to a hundredth, that so many seeds see with the wanted probability."""
    return next(step / 100 for step in range(1, 100_000) if power(step / 100, sd, seeds) >= wanted)


def _spreads(regime: str) -> Iterable[float]:
    by_arm: dict[str, list[float]] = {}
    for record in read_records():
        if record['regime'] == regime and record['phase'] == 'final':
            by_arm.setdefault(record['arm'], []).append(record['test_top1'])
    return [statistics.stdev(values) for values in by_arm.values() if len(values) > 2]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    spreads = list(_spreads('upright-m-s'))
    pooled = math.sqrt(statistics.fmean(sd * sd for sd in spreads))
    print(
        f'upright-m-s of the earlier study: SD over five seeds {min(spreads):.2f} to {max(spreads):.2f} of '
        f'{len(spreads)} arms, pooled {pooled:.2f}.'
    )
    assumed = Plan(PLAN_FILE, PLAN_FILE.parent).values['power']
    rows = []
    for kind, values in assumed.items():
        for sd in values['sd']:
            rows.append([
                kind,
                f'{sd:g}',
                f'{values["difference"]:g}',
                str(seeds_for(values['difference'], sd)),
                str(values['seeds']),
                f'{power(values["difference"], sd, values["seeds"]):.2f}',
                f'{detectable(sd, values["seeds"]):.1f}',
            ])
    head = ['images', 'SD', 'difference', 'seeds that see it', 'seeds planned', 'their power', 'what they see']
    print(markdown_table(head, rows, text_columns=1))
    return 0


if __name__ == '__main__':
    sys.exit(main())
