"""The main job, from options to a run folder; in several processes `accelerate launch -m timm_dfpt.training.run`."""
from __future__ import annotations

import dataclasses
import functools
import logging
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from timm_dfpt_cli import start

from ..data.datasets import DataSplits
from ..data.fingerprint import describe_data
from ..deploy.measure import check_formats
from ..deploy.onnx_files import EXTRA, missing_packages
from ..hub.config import check_data_config, check_label_names
from ..hub.export_table import exports_table
from ..hub.privacy import public
from ..job.cli import DEFAULT_RECIPE, command_line, parse_config
from ..job.devices import create_accelerator, is_sharding, on_main
from ..job.optim import describe_average, describe_decay
from ..job.options import TrainConfig
from ..job.stopping import exit_code
from ..reports.predictions import PredictionRecorder
from ..tasks.evaluation import evaluate_together
from ..version import __version__
from .best import check_choice
from .build import create_learners, create_loaders, create_mixup, load_data, resolve_input_config, with_batch_size
from .checkpoint import describe_teachers
from .export import Results, check_export, describe_models, export, export_student
from .first_reading import FirstReading
from .kept_logits import keep_logits
from .learner import Learner
from .models import create_teacher
from .pages import write_run_report
from .phases import Phases
from .plots import plot_curves
from .publish import check_targets, publish_at_end
from .report import attempt, closing_table, verdicts
from .run_facts import chosen_epoch
from .run_folder import RunFolder, claimed
from .runtimes import export_files
from .statistics import TeacherStatistics
from .teacher_heads import TeacherHeads, read_heads, write_heads
from .teacher_precision import compare_precision
from .teacher_report import report_teachers
from .trainer import Trainer

__all__ = [
    'Setup', 'close', 'describe', 'example_batch', 'export_and_measure', 'main', 'measure', 'run', 'set_up',
    'train_side_by_side',
]  # fmt: skip

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, program: str = 'timm-dfpt distill') -> int:
    """Run the main job from the command line. Without `--config` and `--dataset` it is the quickstart.

    Args:
        argv: Arguments; `None` for those of the process.
        program: What the command was called as, for its help and for the record.

    Returns:
        The exit code: 0, 1 after an error reported in one line, or 128 and the number of a signal to stop.
    """
    about = (
        'Train a student with a dual-forward path teacher (DFPT-KD), or by another method. Without --config and '
        f'--dataset it uses the recipe {DEFAULT_RECIPE} as defaults.'
    )
    command = command_line(program, argv)
    return exit_code(lambda: run(parse_config(argv, DEFAULT_RECIPE, about, program), command))


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all students of a run share.

    Args:
        config: The options, with the batch size that was chosen if none was given.
        accelerator: Devices and processes.
        input_config: timm's data config, see `resolve_input_config`.
        data: The splits.
        loaders: Loaders of `train`, `val`, and `test` where there are test images.
        recorder: Notes what is said of each image in the evaluation at the end, for the report.
        phases: Seconds that parts of the run have taken, by name.
    """

    config: TrainConfig
    accelerator: Accelerator
    input_config: dict[str, Any]
    data: DataSplits
    loaders: dict[str, Any]
    recorder: PredictionRecorder | None = None
    phases: Phases = dataclasses.field(default_factory=Phases)

    @property
    def eval_split(self) -> str:
        """The split that is evaluated at the end."""
        return 'test' if 'test' in self.loaders else 'val'

    def create_learners(
        self,
        arms: Mapping[str, TrainConfig],
        statistics: TeacherStatistics | None = None,
        heads: TeacherHeads | None = None,
    ) -> list[Learner]:
        """Create learners from options by name, their teachers with heads and statistics; see `create_learners`."""
        heads = heads or self.teacher_heads()
        steps = len(self.loaders['train'])
        arms = {name: dataclasses.replace(arm, batch_size=self.config.batch_size) for name, arm in arms.items()}
        adapt = statistics.adapt if statistics is not None else None
        return create_learners(arms, self.data.class_names, self.input_config, self.accelerator, steps, heads, adapt)

    def teacher_heads(self, folder: RunFolder | None = None) -> TeacherHeads:
        """Return what gives teachers heads for these classes: those that a run folder has, or new ones."""
        known = read_heads(folder.teacher_heads) if folder is not None else {}
        return TeacherHeads(self.data.class_names, self.data.train, self.input_config, self.accelerator, known)


def set_up(config: TrainConfig, accelerator: Accelerator | None = None) -> Setup:
    """Open devices and data.

    Args:
        config: The options.
        accelerator: The devices, where they are open already.

    Raises:
        ValueError: If an option does not fit the devices, the data or the student.
    """
    start = time.perf_counter()
    accelerator = accelerator or create_accelerator(config)
    set_seed(config.seed)
    input_config = resolve_input_config(config)
    data = load_data(config, accelerator)
    tested = f', {len(data.test):,} to test on' if data.test else ''
    accelerator.print(
        f'data: {config.dataset}: {data.num_classes} classes{" of the teacher" if config.unlabelled else ""}, '
        f'{len(data.train):,} images to train on, '
        f'{len(data.val):,} to validate on ({data.val_from}){tested}'
    )
    check_choice(config, config.unlabelled or data.val.labelled, is_sharding(accelerator))
    config = with_batch_size(config, len(data.train), accelerator)
    loaders = create_loaders(config, data, input_config, accelerator)
    # What no student could be exported with is refused before it is trained.
    check_data_config({key: list(value) if isinstance(value, tuple) else value for key, value in input_config.items()})
    check_label_names(data.class_names, data.num_classes)
    updates = -(-len(loaders['train']) // config.grad_accum_steps)
    decay = describe_decay(updates, config.lr, **config.schedule)
    average = None
    if config.model_ema:
        average = describe_average(config.epochs * updates, config.model_ema_decay, config.model_ema_warmup)
    for warning in filter(None, (decay, average)):
        if accelerator.is_main_process:
            _logger.warning(warning)
    recorder = PredictionRecorder(data.num_classes) if config.report and data.num_classes else None
    return Setup(config, accelerator, input_config, data, loaders, recorder, Phases(setup=time.perf_counter() - start))


def run(config: TrainConfig, command: str = '') -> dict[str, Any]:
    """Train a student as `config` says, and leave a run folder.

    Args:
        config: The options.
        command: How the run was started, for the record.

    Returns:
        What `summary.json` holds.

    Raises:
        InUseError: If another job works in the folder.
        ValueError: If an option does not fit the data or the models; nothing has been trained then.
    """
    check_targets(config.push_to_hub, config.push_prompt_path)
    check_formats(config.export)
    accelerator = create_accelerator(config)
    with claimed(config, accelerator) as folder:
        return _run(folder.resumed(config), folder, accelerator, command)


def _run(config: TrainConfig, folder: RunFolder, accelerator: Accelerator, command: str) -> dict[str, Any]:
    arms = {config.method: dataclasses.replace(config, baselines=[])}
    for method in config.baselines:
        arms[method] = config.for_method(method, output=str(folder.baseline(method)))
    setup = set_up(config, accelerator)
    learners, seconds = train_side_by_side(setup, arms, folder, command)
    results = export_and_measure(setup, learners, folder, command)
    summary: dict[str, Any] = {}
    if setup.accelerator.is_main_process:
        with setup.phases.timed('costs'):
            example = attempt('loading images to measure costs with', lambda: example_batch(setup))
            models = describe_models(learners, results, setup.eval_split, example)
        precision = learners[0].precision
        summary = {
            **describe(setup, command),
            **({'teacher_precision': precision} if precision is not None else {}),
            'epochs_trained': len(folder.read_metrics()),
            'eval_split': setup.eval_split,
            'train_seconds': seconds,
            'phases': setup.phases,
            'models': models.pop(config.method),
            'baselines': {name: each['student'] for name, each in models.items()},
        }
        folder.write_summary(summary)
        if config.export:
            exports = attempt('exporting', lambda: export_files(setup.config, setup.data, setup.input_config, folder))
            summary['exports'] = exports or []
            folder.write_summary(summary)
        title = f'{config.method}: {public(config.student, local=True)}'
        attempt('drawing the curves', lambda: plot_curves(folder.read_metrics(), folder.curves, title))
        if setup.recorder is not None:
            write_run_report(setup.recorder, setup.loaders['val'].dataset, setup.input_config, learners, folder)
        for line in filter(None, (closing_table(summary), chosen_epoch(summary), *verdicts(summary))):
            print(line)
        if summary.get('exports'):
            print(exports_table(summary['exports'], pad=True))
        elif not config.export and missing_packages():
            print(
                f'for ONNX files, measured in onnxruntime: {EXTRA}, then the same command with --resume --export onnx'
            )
        print(f'student: timm.create_model({f"local-dir:{folder.student}"!r}, pretrained=True)')
        publish_at_end(config, folder)
    close(setup)
    return summary


def export_and_measure(
    setup: Setup, learners: Sequence[Learner], folder: RunFolder, command: str, needed: bool = False
) -> list[Results]:
    """Export learners at the end of their training, and then evaluate them once more.

    First comes what nothing else can bring back: it is exported with the metrics of its epoch, and once more with
    those of this evaluation.

    Args:
        setup: Devices and data.
        learners: The learners.
        folder: The folder of their run.
        command: How the run was started, for the record.
        needed: Whether a run without this evaluation is worthless; otherwise the metrics of the last epoch will do.

    Returns:
        For each learner its metrics.
    """
    accelerator, facts = setup.accelerator, describe(setup, command)
    for learner in learners:
        learner.eval()
    results: list[Results] = []
    if accelerator.is_main_process:
        lines = folder.read_metrics()
        results = [{'val': lines[(learner.epoch or len(lines)) - 1][learner.name]['val']} for learner in learners]
        with setup.phases.timed('export'):
            export(learners, results, facts)
    # Several processes have to fail together, which only the error itself makes them do: the others wait for the share
    # that this one has of a batch, where no word of it can reach them, until it has ended.
    with setup.phases.timed('evaluation'):
        if needed or accelerator.num_processes > 1:
            results = measure(setup, learners)
        else:
            results = attempt('the evaluation', lambda: measure(setup, learners)) or results
    if accelerator.is_main_process:
        with setup.phases.timed('export'):
            export(learners, results, facts)
    return results


def train_side_by_side(
    setup: Setup, arms: Mapping[str, TrainConfig], folder: RunFolder, command: str
) -> tuple[list[Learner], float]:
    """Train one or several students on the same batches, from the newest checkpoint if there is one.

    Args:
        setup: Devices and data.
        arms: Options by name of the learner, the folder of each in `output`. Those with a prompt path come first, if
            there is a choice: they compute the teacher's logits, which the others take over, on the way.
        folder: The run folder, claimed but not yet opened.
        command: How the run was started, for the record.

    Returns:
        The learners in the order of `arms`, and the seconds that training took.
    """
    config, accelerator, loaders = setup.config, setup.accelerator, setup.loaders
    statistics = TeacherStatistics(setup.data, setup.input_config, loaders['val'], accelerator, folder.statistics)
    heads = setup.teacher_heads(folder)
    with setup.phases.timed('setup'):
        learners = setup.create_learners(arms, statistics, heads)
        on_main(accelerator, lambda: check_export(learners, describe(setup, command)))
    labelled = not config.unlabelled or setup.data.val.labelled
    with setup.phases.timed('teacher_evaluation'):
        report_teachers(learners, heads.reasons, loaders['val'] if labelled else None, accelerator)
        load = functools.partial(create_teacher, num_classes=setup.data.num_classes)
        compare_precision(learners, load, loaders['val'], accelerator)
    kept = keep_logits(config, learners, setup.data, setup.input_config, accelerator)
    folder.open(config, accelerator)
    statistics.save()
    on_main(accelerator, lambda: write_heads(folder.teacher_heads, {each.name: each.teacher for each in learners}))
    accelerator.print(f'run folder: {folder}')
    if config.log_with:
        accelerator.project_configuration.set_directories(config.output)
        accelerator.init_trackers('timm_dfpt', config={k: str(v) for k, v in dataclasses.asdict(config).items()})
    origin: dict[str, str] = {}
    if accelerator.is_main_process:
        origin = describe_data(setup.data) | describe_teachers({each.name: each.teacher for each in learners})

    reading = FirstReading(setup.data, accelerator)

    def after_epoch(line: Mapping[str, Any]) -> None:
        reading.report(line)
        for learner in learners:
            if line['epoch'] in learner.config.export_epochs and accelerator.is_main_process:
                path = RunFolder(str(learner.config.output)).student_of_epoch(line['epoch'])
                learner.choose_published(line[learner.name]['val'])
                metrics = {'val': line[learner.name]['val'][learner.published]}
                export_student(learner, metrics, path, describe(setup, command), epoch=line['epoch'])

    trainer = Trainer(
        config=config,
        accelerator=accelerator,
        learners=learners,
        train_loader=loaders['train'],
        val_loader=loaders['val'],
        folder=folder,
        mixup=create_mixup(config, setup.data.num_classes),
        after_epoch=after_epoch,
        kept=kept,
        origin=origin,
        unchecked=not setup.data.checked,
    )
    setup.phases['training'] = trainer.fit()
    return learners, setup.phases['training']


def measure(setup: Setup, learners: Sequence[Learner]) -> list[Results]:
    """Evaluate learners at the end of their training, with one pass of each teacher for all that learn from it.

    Returns:
        For each learner metrics by split (`val`, and `test` where there is one) and model; see `evaluate`.
    """
    results: list[dict[str, Any]] = [{} for _ in learners]
    for split in dict.fromkeys(('val', setup.eval_split)):
        forwards = [learner.outputs_with_teacher for learner in learners]
        data = setup.loaders[split].dataset.split
        observe = None if setup.recorder is None else setup.recorder.start(split, len(data), data.labelled)
        measures = [learner.measure for learner in learners]
        measured = evaluate_together(forwards, setup.loaders[split], setup.accelerator, measures, observe)
        for result, metrics in zip(results, measured, strict=True):
            result[split] = metrics
    return list(results)


def describe(setup: Setup, command: str) -> dict[str, Any]:
    """Return what the run was, for `summary.json` and the records alongside student and prompt path."""
    config, data = setup.config, setup.data
    return {
        'method': config.method,
        'seed': config.seed,
        'command': command,
        'dataset': config.dataset,
        'dataset_sizes': {'train': len(data.train), 'val': len(data.val), 'test': len(data.test or ())},
        'class_names': data.class_names,
        'epochs': config.epochs,
        'input_config': {k: list(v) if isinstance(v, tuple) else v for k, v in setup.input_config.items()},
        'versions': {
            'timm_dfpt': __version__,
            'timm': timm.__version__,
            'torch': torch.__version__,
            'python': platform.python_version(),
        },
        'processes': setup.accelerator.num_processes,
    }


def example_batch(setup: Setup) -> torch.Tensor:
    """Return a batch `[B, C, H, W]` of the split that is evaluated last, to measure costs with."""
    return next(iter(setup.loaders[setup.eval_split]))[0]


def close(setup: Setup) -> None:
    """Finish the trackers; the processes stay together, since another run may follow in them."""
    setup.accelerator.wait_for_everyone()
    for tracker in setup.accelerator.trackers:
        attempt(f'closing {tracker.name}', tracker.finish)
    setup.accelerator.free_memory()


if __name__ == '__main__':
    start('distill', sys.argv[1:], 'timm-dfpt distill')
