"""Write the tables of `docs/STUDY.md`, and draw its plots, from the records of the study and from nothing else.

    python -m benchmarks.study.report            # rewrite the marked blocks, draw docs/results/*.png
    python -m benchmarks.study.report --check    # write nothing; exit 1 if a block is not what the records give

A block is what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. Prose around it stays as it is; a block
that the document lacks is added at its end. Also reported is which final arms have other options than tuning chose, and
which records the plan does not ask for.
"""
from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.analysis import CONTRASTS, DUAL, TITLES, Study, mean, options_text
from benchmarks.study.plan import PLAN_FILE, Plan
from benchmarks.study.plots import figures
from benchmarks.study.run import RESULTS, read_records
from timm_dfpt.hub.markdown import markdown_table
from timm_dfpt.reports.intervals import difference_text, spread_text, summarise

__all__ = ['blocks', 'main', 'rewrite']

DOCUMENT = Path(__file__).parents[2] / 'docs' / 'STUDY.md'
_NOTHING = 'Nothing recorded yet.'
_BLOCK = re.compile(r'<!-- begin (?P<name>[^>]+) -->\n.*?<!-- end (?P=name) -->', re.DOTALL)
_KINDS = ('final', 'tuning')


def blocks(study: Study) -> dict[str, str]:
    """Return the text of every block by name, in the order in which a new document has them."""
    texts = {'summary': _summary(study), 'main': _main(study)}
    for regime in study.regimes():
        texts |= {f'{kind} {regime}': _of_regime(study, kind, regime) for kind in _KINDS}
    texts['inside'] = _inside(study)
    return texts


def rewrite(document: str, texts: Mapping[str, str]) -> str:
    """Put texts into the blocks of a document, and add the blocks that it lacks.

    Raises:
        ValueError: If the document has a block of another name, or one twice.
    """
    names = [match['name'] for match in _BLOCK.finditer(document)]
    for name in names:
        if name not in texts and name.partition(' ')[0] not in _KINDS:
            raise ValueError(f'block {name!r} is none of {list(texts)}: correct its name, or remove it.')
        if names.count(name) > 1:
            raise ValueError(f'block {name!r} is there twice: remove one.')
    filled = _BLOCK.sub(lambda match: _block(match['name'], texts.get(match['name'], _NOTHING)), document)
    missing = {name: text for name, text in texts.items() if name not in names and text != _NOTHING}
    return filled + ''.join(f'\n## {name.capitalize()}\n\n{_block(name, text)}\n' for name, text in missing.items())


def _block(name: str, text: str) -> str:
    return f'<!-- begin {name} -->\n\n{text}\n\n<!-- end {name} -->'


def _number(value: float | None, form: str = '.2f') -> str:
    return '-' if value is None or math.isnan(value) else format(value, form)


def _interval(summary: Mapping[str, Any] | None) -> str:
    return difference_text(summary) + (' (one seed)' if summary and not summary['interval'] else '')


def _seeds(records: Sequence[Mapping[str, Any]]) -> str:
    """Seeds in ascending order, runs of them as `100-107`."""
    seeds = sorted({record['seed'] for record in records})
    starts = [seed for seed in seeds if seed - 1 not in seeds]
    ends = [seed for seed in seeds if seed + 1 not in seeds]
    return ', '.join(str(a) if a == b else f'{a}-{b}' for a, b in zip(starts, ends, strict=True)) or '-'


def _summary(study: Study) -> str:
    rows = []
    for regime in study.regimes():
        values = study.plan.values['regimes'].get(regime, {})
        of_phase = {
            phase: [record for records in study.arms(regime, phase).values() for record in records]
            for phase in ('tune', 'final')
        }
        row = [regime, *(str(values.get(key, '-')) for key in ('data', 'teacher', 'student', 'epochs'))]
        for phase, records in of_phase.items():
            row += [str(len(study.arms(regime, phase))), _seeds(records), str(len(records))]
        rows.append([*row, _number(_hours(of_phase['tune'] + of_phase['final']), '.1f')])
    if not rows:
        return _NOTHING
    phases = [record['phase'] for record in study.records]
    head = ['regime', 'data', 'teacher', 'student', 'epochs']
    head += ['trials', 'their seeds', 'runs', 'final arms', 'their seeds', 'runs', 'CPU hours']
    return (
        f'{len(phases):,} runs: {phases.count("tune"):,} to tune, evaluated on validation images only, and '
        f'{phases.count("final"):,} final ones. {_hours(study.records):.1f} CPU hours in all, evaluation included, '
        f'training of the teachers not.\n\n{markdown_table(head, rows, text_columns=4)}'
    )


def _hours(records: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(record['cpu_s'] for record in records)) / 3600


def _main(study: Study) -> str:
    rows = {regime: [study.difference(regime, *pair) for pair in CONTRASTS] for regime in study.regimes('final')}
    rows = {regime: row for regime, row in rows.items() if any(row)}
    if not rows:
        return _NOTHING
    dearer = {
        f'{regime}, {arm}': [study.difference(regime, dual, arm) for dual in DUAL]
        for regime in rows
        for arm in study.dearer_kd(regime)
    }
    count = sum(summary is not None for row in (*rows.values(), *dearer.values()) for summary in row)
    parts = [_differences([f'{TITLES[arm]} - {TITLES[base]}' for arm, base in CONTRASTS], rows)]
    if dearer:
        titles = [f'{TITLES[dual]} - that KD' for dual in DUAL]
        parts += ['Against KD that trains longer, or after its teacher was fine-tuned:', _differences(titles, dearer)]
    return '\n\n'.join([
        *parts,
        'Test top-1 of the last epoch, in points: mean of the paired differences, in brackets its 95% interval by '
        "Student's t; wins are seeds with a difference above 0. Students of a seed start from the same weights and see "
        f'the same batches. The intervals are not corrected for there being {count} of them: with no effect anywhere, '
        'one in 20 would leave out 0.',
        *_images(study, 'differences', 'gap', 'cost'),
    ])


def _differences(titles: Sequence[str], rows: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> str:
    lines = []
    for name, row in rows.items():
        lines.append([name])
        for summary in row:
            lines[-1] += [_interval(summary), f'{summary["wins"]}/{summary["n"]}' if summary else '-']
    return markdown_table(['regime', *(word for title in titles for word in (title, 'wins'))], lines)


def _images(study: Study, *beginnings: str) -> list[str]:
    return [
        f'![{figure.caption}](results/{name})'
        for name, figure in figures(study).items()
        if name.startswith(beginnings)
    ]


def _of_regime(study: Study, kind: str, regime: str) -> str:
    makers: dict[str, Callable[[Study, str], str]] = {'final': _final, 'tuning': _tuning}
    return makers[kind](study, regime) if study.arms(regime, 'tune' if kind == 'tuning' else kind) else _NOTHING


def _final(study: Study, regime: str) -> str:
    arms = study.arms(regime)
    head = ['arm', 'options', 'epochs', 'n', 'val', 'test', 'train', 'path, test', '- kd', '- its base']
    head += ['FLOPs / kd', 'time / kd']
    rows = []
    for arm, records in arms.items():
        base = study.base(regime, arm)
        to_base = study.difference(regime, arm, base) if base else None
        rows.append([
            arm,
            options_text(records[0]['config']) or '-',
            str(records[0]['epochs']),
            str(len(records)),
            _number(mean(records, lambda r: r['val_top1'])),
            spread_text(summarise([record['test_top1'] for record in records])),
            _number(mean(records, lambda r: r['train_top1'])),
            _number(mean(records, lambda r: r['prompt_top1'])),
            _interval(study.difference(regime, arm, 'kd')),
            f'{base}: {_interval(to_base)}' if base and to_base else '-',
            _number(study.ratio(regime, arm, 'flops')),
            _number(study.ratio(regime, arm, 'wall_s')),
        ])
    every = [record for records in arms.values() for record in records]
    lines = [markdown_table(head, rows, text_columns=2), f'Seeds {_seeds(every)}.']
    if any('assistants' in record['config'] for record in every):
        lines.append('Training of the assistants is in the time and not in the FLOPs.')
    borrowed = [name for name in ('kd', 'dfpt') if name not in arms and study.find(regime, name)]
    if borrowed:
        others = ', '.join(study.alike(regime))
        lines.append(f'{" and ".join(borrowed)}: of the regime with the same set-up ({others}).')
    return '\n\n'.join([*lines, *_images(study, f'variants-{regime}.png')])


def _tuning(study: Study, regime: str) -> str:
    trials, chosen = study.arms(regime, 'tune'), study.chosen(regime).values()
    seeds = sorted({record['seed'] for records in trials.values() for record in records})
    rows = []
    for trial, records in trials.items():
        by_seed = {record['seed']: record['val_top1'] for record in records}
        values = [_number(by_seed.get(seed)) for seed in seeds]
        row = [trial.partition(':')[0], options_text(records[0]['config']), *values]
        row.append(_number(mean(records, lambda r: r['val_top1'])))
        rows.append([f'**{cell}**' for cell in row] if trial in chosen else row)
    lines = [markdown_table(['method', 'options', *(f'seed {seed}' for seed in seeds), 'mean'], rows, text_columns=2)]
    lines.append('Validation top-1. Bold: the best mean of a method, the first of equal ones.')
    if others := study.recorded_not_as_tuned(regime):
        lines.append('Final arms with other options than these:\n\n' + '\n'.join(f'- {line}' for line in others))
    return '\n\n'.join(lines)


def _inside(study: Study) -> str:
    parts = []
    for regime in study.regimes('final'):
        rows = []
        for arm, records in study.arms(regime).items():
            if arm == 'kd' or records[0]['config']['method'] in DUAL:
                # Of variants, which are many, what distinguishes them.
                splits = ('train', 'val') if ' ' in arm else ('train', 'val', 'test')
                rows += [_inside_row(arm, split, records) for split in splits]
        if rows:
            head = ['arm', 'images', 'top-1: teacher', 'path', 'student', 'entropy: teacher', 'path', 'student']
            head += ['confidence: teacher', 'path', 'student', 'KL to student: teacher', 'path']
            parts += [f'{regime}:', markdown_table(head, rows, text_columns=2)]
    if not parts:
        return _NOTHING
    parts.append(
        'Means over the seeds of the last epoch, images without augmentation, temperature 1, entropy and KL(path || '
        'student) in nats. path: the prompt path; teacher: the original path.'
    )
    return '\n\n'.join([*parts, *_images(study, 'inside')])


def _inside_row(arm: str, split: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    def value(who: str, key: str) -> float:
        return mean(records, lambda record: record['metrics'][split].get(who, {}).get(key))

    row = [arm, split]
    for key, form in (('top1', '.2f'), ('entropy', '.3f'), ('confidence', '.3f')):
        row += [_number(value(who, key), form) for who in ('teacher', 'prompt_path', 'student')]
    return [*row, *(_number(value(who, 'kl_to_student'), '.3f') for who in ('teacher', 'prompt_path'))]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 1 if `--check` finds a block that is not what the records give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--plan', type=Path, default=PLAN_FILE, help='the study (%(default)s)')
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the records (%(default)s)')
    parser.add_argument('--document', type=Path, default=DOCUMENT, help='document with the blocks (%(default)s)')
    parser.add_argument('--check', action='store_true', help='write nothing, say what is not up to date')
    args = parser.parse_args(argv)
    study = Study(Plan(args.plan, Path()), read_records(args.results))
    for regime in study.regimes('tune'):
        for line in study.not_as_tuned(regime):
            print(f'{regime}: final arm with other options than tuning chose: {line}')
    for line in study.unplanned():
        print(f'recorded: {line}')
    before = args.document.read_text(encoding='utf-8')
    after = rewrite(before, blocks(study))
    folder = args.document.parent / 'results'
    drawn = figures(study)
    if args.check:
        stale = [match['name'] for match in _BLOCK.finditer(after) if match[0] not in before]
        missing = [name for name in drawn if not (folder / name).is_file()]
        for name in (*stale, *missing):
            print(f'{args.document.name}: {name} is not what the records give; run python -m benchmarks.study.report')
        return 1 if stale or missing else 0
    args.document.write_text(after, encoding='utf-8')
    folder.mkdir(exist_ok=True)
    for name, figure in drawn.items():
        figure.save(folder / name)
    return 0


if __name__ == '__main__':
    sys.exit(main())
