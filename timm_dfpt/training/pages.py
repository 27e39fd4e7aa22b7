"""The page about a run: `report.html` at its end, and again from its folder by `timm-dfpt report`."""
from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..data.loader import ImageDataset
from ..hub.export_table import export_cells
from ..hub.files import read_json, write_text
from ..hub.privacy import public
from ..job.stopping import exit_code
from ..reports import figures
from ..reports.analysis import groups
from ..reports.names import shown
from ..reports.page import Block, Page, Section, code, render, table, text
from ..reports.page import figures as figure_block
from ..reports.predictions import PredictionRecorder, SplitPredictions, read_predictions, write_predictions
from ..reports.sections import (
    IMAGES,
    agreement_section,
    calibration_section,
    classes_section,
    confusion_section,
    images_section,
    words,
)  # fmt: skip
from ..reports.thumbnails import thumbnails
from ..tasks.evaluation import SCORES, score_of
from .comparison_page import write_comparison_page
from .learner import Learner
from .plots import loss_terms, score_lines
from .report import attempt, closing_cells, student_of, verdicts
from .run_facts import chosen_epoch, read_run
from .run_folder import ComparisonFolder, RunFolder

__all__ = ['draw_card_figures', 'main', 'run_page', 'write_page', 'write_run_report']

_PHASES = {
    'setup': 'data and models', 'teacher_evaluation': 'evaluating the teacher', 'training': 'training and validation',
    'evaluation': 'evaluation at the end', 'export': 'export', 'costs': 'measuring costs',
}  # fmt: skip
_NOT_SHOWN = ('output', 'resume')


def write_run_report(
    recorder: PredictionRecorder,
    val: ImageDataset,
    input_config: Mapping[str, Any],
    learners: Sequence[Learner],
    folder: RunFolder,
) -> None:
    """Write predictions and page of a run that has just ended; what fails is a warning.

    Args:
        recorder: What was said in the evaluation at the end.
        val: The validation data, as they are evaluated.
        input_config: timm's data config of the run.
        learners: The learners; the page is about the first.
        folder: The run folder.
    """
    names = {(0, role): role for role in ('teacher', 'prompt_path')}
    for number, learner in enumerate(learners):
        if learner.config.unlabelled and not learner.task.compares_logits:
            # What was evaluated are features.
            continue
        names[number, learner.published] = 'student' if number == 0 else student_of(learner.name)
    attempt('writing the predictions', lambda: _keep_predictions(recorder.result(names), val, input_config, folder))
    attempt('writing the report', lambda: write_page(folder))


def _keep_predictions(
    splits: Mapping[str, SplitPredictions], val: ImageDataset, input_config: Mapping[str, Any], folder: RunFolder
) -> None:
    """Write predictions, and small images of what the page shows of them."""
    images: dict[int, bytes] = {}
    said = splits.get('val')
    if said is not None and 'student' in said.models:
        chosen = [row for group in groups(said, 'student', _other(said), IMAGES) for row in group.rows]
        images = thumbnails(val, chosen, input_config['mean'], input_config['std'])
    write_predictions(folder.predictions, splits, images)


def _other(split: SplitPredictions) -> str | None:
    """Return what the student is compared with: the teacher, or the path if the teacher knows other classes."""
    return next((name for name in ('teacher', 'prompt_path') if name in split.models), None)


def write_page(folder: RunFolder) -> Path:
    """Write the page about a finished run, from what is in its folder.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If the run is not finished.
    """
    write_text(folder.report, render(run_page(folder)))
    return folder.report


def run_page(folder: RunFolder) -> Page:
    """Return the page about a run."""
    facts, recipe = read_run(folder)
    summary = read_json(folder.summary)
    for model in (*summary['models'].values(), *summary['baselines'].values()):
        model['name'] = shown(public(model['name'], local=True))
    splits, images = read_predictions(folder.predictions) if folder.predictions.is_file() else ({}, {})
    names, split = summary['class_names'], summary['eval_split']
    where = f'the {summary["dataset_sizes"][split]:,} images of the {"test" if split == "test" else "validation"} data'
    order = ['teacher', 'prompt_path', 'student', *map(student_of, summary['baselines'])]
    # The student's color is the first, whatever else there is.
    numbers = {'student': 0, 'prompt_path': 1, 'teacher': 2}
    colors = {name: numbers.get(name, i) for i, name in enumerate(order) if name in (*summary['models'], *order[3:])}
    sections = [_results(summary), _curves(folder.read_metrics(), colors, summary)]
    said = splits.get(split)
    if said is not None and 'student' in said.models:
        other = _other(said)
        others = [name for name in colors if name != 'student' and name in said.models]
        sections += [
            classes_section(said, where, names, 'student', other, colors),
            agreement_section(said, where, 'student', others),
            confusion_section(said, where, names, 'student', others),
        ]
        val = splits.get('val', said)
        calibrated = {name: number for name, number in colors.items() if name in said.models}
        measured = said if split != 'val' else None
        sections.append(calibration_section(val, measured, where, 'student', calibrated))
        if 'val' in splits:
            sections.append(images_section(val, images, names, 'student', _other(val)))
    sections += [_cost(summary), _exports(summary), _configuration(facts, recipe)]
    teacher = f', distilled from {shown(facts.teacher)}' if facts.teacher else ''
    student = summary['models']['student']['name']
    sizes = summary['dataset_sizes']
    return Page(
        title=f'{student} on {shown(public(facts.dataset, local=True))}',
        kind='Run report',
        summary=(
            f'{student}{teacher}, method {summary["method"]}, {summary["epochs"]:,} epochs on {sizes["train"]:,} '
            f'images of {len(names):,} classes, seed {summary["seed"]}.'
        ),
        tiles=_tiles(summary),
        sections=sections,
        footer=f'One run: another seed may give other numbers. timm_dfpt {summary["versions"]["timm_dfpt"]}',
    )


def draw_card_figures(folder: RunFolder, target: Path) -> dict[Path, str]:
    """Draw what a model card shows of the page about a run.

    Args:
        folder: The run folder.
        target: Where to write the figures.

    Returns:
        What they are, by their files.
    """
    drawings = {section.key: section.drawing for section in run_page(folder).sections}
    found = {}
    for key, title in (('classes', 'Accuracy by class.'), ('calibration', '')):
        drawing = drawings.get(key)
        if drawing is not None:
            figures.save(drawing, target / f'{key}.png')
            found[target / f'{key}.png'] = f'{title} {drawing.caption}'.strip()
    return found


def _results(summary: Mapping[str, Any]) -> Section:
    head, rows = closing_cells(summary)
    size = f'{summary["dataset_sizes"][summary["eval_split"]]:,} images'
    note = f'Measured on {size} at the end of the run; images/s on the machine of the run.'
    chosen = chosen_epoch(summary)
    blocks = [table(head, rows, note=note), *map(text, verdicts(summary))]
    if chosen is not None:
        blocks.append(text(f'{chosen[0].upper()}{chosen[1:]}.'))
    if score_of(summary['models']['student']['metrics']) != 'top1':
        blocks.append(text('The data have no labels: accuracy, confusions and calibration are left out.'))
    return Section('results', 'Results', blocks)


def _curves(lines: Sequence[Mapping[str, Any]], colors: Mapping[str, int], summary: Mapping[str, Any]) -> Section:
    learners = [name for name, value in lines[0].items() if isinstance(value, Mapping)]
    drawn: list[figures.Drawing] = []
    scores, label = score_lines(lines)
    if scores:
        numbers = {words(name): number for name, number in colors.items()}
        free = [number for number in range(len(figures.COLORS)) if number not in numbers.values()] or [0]
        for i, line in enumerate(line for line in scores if line.label not in numbers):
            numbers[line.label] = free[i % len(free)]
        draw = figures.line_figure(scores, label, colors=numbers)
        drawn.append(figures.Drawing(draw, f'{label} on the validation data.'))
    for learner in learners:
        terms = [figures.Line(label, *values) for label, values in loss_terms(lines, learner).items()]
        caption = f'Training loss of {learner}, and its unweighted terms.'
        drawn.append(figures.Drawing(figures.line_figure(terms, 'nats', log=True), caption))
    return Section('curves', 'Curves', [figure_block(*drawn)])


def _cost(summary: Mapping[str, Any]) -> Section:
    models = {**summary['models'], **{student_of(k): v for k, v in summary['baselines'].items()}}
    first = next((name for name in ('teacher', 'student') if name in models), None)
    keys = {'params': 'parameters', 'macs': 'MACs per image', 'size_bytes': 'bytes on disk', 'images_per_s': 'images/s'}
    base = (models[first].get('cost') or {}) if first else {}
    costs: dict[str, Any] = {}
    for name, model in models.items():
        deployed = 'cost_as_trained' in model
        costs[f'{name}, deployed' if deployed else name] = model.get('cost') or {}
        if deployed:
            costs[f'{name}, as trained'] = model['cost_as_trained'] or {}
    rows = []
    for name, cost in costs.items():
        row = [words(name)]
        for key in keys:
            value, of = cost.get(key), base.get(key)
            share = f' ({100 * value / of:.3g}%)' if value and of and name != first else ''
            row.append('-' if value is None else f'{value:,.0f}{share}')
        rows.append(row)
    relative = f'In brackets: of the {words(first)}. ' if first == 'teacher' else ''
    note = f'{relative}The size of a prompt path is that of its own file; images/s on the machine of the run.'
    blocks = [table(['model', *keys.values()], rows, note=note)]
    phases = summary.get('phases') or {}
    if phases:
        total = sum(phases.values())
        cells = [[_PHASES.get(k, words(k)), f'{v:,.1f}', f'{100 * v / total:.1f}%'] for k, v in phases.items()]
        note = 'Of a run that was resumed: training in all, the rest since then.'
        cells.append(['together', f'{total:,.1f}', ''])
        blocks.append(table(['part of the run', 'seconds', 'share'], cells, 'Time', note))
    return Section('cost', 'Cost', blocks)


def _exports(summary: Mapping[str, Any]) -> Section:
    """Return the files that the student was exported to."""
    head, rows = export_cells(summary.get('exports') or [])
    return Section('exports', 'Exported files', [table(head, rows, text_columns=2)] if rows else [])


def _configuration(facts: Any, recipe: Mapping[str, Any]) -> Section:
    versions = [[name, version] for name, version in facts.versions.items()]
    chosen = {key: value for key, value in facts.recipe.items() if value not in (None, [], {})}
    everything = {key: value for key, value in recipe.items() if key not in _NOT_SHOWN}
    blocks: list[Block] = [code('Options that differ from the defaults', _yaml(chosen))]
    blocks.append(code('All options', _yaml(everything), closed=True))
    blocks.append(table(['package', 'version'], versions, 'Versions', text_columns=2))
    if facts.command:
        blocks.append(code('Command', facts.command))
    return Section('configuration', 'Configuration', blocks)


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(public(dict(values), local=True), sort_keys=False, default_flow_style=None, width=100).strip()


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    student, teacher = summary['models']['student'], summary['models'].get('teacher')
    split, tiles = summary['eval_split'], []
    metrics = student['metrics'] or {}
    score = score_of(metrics)
    if score is not None:
        note = ''
        other = ((teacher or {}).get('metrics') or {}).get(score) if score == 'top1' else None
        if other is not None:
            note = f'{metrics[score] - other:+.2f} points against the teacher'
        tiles.append((f'{split} {SCORES[score]}', f'{metrics[score]:.2f}', note))
    for method, model in summary['baselines'].items():
        other = (model['metrics'] or {}).get(score) if score else None
        if score is not None and other is not None:
            tiles.append((f'against {method}', f'{metrics[score] - other:+.2f}', f'points; {method} has {other:.2f}'))
    cost, of = student.get('cost') or {}, (teacher or {}).get('cost') or {}
    for key, title in (('params', 'parameters'), ('images_per_s', 'images/s')):
        if cost.get(key):
            share = f'{100 * cost[key] / of[key]:.3g}% of the teacher' if of.get(key) else ''
            tiles.append((title, f'{cost[key]:,.0f}', share))
    return tiles


def main(argv: Sequence[str] | None = None, program: str = 'timm-dfpt report') -> int:
    """Write the page about a finished run from the command line.

    Args:
        argv: Arguments; `None` for those of the process.
        program: What the command was called as, for its help.

    Returns:
        The exit code: 0, 1 after an error reported in one line, or 128 and the number of a signal to stop.
    """
    about = 'Write report.html in the folder of a finished run or comparison.'
    parser = argparse.ArgumentParser(program, description=about, allow_abbrev=False)
    parser.add_argument('run_dir', metavar='RUN_DIR', help='folder of a finished run or comparison')

    def job() -> None:
        path = parser.parse_args(argv).run_dir
        comparison = ComparisonFolder(path)
        if comparison.result.is_file():
            print(write_comparison_page(comparison, read_json(comparison.result)))
        else:
            print(write_page(RunFolder(path)))

    return exit_code(job, 'the run folder is as it was, and the same command tries again')
