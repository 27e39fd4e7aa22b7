"""`timm-dfpt evaluate`: a model measured on labelled images, with accuracy by class and calibration."""
from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

from ..data.datasets import load_split
from ..data.image_split import ImageSplit
from ..data.loader import create_loader
from ..hub.files import write_json
from ..hub.markdown import markdown_table
from ..job.cli import load_recipe
from ..job.devices import create_accelerator
from ..job.options import TrainConfig
from ..job.stopping import exit_code
from ..reports.analysis import class_counts
from ..reports.calibration import reliability
from ..reports.predictions import PredictionRecorder, SplitPredictions
from ..tasks.evaluation import SCORES, evaluate_together, score_of
from ..tasks.features import FeatureTask
from ..tasks.methods import METHODS
from ..training.build import evaluation_loaders, load_data
from ..training.run import Setup, measure
from ..training.run_folder import RunFolder
from ..training.statistics import TeacherStatistics
from .arguments import at_least, new_file
from .classifiers import HELP, Classifier, open_classifier, run_folder_of

__all__ = ['evaluate_classifier', 'evaluate_run', 'main']

# Classes that are printed; `--json` has all.
_SHOWN = 20
# What, besides all that is about the data, says how models are made and run; the rest is how they were trained.
_KEPT = (
    'method', 'adapt_statistics', 'teacher', 'teacher_checkpoint', 'teacher_kwargs', 'teacher_dtype',
    'teacher_input_size', 'seed', 'mixed_precision', 'channels_last', 'cpu',
)  # fmt: skip


def evaluate_run(folder: RunFolder, workers: int | None = None, cpu: bool = False) -> dict[str, Any]:
    """Measure the models of a finished run on its own data again, as at its end.

    On the machine, and with the number of processes, of the run the numbers are those of `summary.json` to the last
    bit, but with `--compile`, and but for `kl_to_student` where the moving average of a student is published.

    Args:
        folder: The run folder.
        workers: Loader processes, if not those of the run.
        cpu: Whether to stay on the CPU.

    Returns:
        By split (`val`, and `test` where there is one) `images`, and by model what `_described` returns.

    Raises:
        ValueError: If data or teacher of the run are not what they were, or what was measured is not saved.
    """
    summary, before = folder.read_summary(), TrainConfig(**load_recipe(folder.config))
    of_data = [field.name for field in dataclasses.fields(before) if field.metadata['group'] == 'data']
    options = {name: getattr(before, name) for name in (*of_data, *_KEPT)}
    options |= {'student': f'local-dir:{folder.student.resolve()}', 'student_pretrained': True}
    if METHODS[before.method].variant:
        # It brings the head along that it was tuned with.
        options['prompt_path'] = str(folder.prompt_path.resolve())
    else:
        options |= {name: getattr(before, name) for name in ('teacher_head', 'teacher_head_balanced')}
    if workers is not None:
        options['workers'] = workers
    options['cpu'] = before.cpu or cpu
    config = TrainConfig(**options)
    accelerator = create_accelerator(config)
    data = load_data(config, accelerator)
    if data.class_names != summary['class_names']:
        raise ValueError(
            f'dataset {config.dataset!r} has other classes than when the run was made: name what to measure on with '
            '--dataset.'
        )
    input_config = {key: tuple(v) if isinstance(v, list) else v for key, v in summary['input_config'].items()}
    loaders = evaluation_loaders(config, data, input_config, accelerator)
    recorder = PredictionRecorder(data.num_classes)
    setup = Setup(config, accelerator, input_config, data, {'train': [None], **loaders}, recorder)
    statistics = TeacherStatistics(data, input_config, loaders['val'], accelerator, folder.statistics)
    learners = setup.create_learners({config.method: config}, statistics, setup.teacher_heads(folder))
    for learner in learners:
        learner.eval()
        # Which without labels is what the features are compared through.
        if config.unlabelled and isinstance(learner.task, FeatureTask) and learner.task.extra_param_groups():
            raise ValueError(
                f'MODEL {str(folder)!r} learned features of another width without labels, through a linear layer that '
                'is not saved with it, so that they cannot be measured again: see its summary.json.'
            )
    (results,) = measure(setup, learners)
    said = recorder.result({(0, role): role for role in summary['models']})
    splits = {'val': data.val, **({'test': data.test} if data.test else {})}
    return {
        split: {
            'images': len(splits[split]),
            'models': {
                role: _described(measured[role], said.get(split), role, data.class_names)
                for role in summary['models']
                if role in measured
            },
        }
        for split, measured in results.items()
    }


def evaluate_classifier(
    classifier: Classifier, split: ImageSplit, batch_size: int = 128, workers: int = 0, cpu: bool = False
) -> dict[str, Any]:
    """Measure a model on labelled images.

    Args:
        classifier: The model.
        split: The images, with labels among the classes of the model.
        batch_size: Images per batch over all processes.
        workers: Loader processes.
        cpu: Whether to stay on the CPU.

    Returns:
        As `evaluate_run`, for one split and one model.
    """
    accelerator = Accelerator(cpu=cpu, dataloader_config=DataLoaderConfiguration(split_batches=True))
    classifier.to(accelerator.device)
    options: dict[str, Any] = {'data_config': classifier.data_config, 'is_training': False, 'passes': 1}
    loader = accelerator.prepare(create_loader(split, batch_size=batch_size, workers=workers, **options))
    recorder = PredictionRecorder(len(classifier.class_names))
    observe = recorder.start(split.name, len(split))

    def forward(images: torch.Tensor, known: Any) -> dict[str, torch.Tensor]:
        return {classifier.role: classifier.forward(images)}

    (measured,) = evaluate_together([forward], loader, accelerator, observe=observe)
    said = recorder.result({(0, classifier.role): classifier.role})
    described = _described(measured[classifier.role], said.get(split.name), classifier.role, classifier.class_names)
    return {split.name: {'images': len(split), 'models': {classifier.role: described}}}


def _described(
    metrics: Mapping[str, float], split: SplitPredictions | None, role: str, names: Sequence[str]
) -> dict[str, Any]:
    """Return `metrics` of a model, and where there are labels `calibration_error` and `classes`.

    The expected calibration error, in percent, is that of Guo et al., "On Calibration of Modern Neural Networks"
    (2017), with 15 bins of equal width. Of each class there are `name`, `images` and `accuracy`, which is `None`
    without an image.
    """
    described: dict[str, Any] = {'metrics': dict(metrics)}
    if split is None or role not in split.models or split.target is None:
        return described
    said, counts = split.models[role], class_counts(split, len(names))
    described['calibration_error'] = 100 * reliability(said.confidence, said.classes == split.target).error
    rows = zip(names, counts.images.tolist(), counts.accuracy(role).tolist(), strict=True)
    described['classes'] = [
        {'name': name, 'images': images, 'accuracy': accuracy if images else None} for name, images, accuracy in rows
    ]
    return described


def main(argv: Sequence[str] | None = None, program: str = 'timm-dfpt evaluate') -> int:
    """Evaluate from the command line.

    Args:
        argv: Arguments; `None` for those of the process.
        program: What the command was called as, for its help.

    Returns:
        The exit code: 0, 1 after an error reported in one line, or 128 and the number of a signal to stop.
    """
    parser = argparse.ArgumentParser(
        program, allow_abbrev=False,
        description='Measure a model on labelled images: accuracy, also by class, loss and calibration. A run folder '
        'without --dataset is measured on its own data, as at its end.',
    )  # fmt: skip
    add = parser.add_argument
    add('model', metavar='MODEL', help=HELP)
    add('--dataset', metavar='NAME', help='Hub id, folder of class folders, or parquet (default: that of the run)')
    add('--dataset-config', metavar='NAME', help='configuration name of the dataset')
    add('--dataset-revision', metavar='NAME', help='revision of the dataset on the Hub')
    add('--split', metavar='NAME', help='its split (default: test, else validation, else the only one)')
    add('--input-key', metavar='NAME', help='image column (default: found)')
    add('--target-key', metavar='NAME', help='label column (default: found)')
    add('--background', metavar='COLOR', help='color behind transparent images (default: as in training)')
    add('--batch-size', type=at_least(1), metavar='INT', help='batch size over all processes (>= 1; default: 128)')
    add('--workers', type=at_least(0), metavar='INT', help='loader processes (>= 0; default: 0, or those of the run)')
    add('--json', type=new_file, metavar='FILE', help='also write everything to this new file')
    add('--revision', metavar='NAME', help='branch, tag or commit of a model on the Hub')
    add('--base-model', metavar='NAME', help='teacher of a prompt path, if not the one that it names')
    add('--cpu', action='store_true', help='run on the CPU even where there is a GPU')

    def job() -> None:
        args = parser.parse_args(argv)
        run = run_folder_of(args.model)
        of_data = ('dataset_config', 'dataset_revision', 'split', 'input_key', 'target_key', 'background')
        given = [name for name in (*of_data, 'batch_size', 'revision', 'base_model') if getattr(args, name) is not None]
        if args.dataset is None:
            if run is None:
                raise ValueError(
                    f'dataset is not given: name labelled images with --dataset; only a run folder has its own, and '
                    f'{args.model!r} is none.'
                )
            if given:
                raise ValueError(f'{given[0]} needs --dataset: without it the data and options of the run count.')
            splits = evaluate_run(run, args.workers, args.cpu)
        else:
            options: dict[str, Any] = {'revision': args.revision} if args.revision else {}
            classifier = open_classifier(args.model, args.base_model, **options)
            chosen = {name: getattr(args, name) for name in of_data if name in given}
            chosen.setdefault('background', classifier.background)
            split = load_split(args.dataset, classifier.class_names, **chosen)
            splits = evaluate_classifier(classifier, split, args.batch_size or 128, args.workers or 0, args.cpu)
        if not Accelerator().is_main_process:
            return
        for name, found in splits.items():
            print(_shown(name, found))
        if args.json:
            write_json(args.json, {'format_version': 1, 'model': args.model, 'splits': splits})

    return exit_code(job, 'give the same command again')


def _shown(split: str, found: Mapping[str, Any]) -> str:
    """Return what was found on a split as text."""
    models: dict[str, Any] = found['models']
    score = next((score for score in map(score_of, (m['metrics'] for m in models.values())) if score), None)
    keys = [key for key in ('top1', 'top5', 'loss', 'confidence') if any(key in m['metrics'] for m in models.values())]
    keys = [score, *keys] if score and score not in keys else keys
    titles = {'top5': 'top-5 %', **SCORES}
    head = ['model', *(titles.get(key, key) for key in keys), 'calibration error %']
    rows = []
    for role, model in models.items():
        cells = [_cell(model['metrics'].get(key), 4 if key in ('loss', 'confidence') else 2) for key in keys]
        rows.append([role, *cells, _cell(model.get('calibration_error'), 2)])
    text = [f'{split}: {found["images"]:,} images', markdown_table(head, rows, pad=True)]
    classes = {role: model['classes'] for role, model in models.items() if 'classes' in model}
    if classes:
        last = [*classes.values()][-1]
        # The student's worst first, or the only model's.
        order = sorted((i for i, each in enumerate(last) if each['images']), key=lambda i: last[i]['accuracy'])
        rows = [
            [last[i]['name'], f'{last[i]["images"]:,}', *(_cell(each[i]['accuracy'], 2) for each in classes.values())]
            for i in order[:_SHOWN]
        ]
        more = f' (the worst {_SHOWN} of {len(order):,}; --json has all)' if len(order) > _SHOWN else ''
        text += [f'accuracy by class in %{more}', markdown_table(['class', 'images', *classes], rows, pad=True)]
    return '\n'.join(text) + '\n'


def _cell(value: float | None, digits: int) -> str:
    return '-' if value is None else f'{value:.{digits}f}'
