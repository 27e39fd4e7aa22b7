"""The main job, from options to a run folder: `train/distill.py` is a few lines around `main`."""
from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..hub.repo import check_repo_id
from ..tasks.evaluation import evaluate
from .build import create_mixup
from .cli import parse_config
from .export import export, export_student
from .learner import Learner
from .options import TrainConfig
from .publish import publish_run
from .report import closing_table, plot_curves, verdicts
from .run_folder import RunFolder
from .setup import RunSetup
from .sigterm import on_sigterm
from .trainer import NonFiniteLossError, Preempted, Trainer

__all__ = ['EXIT_PREEMPTED', 'exit_code', 'main', 'run', 'train_side_by_side']

EXIT_PREEMPTED = 143
"""Exit code after SIGTERM and a checkpoint: 128 + 15, as the shell would say."""


def main(argv: Sequence[str] | None = None, default_recipe: str | Path | None = None) -> int:
    """Run the main job from the command line.

    Args:
        argv: Arguments; `None` for those of the process.
        default_recipe: Recipe that counts when neither `--config` nor `--dataset` is given.

    Returns:
        The exit code: 0, 1 after an error that was told in one line, or `EXIT_PREEMPTED`.
    """
    about = 'Distill a student from a dual-forward path teacher (DFPT-KD), or a baseline.'
    if default_recipe is not None:
        recipe = Path(default_recipe).name
        about += f' Without --config and --dataset the recipe {recipe} counts instead of the defaults below.'
    config = parse_config(argv, default_recipe, about)
    command = shlex.join(['train/distill.py', *(sys.argv[1:] if argv is None else argv)])
    return exit_code(lambda: run(config, command))


def exit_code(job: Callable[[], Any]) -> int:
    """Do a job and turn the errors that a user can do something about into one line; see `main`."""
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    try:
        # Before and after training; while training, the loop saves first.
        with on_sigterm(_stop):
            job()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return EXIT_PREEMPTED
    except (ValueError, TypeError, NonFiniteLossError, OSError) as error:
        print(f'error: {_without_traceback(error)}', file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        remedy = _remedy(error)
        if remedy is None:
            raise
        print(f'error: {" ".join(str(error).split())} {remedy}', file=sys.stderr)
        return 1
    return 0


def _without_traceback(error: Exception) -> str:
    """Return the message; torch hands on an error of a process that prepares images as the text of its traceback."""
    text = str(error)
    if 'in DataLoader worker process' not in text:
        return text
    return text.strip().splitlines()[-1].partition(': ')[2]


def _remedy(error: RuntimeError | MemoryError) -> str | None:
    """Say what to do about an error of the machine; `None` if it may be a mistake in the program."""
    text = str(error)
    # torch has a class for the memory of accelerators only.
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or 'DefaultCPUAllocator' in text:
        return (
            'Continue with --resume when there is more memory, or start with another --output and a smaller '
            '--batch-size (and --grad-accum-steps) or --validation-batch-size.'
        )
    # With its number: it has died, and did not just pass an exception on.
    if 'DataLoader worker (pid' in text:
        return (
            'A process that prepares images was ended from outside, mostly for want of memory (in a container also '
            'of /dev/shm): continue with --resume and fewer --workers.'
        )
    return None


def _stop() -> None:
    raise Preempted('Stopped by SIGTERM; the same command with --resume goes on.')


def run(config: TrainConfig, command: str = '') -> dict[str, Any]:
    """Train a student as `config` says, and leave a run folder.

    Args:
        config: The options.
        command: How the run was started, for the record.

    Returns:
        What `summary.json` holds.

    Raises:
        ValueError: An option does not fit the data or the models; nothing has been trained then.
    """
    for repo_id in filter(None, (config.push_to_hub, config.push_prompt_path)):
        check_repo_id(repo_id)
    folder = RunFolder.claim(config)
    config = folder.resumed(config)
    arms = {config.method: dataclasses.replace(config, baselines=[])}
    for method in config.baselines:
        arms[method] = config.for_method(method, output=str(folder.baseline(method)))
    setup = RunSetup(config, str(folder))
    say = setup.accelerator.print
    learners, seconds = train_side_by_side(setup, arms, folder, command)
    results = setup.measure(learners)
    summary: dict[str, Any] = {}
    if setup.accelerator.is_main_process:
        facts = setup.facts(command)
        summary = {**facts, 'eval_split': setup.eval_split, 'train_seconds': seconds}
        exported = export(learners, results, facts, setup.example())
        summary['models'] = exported.pop(config.method)
        summary['baselines'] = {name: models['student'] for name, models in exported.items()}
        plot_curves(folder.read_metrics(), folder.curves, f'{config.method}: {config.student}')
        folder.write_summary(summary)
        say(closing_table(summary))
        for line in verdicts(summary):
            say(line)
        source = f'local-dir:{folder.student}'
        say(f'student: timm.create_model({source!r}, pretrained=True)')
        _publish(config, folder)
    setup.close()
    return summary


def train_side_by_side(
    setup: RunSetup, arms: Mapping[str, TrainConfig], folder: RunFolder, command: str
) -> tuple[list[Learner], float]:
    """Train one or several students on the same batches, from the newest checkpoint if there is one.

    Args:
        setup: Devices, data and teachers.
        arms: Options by name of the learner, the folder of each in `output`. Those with a prompt path come first, if
            there is a choice: they compute the teacher's logits, which the others take over, on the way.
        folder: The run folder, claimed but not yet opened.
        command: How the run was started, for the record.

    Returns:
        The learners in the order of `arms`, and the seconds that training took.
    """
    config, accelerator = setup.config, setup.accelerator
    learners = [setup.create_learner(name, arm) for name, arm in arms.items()]
    first = learners[0]
    dual_teacher = first.task.get_dual_teacher()
    if dual_teacher is not None:
        accelerator.print(dual_teacher.summary())
    if first.teacher is not None:
        before = evaluate(lambda x: {'teacher': first.task.teacher_logits(x)}, setup.loaders['val'], accelerator)
        top1 = before['teacher']['top1']
        accelerator.print(f'teacher {first.config.teacher}: {top1:.2f}% top-1 on the validation data')
    teacher_cache = setup.open_teacher_cache(first)
    folder.open(config, accelerator)
    accelerator.print(f'run folder: {folder}')
    if config.log_with:
        accelerator.init_trackers('timm_dfpt', config={k: str(v) for k, v in dataclasses.asdict(config).items()})
    mixup = create_mixup(config, setup.data.num_classes)

    def keep_students(line: Mapping[str, Any]) -> None:
        for learner in learners:
            if line['epoch'] in learner.config.export_epochs and accelerator.is_main_process:
                path = RunFolder(str(learner.config.output)).student_of_epoch(line['epoch'])
                metrics = {'val': line[learner.name]['val']['student']}
                export_student(learner, metrics, path, setup.facts(command), epoch=line['epoch'])

    trainer = Trainer(
        config=config,
        accelerator=accelerator,
        learners=learners,
        train_loader=setup.loaders['train'],
        val_loader=setup.loaders['val'],
        folder=folder,
        mixup=mixup,
        after_epoch=keep_students,
        teacher_cache=teacher_cache,
        origin=setup.origin(learners),
    )
    return learners, trainer.fit()


def _publish(config: TrainConfig, folder: RunFolder) -> None:
    if config.push_to_hub or config.push_prompt_path:
        options: dict[str, Any] = {'private': config.private or None, 'license': config.license}
        places = publish_run(folder.path, config.push_to_hub, push_prompt_path=config.push_prompt_path, **options)
        for kind, place in places.items():
            print(f'published the {kind.replace("_", " ")}: {place}')
