"""What `docs/RESULTS.md` shows of the study of foreign teachers: ways against regimes, and the primary contrasts."""
from __future__ import annotations

from collections.abc import Sequence

from benchmarks.foreign.analysis import Study, seconds_of
from timm_dfpt.hub.markdown import markdown_table
from timm_dfpt.reports.intervals import difference_text, summarise

__all__ = ['WAYS', 'blocks', 'runs_text', 'way_of']

# Ways in words, in the order of the table. Students with pre-trained weights get a fitted head first in all of them.
WAYS = {
    'alone': 'student alone',
    'fit-kd': 'head fitted, then KD',
    'ft-kd': 'teacher fine-tuned, then KD',
    'dfpt': 'one run, DFPT-KD',
    'dfpt+': 'one run, DFPT-KD+',
    'dfpt+ new head': 'one run, DFPT-KD+, new head',
}


def way_of(study: Study, regime: str, arm: str) -> str | None:
    """Return the way of an arm, a key of `WAYS`, or `None` where it is a variant of one.

    Args:
        study: The records.
        regime: Name of the regime.
        arm: Name of the arm.
    """
    arm = arm.removesuffix(' =time')
    if f'{arm}-head' in study.arms(regime):
        return None
    way = arm.removesuffix('-head')
    return way if way in WAYS else None


def blocks(study: Study) -> dict[str, str]:
    """Return the text of every block of the page by name; of those only for which there are records."""
    regimes = [regime for regime in study.regimes if any(arm.endswith('=time') for arm in study.arms(regime))]
    texts = {'ways': _ways(study, [regime for regime in regimes if not regime.endswith('-long')])} if regimes else {}
    texts |= {'runs': runs_text(study), 'contrasts': _contrasts(study)}
    return {name: text for name, text in texts.items() if text}


def runs_text(study: Study) -> str:
    """Return how many runs of which kind there are, what they took, and where."""
    phases = [record['phase'] for record in study.records]
    hours = sum(record['total_cpu_s'] for record in study.records) / 3600
    machines = sorted({record['machine']['cpu'] for record in study.records})
    return (
        f'{len(phases):,} runs: {phases.count("tune")} to tune, on validation images only, {phases.count("time")} to '
        f'measure time, {phases.count("final")} final ones; {hours:.1f} CPU hours of training on '
        f'{", ".join(machines)}, one thread each.'
    )


def _ways(study: Study, regimes: Sequence[str]) -> str:
    """Mean test top-1 with its 95% interval, and cost relative to the student alone for as many epochs."""
    dearest = {}
    for regime in regimes:
        arms = study.arms(regime)
        # The dearest way has no second name.
        seconds = {
            arm: seconds_of(records)
            for arm, records in arms.items()
            if way_of(study, regime, arm) and not arm.endswith('=time') and f'{arm} =time' not in arms
        }
        dearest[regime] = max(seconds, key=seconds.__getitem__, default='')
    rows = []
    for longer in ('', ' =time'):
        for way, words in WAYS.items():
            cells = []
            for regime in regimes:
                arms = study.arms(regime)
                found = [arm for arm in arms if way_of(study, regime, arm) == way]
                usual = next((arm for arm in found if not arm.endswith('=time')), '')
                timed = next((arm for arm in found if arm.endswith('=time')), '')
                # The dearest way takes that time as it is.
                arm = (timed or (usual if usual == dearest[regime] else '')) if longer else usual
                cells.append(_cell(study, regime, arm) if arm else '-')
            if set(cells) != {'-'}:
                rows.append([words + (', equal time' if longer else ''), *cells])
    counts = [
        {len(found) for arm, found in study.arms(regime).items() if way_of(study, regime, arm)}
        for regime in regimes
    ]
    rows.append(['runs of each', *(f'{min(each)}-{max(each)}' if len(each) > 1 else str(*each) for each in counts)])
    return markdown_table(['way', *regimes], rows, text_columns=1)


def _cell(study: Study, regime: str, arm: str) -> str:
    summary = summarise([record['student_top1'] for record in study.arms(regime)[arm]])
    cost = study.cost(regime, arm)
    half = '' if summary['interval'] is None else f' +- {summary["interval"][1] - summary["mean"]:.1f}'
    return f'{summary["mean"]:.1f}{half}' + ('' if cost is None else f' ({cost:.1f}x)')


def _contrasts(study: Study) -> str:
    """The usual contrasts of the one run, a row a regime, and those that are a regime's own."""
    # Against what, and whether for equal time.
    columns = {
        ('ft-kd', False): '- fine-tuned, then KD; equal epochs', ('ft-kd', True): '- fine-tuned, then KD; equal time',
        ('alone', True): '- alone; equal time', ('fit-kd', True): '- head fitted, then KD; equal time',
    }  # fmt: skip
    usual, others = [], []
    for regime in study.regimes:
        found = {pair: study.difference(regime, *pair) for pair in study.primary(regime)}
        if not any(found.values()):
            continue
        timed = [one for one, _ in found if one.endswith('=time')]
        if timed:
            way = timed[0].removesuffix(' =time').removesuffix('-head')
            cells = {
                (base.removesuffix(' =time').removesuffix('-head'), base.endswith('=time')): difference_text(each)
                for (_, base), each in found.items()
            }
            usual.append([regime, WAYS[way], *(cells.get(column, '-') for column in columns)])
        else:
            texts = [f'{one} - {other}: {difference_text(each)}' for (one, other), each in found.items()]
            others.append([regime, '; '.join(texts)])
    head = ['regime', 'the one run', *columns.values()]
    tables = [markdown_table(head, usual, text_columns=2)] if usual else []
    if others:
        tables.append(markdown_table(['regime', 'contrasts'], others, text_columns=2))
    return '\n\n'.join(tables)
