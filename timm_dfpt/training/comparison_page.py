"""The page about a comparison: methods and seeds, with intervals."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..hub.files import write_text
from ..hub.privacy import public, public_command
from ..reports import figures
from ..reports.analysis import class_counts, confusions
from ..reports.calibration import calibrate
from ..reports.intervals import difference_text, spread_text, summarise
from ..reports.names import shown
from ..reports.page import Block, Page, Section, code, render, table, text
from ..reports.page import figures as figure_block
from ..reports.predictions import PredictionRecorder, SplitPredictions, read_predictions, write_predictions
from ..reports.sections import pick_classes, words
from ..tasks.evaluation import SCORES
from .learner import Learner
from .plots import curves_of_seeds, loss_terms, over_seeds
from .report import arms_cells, attempt, comparison_notes
from .run_folder import ComparisonFolder, RunFolder

__all__ = ['comparison_page', 'keep_arm_predictions', 'write_comparison_page']

_CONFUSIONS = 15
_LOSS_FIGURES = 8


def keep_arm_predictions(recorder: PredictionRecorder, learners: Sequence[Learner], folder: RunFolder) -> None:
    """Write what the students of one seed, and their teacher, predicted in the evaluation; what fails is a warning."""
    names = {(0, 'teacher'): 'teacher'}
    for number, learner in enumerate(learners):
        if not learner.config.unlabelled or learner.task.compares_logits:
            names[number, learner.published] = learner.name
    attempt(
        'writing the predictions', lambda: write_predictions(folder.predictions, recorder.result(names), {})
    )


def write_comparison_page(folder: ComparisonFolder, result: Mapping[str, Any]) -> Path:
    """Write the page about a comparison, from its result and what is in its folder.

    Returns:
        The file.
    """
    write_text(folder.report, render(comparison_page(folder, result)))
    return folder.report


def comparison_page(folder: ComparisonFolder, result: Mapping[str, Any]) -> Page:
    """Return the page about a comparison."""
    split, arms, reference, seeds = result['eval_split'], list(result['arms']), result['reference'], result['seeds']
    runs = [folder.seed(seed) for seed in seeds]
    summaries = [run.read_summary() for run in runs]
    files = [run.predictions for run in runs]
    said = [read_predictions(file)[0] for file in files] if all(file.is_file() for file in files) else []
    splits = [each[split] for each in said if split in each]
    whole = len(splits) == len(runs) and all(set(arms) <= set(each.models) for each in splits)
    colors = {name: i for i, name in enumerate([reference, *(arm for arm in arms if arm != reference)])}
    sizes, student = result['dataset_sizes'], shown(public(result['student'], local=True))
    where = f'the {sizes[split]:,} images of the {"test" if split == "test" else "validation"} data'
    sections = [_results(result), _curves([run.read_metrics() for run in runs], arms, colors)]
    if whole and all(each.target is not None for each in splits):
        names = summaries[0]['class_names']
        sections += [
            _classes(splits, names, arms, reference, where),
            _confusions(splits, names, arms, where),
            _calibration([each.get('val', each[split]) for each in said], splits, split, arms),
        ]
    sections += [_time(summaries), _configuration(result)]
    return Page(
        title=f'{student} on {shown(public(result["dataset"], local=True))}',
        kind='Comparison',
        summary=(
            f'{len(arms)} ways to train {student}, {len(seeds)} seed{"s" if len(seeds) > 1 else ""}, '
            f'{result["epochs"]:,} epochs on {sizes["train"]:,} images; compared with {reference}.'
        ),
        tiles=[_tile(name, arm, split) for name, arm in result['arms'].items()],
        sections=sections,
        footer=f'timm_dfpt {result["versions"]["timm_dfpt"]}',
    )


def _tile(name: str, arm: Mapping[str, Any], split: str) -> tuple[str, str, str]:
    found = arm[split]
    spread = '' if found['sd'] is None else f'+- {found["sd"]:.2f} over the seeds'
    return name, f'{found["mean"]:.2f}', f'{split} {SCORES[found["score"]]} {spread}'


def _results(result: Mapping[str, Any]) -> Section:
    split, reference = result['eval_split'], result['reference']
    head, rows = arms_cells(result)
    rows = [[cell if i != 1 else shown(public(cell), 120) for i, cell in enumerate(row)] for row in rows]
    blocks: list[Block] = [table(head, rows, text_columns=2)]
    differences = {}
    for name, arm in result['arms'].items():
        found = arm[split].get('difference')
        if found is not None:
            interval = found['interval']
            differences[name] = (found['mean'], None if interval is None else (interval[0], interval[1]))
    if differences:
        draw = figures.interval_figure(differences, f'{split}: points above {reference}')
        caption = f'Differences to {reference}' + (', with 95% intervals.' if len(result['seeds']) > 1 else '.')
        blocks.append(figure_block(figures.Drawing(draw, caption, (5.0, 0.8 + 0.3 * len(differences)))))
    teacher = result['teacher']
    if teacher is not None and 'top1' in (teacher['metrics'] or {}):
        blocks.append(text(f'Teacher: {split} top-1 {teacher["metrics"]["top1"]:.2f}%.'))
    return Section('results', 'Results', [*blocks, *map(text, comparison_notes(result))])


def _curves(
    runs: Sequence[Sequence[Mapping[str, Any]]], arms: Sequence[str], colors: Mapping[str, int]
) -> Section:
    lines, label = curves_of_seeds(runs, arms)
    spread = 'mean over the seeds, and from the lowest to the highest.' if len(runs) > 1 else 'one seed.'
    drawn = []
    if lines:
        draw = figures.line_figure(lines, label, colors=colors)
        drawn.append(figures.Drawing(draw, f'{label} on the validation data: {spread}'))
    for arm in arms[:_LOSS_FIGURES]:
        terms = [loss_terms(run, arm) for run in runs]
        shared = [label for label in terms[0] if all(label in each for each in terms)]
        losses = [over_seeds([each[label][1] for each in terms], label, terms[0][label][0]) for label in shared]
        caption = f'Loss of {arm} in training, and its terms before they are weighted: {spread}'
        drawn.append(figures.Drawing(figures.line_figure(losses, 'nats', log=True), caption))
    rest = len(arms) - _LOSS_FIGURES
    note = [text(f'Losses of the first {_LOSS_FIGURES} arms; {rest} more are in metrics.jsonl.')] if rest > 0 else []
    return Section('curves', 'Curves', [figure_block(*drawn), *note])


def _classes(
    splits: Sequence[SplitPredictions], names: Sequence[str], arms: Sequence[str], reference: str, where: str
) -> Section:
    counts = [class_counts(split, len(names)) for split in splits]
    percents = {arm: torch.stack([each.accuracy(arm) for each in counts]) for arm in arms}
    seen = torch.stack([each.images for each in counts]).amin(dim=0)
    others = [arm for arm in arms if arm != reference]
    gap = percents[others[0]].mean(dim=0) - percents[reference].mean(dim=0) if others else percents[reference].mean(0)
    order = [int(i) for i in gap.argsort(stable=True) if seen[i]]
    chosen = pick_classes(order)
    rows = []
    for i in chosen:
        row = [shown(names[i]), f'{int(seen[i]):,}', spread_text(summarise(percents[reference][:, i].tolist()), 1)]
        for arm in others:
            difference = summarise((percents[arm][:, i] - percents[reference][:, i]).tolist())
            row += [f'{float(percents[arm][:, i].mean()):.1f}', difference_text(difference, digits=1)]
        rows.append(row)
    head = ['class', 'images', f'{reference} %']
    for arm in others:
        head += [f'{arm} %', f'{arm} - {reference}']
    note = f'On {where}' + (f', sorted by {others[0]} minus {reference}.' if others else '.')
    if len(splits) > 1:
        note += " In brackets the 95% interval by Student's t over the seeds; it is not corrected for many classes."
    if len(chosen) < len(order):
        note += f' {len(chosen)} of {len(order):,} classes: those at either end.'
    return Section('classes', 'Accuracy by class', [table(head, rows, note=note)])


def _confusions(
    splits: Sequence[SplitPredictions], names: Sequence[str], arms: Sequence[str], where: str
) -> Section:
    found: dict[str, list[dict[tuple[int, int], int]]] = {}
    for arm in arms:
        found[arm] = []
        for split in splits:
            assert split.target is not None
            each = confusions(split.models[arm], split.target, len(names))
            found[arm].append({(confusion.target, confusion.predicted): confusion.count for confusion in each})
    totals: dict[tuple[int, int], int] = {}
    for seeds in found.values():
        for seed in seeds:
            for pair, count in seed.items():
                totals[pair] = totals.get(pair, 0) + count
    first = sorted(totals, key=lambda pair: (-totals[pair], pair))[:_CONFUSIONS]
    rows = [
        [
            shown(names[a]), shown(names[b]),
            *(spread_text(summarise([seed.get((a, b), 0) for seed in found[arm]]), 1) for arm in arms),
        ]
        for a, b in first
    ]
    cut = f' The first {len(first)} of {len(totals):,} pairs, by all arms together.' if len(totals) > len(first) else ''
    note = f'Images, on {where}; mean over the seeds.{cut}'
    head = ['images of', 'taken for', *arms]
    return Section('confusions', 'Costliest confusions', [table(head, rows, note=note, text_columns=2)] if rows else [])


def _calibration(
    fitted: Sequence[SplitPredictions], splits: Sequence[SplitPredictions], split: str, arms: Sequence[str]
) -> Section:
    rows = []
    for arm in arms:
        pairs = zip(fitted, splits, strict=True)
        every = [calibrate(arm, val, each if split != 'val' else None) for val, each in pairs]
        known = [each for each in every if each is not None]
        if not known or len(known) < len(every):
            continue
        columns: list[Callable[[Any], float]] = [
            lambda c: 100 * c.before.error, lambda c: 100 * c.after.error, lambda c: c.temperature
        ]  # fmt: skip
        rows.append([words(arm), *(spread_text(summarise([column(each) for each in known])) for column in columns)])
    head = ['arm', 'ECE %', 'ECE % after', 'temperature']
    where = 'a random half of the validation data, measured on the rest of them'
    if split != 'val':
        where = 'the validation data, measured on the test data'
    note = f'Expected calibration error before and after a temperature that is fitted on {where}.'
    return Section('calibration', 'Calibration', [table(head, rows, note=note)] if rows else [])


def _time(summaries: Sequence[Mapping[str, Any]]) -> Section:
    known = [summary['phases'] for summary in summaries if summary.get('phases')]
    if not known or len(known) < len(summaries):
        return Section('time', 'Time', [])
    parts = list(dict.fromkeys(part for each in known for part in each))
    rows = [[words(part), spread_text(summarise([each.get(part, 0.0) for each in known]), 1)] for part in parts]
    return Section('time', 'Time', [table(['part of the run of a seed', 'seconds'], rows)])


def _configuration(result: Mapping[str, Any]) -> Section:
    arms = '\n'.join(
        f'{name}: ' + ', '.join(f'{key}={public(value)}' for key, value in arm['options'].items())
        for name, arm in result['arms'].items()
    )
    versions = [[name, version] for name, version in result['versions'].items()]
    blocks = [code('Arms', arms), table(['package', 'version'], versions, 'Versions', text_columns=2)]
    if result['command']:
        blocks.append(code('Command', public_command(result['command'], {})))
    return Section('configuration', 'Configuration', blocks)
