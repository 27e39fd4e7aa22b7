"""Write the tables and the plot of the study of foreign teachers, from plan and records and nothing else.

    python -m benchmarks.foreign.report            # rewrite docs/FOREIGN.md, docs/results/foreign-cost.png, and the
                                                   # marked blocks of docs/RESULTS.md
    python -m benchmarks.foreign.report --check    # write nothing; exit 1 if the page is not what the records give
"""
from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.foreign.analysis import Study, seconds_of, welch
from benchmarks.foreign.plan import PLAN_FILE, Plan
from benchmarks.foreign.run import RECORDS, read_records
from benchmarks.foreign.summary import WAYS, blocks, runs_text, way_of
from benchmarks.study.report import rewrite
from timm_dfpt.hub.markdown import markdown_table
from timm_dfpt.reports.intervals import difference_text, spread_text, summarise

__all__ = ['draw', 'main', 'page']

DOCUMENT = Path(__file__).parents[2] / 'docs' / 'FOREIGN.md'
PLOT = 'foreign-cost.png'


def page(study: Study) -> str:
    """Return the whole page."""
    parts = [
        '# From a foreign teacher to a small model: all tables',
        'Written by `python -m benchmarks.foreign.report` from `benchmarks/foreign/plan.yaml` and the records in '
        '`benchmarks/foreign/records`; what the regimes and ways are is said in the plan. What follows from them: '
        f'[RESULTS.md](RESULTS.md). {runs_text(study)}',
        'Test top-1 of the last epoch in percent. In brackets: 95% interval of a difference by Welch over the seeds, '
        'which are not paired. Cost: CPU time of the whole way (fitting, fine-tuning, adapting, all epochs), relative '
        'to the student alone for as many epochs; FLOPs likewise, where they were counted. Arms with `=time` train for '
        'as long as the dearest.',
    ]
    for regime in study.regimes:
        parts += _regime(study, regime)
    if any(study.arms(regime) for regime in study.regimes):
        parts.append(f'![Test accuracy against the total cost of a way, by regime](results/{PLOT})')
    return '\n\n'.join(parts) + '\n'


def _regime(study: Study, regime: str) -> list[str]:
    values = study.plan.values['regimes'][regime]
    parts = [f'## {regime}', values['about']]
    finals, trials = study.arms(regime), study.arms(regime, 'tune')
    if finals:
        missing = study.missing(regime)
        if missing:
            parts.append(f'**Not finished: {missing} of the planned students are missing.**')
        contrasts = study.primary(regime)
        rows = []
        for arm, records in finals.items():
            rows.append([
                arm,
                _options(records[0]['stages']),
                ' + '.join('fit' if each is None else str(each) for each in records[0]['epochs']),
                str(len(records)),
                spread_text(summarise([record['student_top1'] for record in records])),
                _mean([record['path_top1'] for record in records]),
                _mean([record['teacher_top1'] for record in records]),
                _number(study.cost(regime, arm)),
                _number(study.flops(regime, arm)),
                difference_text(study.difference(regime, arm, 'alone')),
            ])
        head = ['arm', 'options', 'epochs', 'n', 'test', 'path', 'teacher', 'cost', 'FLOPs', '- alone']
        parts.append(markdown_table(head, rows, text_columns=3))
        if contrasts:
            rows = [
                [f'{one} - {other}', difference_text(study.difference(regime, one, other))] for one, other in contrasts
            ]
            parts += ['Primary contrasts, written down before the first of these records:',
                      markdown_table(['contrast', 'difference'], rows, text_columns=1)]
    if trials and 'final' in values:
        parts += _tuning(study, regime)
    elif trials:
        parts += _designs(study, regime)
    return parts


def _tuning(study: Study, regime: str) -> list[str]:
    chosen, rows = study.chosen(regime).values(), []
    for trial, records in study.arms(regime, 'tune').items():
        row = [
            trial.partition(':')[0],
            _options(records[0]['stages']),
            ', '.join(_number(record['student_top1']) for record in records),
            _mean([record['student_top1'] for record in records]),
            _mean([record['path_top1'] for record in records]),
            _number(seconds_of(records), '.0f'),
        ]
        rows.append([f'**{cell}**' for cell in row] if trial in chosen else row)
    head = ['way', 'options', 'seeds', 'mean', 'path', 'CPU s']
    return ['Tuning, validation top-1; bold: chosen.', markdown_table(head, rows, text_columns=3)]


def _designs(study: Study, regime: str) -> list[str]:
    """Trials from which nothing follows by itself: held against the first one."""
    trials, rows = study.arms(regime, 'tune'), []
    first = next(iter(trials.values()))
    usual = _given(first)
    for records in trials.values():
        accuracies = [record['student_top1'] for record in records]
        difference = welch(accuracies, [record['student_top1'] for record in first])
        changes = {key: value for key, value in _given(records).items() if usual.get(key) != value}
        rows.append([
            ', '.join(f'{key}={value}' for key, value in changes.items()) or 'as chosen',
            str(len(records)),
            spread_text(summarise(accuracies)),
            _mean([record['path_top1'] for record in records]),
            _number(seconds_of(records), '.0f'),
            '' if records is first else difference_text(difference),
        ])
    head = ['options', 'n', 'student', 'path', 'CPU s', '- as chosen']
    return ['Validation top-1.', markdown_table(head, rows, text_columns=1)]


def _given(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    options: Mapping[str, Any] = records[0]['stages'][-1].get('options', {})
    return options


def _options(stages: Sequence[Mapping[str, Any]]) -> str:
    texts = []
    for stage in stages:
        options = {key: value for key, value in stage.get('options', {}).items() if key not in ('method', 'epochs')}
        texts.append(', '.join(f'{key}={value}' for key, value in options.items()) or '-')
    return '; '.join(texts)


def _number(value: float | None, form: str = '.2f') -> str:
    return '-' if value is None else format(value, form)


def _mean(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    return _number(statistics.fmean(found)) if found else '-'


def draw(study: Study, path: Path) -> None:
    """Draw test accuracy against total cost, one line per way and one panel per regime."""
    import matplotlib  # costs 0.3 s

    matplotlib.use('agg')
    from matplotlib import pyplot as plt  # costs 0.3 s

    # A way's longer training, and what was trained later, are further points of a panel.
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for regime in study.regimes:
        for arm, records in study.arms(regime).items():
            way = way_of(study, regime, arm)
            if way is not None:
                accuracy = statistics.fmean(record['student_top1'] for record in records)
                panel = lines.setdefault(regime.removesuffix('-long').removesuffix('-new-head'), {})
                panel.setdefault(way, []).append((seconds_of(records), accuracy))
    # Where ways train for equal times there are lines to be drawn.
    lines = {regime: ways for regime, ways in lines.items() if sum(map(len, ways.values())) > len(ways) > 1} or lines
    columns = min(3, len(lines))
    rows = math.ceil(len(lines) / columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.4 * columns, 3.6 * rows), layout='constrained', squeeze=False
    )
    for (regime, ways), axes in zip(lines.items(), panels.flat, strict=False):
        for way in sorted(ways, key=list(WAYS).index):
            xs, ys = zip(*sorted(ways[way]), strict=True)
            axes.plot(xs, ys, marker='o', color=f'C{list(WAYS).index(way)}', label=WAYS[way])
        axes.set(xlabel='CPU seconds, all of the way', ylabel='test top-1 %', title=regime)
        axes.set_xlim(0, 1.05 * max(seconds for points in ways.values() for seconds, _ in points))
        axes.grid(alpha=0.3)
        axes.legend(fontsize='x-small')
    for axes in panels.flat[len(lines):]:
        axes.remove()
    # Without metadata two equal runs write equal files.
    figure.savefig(path, dpi=90, metadata={'Software': None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 1 if `--check` finds a page that is not what the records give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--plan', type=Path, default=PLAN_FILE, help='the study (%(default)s)')
    parser.add_argument('--records', type=Path, default=RECORDS, help='folder of the records (%(default)s)')
    parser.add_argument('--document', type=Path, default=DOCUMENT, help='the page (%(default)s)')
    parser.add_argument('--check', action='store_true', help='write nothing, say whether the page is up to date')
    args = parser.parse_args(argv)
    records = read_records(args.records)
    study = Study(Plan(args.plan, Path(), records), records)
    plot = args.document.parent / 'results' / PLOT
    texts = {args.document: page(study)}
    summary = args.document.parent / 'RESULTS.md'
    if summary.is_file():
        texts[summary] = rewrite(summary.read_text(encoding='utf-8'), blocks(study))
    has_finals = any(study.arms(regime) for regime in study.regimes)
    if args.check:
        for path, text in texts.items():
            if not path.is_file() or path.read_text(encoding='utf-8') != text or (has_finals and not plot.is_file()):
                print(f'{path.name} is not what the records give; run python -m benchmarks.foreign.report')
                return 1
        return 0
    for path, text in texts.items():
        path.write_text(text, encoding='utf-8')
    if has_finals:
        plot.parent.mkdir(exist_ok=True)
        draw(study, plot)
    return 0


if __name__ == '__main__':
    sys.exit(main())
