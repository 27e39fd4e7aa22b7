"""The main job, from options to a run folder: `train/distill.py` is a few lines around `main`."""
from __future__ import annotations

import dataclasses
import logging
import platform
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch import nn

from ..hub.upload import check_repo_id
from ..task import DFPTDistillationTask
from ..teacher import DualForwardPathTeacher
from ..version import __version__
from .augment import AugmentConfig
from .config import TrainConfig, load_recipe, parse_config, save_config
from .data import DataSplits, load_splits
from .evaluate import evaluate
from .export import export
from .factory import (
    create_mixup,
    create_student,
    create_task,
    create_teacher,
    resolve_input_config,
    wrap_teacher,
)
from .learner import Learner
from .loader import create_loader
from .loop import METRICS_FILE, NonFiniteLossError, Preempted, Trainer
from .publish import publish_run
from .report import closing_table, plot_curves, verdicts, write_summary

__all__ = ['EXIT_PREEMPTED', 'main', 'run']

_logger = logging.getLogger(__name__)

EXIT_PREEMPTED = 143
"""Exit code after SIGTERM and a checkpoint: 128 + 15, as the shell would say."""

# What may differ when a run is resumed, since it says nothing about what is computed.
_MAY_DIFFER = (
    'output', 'resume', 'log_with', 'log_interval', 'checkpoint_hist', 'checkpoint_steps', 'workers', 'cache_images',
    'push_to_hub', 'push_prompt_path', 'private', 'license',
)  # fmt: skip


def main(argv: Sequence[str] | None = None, default_recipe: str | Path | None = None) -> int:
    """Run the main job from the command line.

    Args:
        argv: Arguments; `None` for those of the process.
        default_recipe: Recipe that counts when neither `--config` nor `--dataset` is given.

    Returns:
        The exit code: 0, 1 after an error that was told in one line, or `EXIT_PREEMPTED`.
    """
    config = parse_config(
        argv, default_recipe, 'Distill a student from a dual-forward path teacher (DFPT-KD), or a baseline.'
    )
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    command = shlex.join(['train/distill.py', *(sys.argv[1:] if argv is None else argv)])
    try:
        run(config, command)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return EXIT_PREEMPTED
    except (ValueError, TypeError, NonFiniteLossError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


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
    run_dir = _run_dir(config)
    # accelerate warns about the pinned memory of machines without an accelerator.
    warnings.filterwarnings('ignore', message='.*pin_memory.*')
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.grad_accum_steps,
        log_with=config.log_with,
        project_dir=str(run_dir) if config.log_with else None,
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
    )
    set_seed(config.seed)
    say = accelerator.print
    input_config = resolve_input_config(config)
    data = load_splits(
        str(config.dataset),
        config_name=config.dataset_config,
        revision=config.dataset_revision,
        train_split=config.train_split,
        val_split=config.val_split,
        test_split=config.test_split,
        image_column=config.input_key,
        label_column=config.target_key,
        val_fraction=config.val_fraction,
        seed=config.seed,
        on_bad_image=config.on_bad_image,
    )
    tested = f', {len(data.test):,} to test on' if data.test else ''
    say(
        f'data: {config.dataset}: {data.num_classes} classes, {len(data.train):,} images to train on, '
        f'{len(data.val):,} to validate on ({data.val_from}){tested}'
    )
    loaders = _create_loaders(config, data, input_config, accelerator)
    teacher = _load_teacher(config, data)
    learners = [
        _create_learner(dataclasses.replace(config, method=method, baselines=[]), teacher, data, loaders, accelerator)
        for method in (config.method, *config.baselines)
    ]
    main_learner = learners[0]
    if isinstance(main_learner.task, DFPTDistillationTask):
        say(main_learner.task.teacher.summary())
    if main_learner.teacher is not None:
        before = evaluate(lambda x: {'teacher': main_learner.teacher_logits(x)}, loaders['val'], accelerator)
        say(f'teacher {config.teacher}: {before["teacher"]["top1"]:.2f}% top-1 on the validation data')
    _open_run_dir(config, run_dir, accelerator)
    if config.log_with:
        accelerator.init_trackers('timm_dfpt', config={k: str(v) for k, v in dataclasses.asdict(config).items()})
    mixup = create_mixup(config, data.num_classes)
    trainer = Trainer(config, accelerator, learners, loaders['train'], loaders['val'], run_dir, mixup)
    seconds = trainer.fit()
    split = 'test' if 'test' in loaders else 'val'
    results = [
        {name: _final_metrics(learner, loaders[name], accelerator) for name in dict.fromkeys(('val', split))}
        for learner in learners
    ]
    summary: dict[str, Any] = {}
    if accelerator.is_main_process:
        facts = _facts(config, data, input_config, command, accelerator)
        summary = {**facts, 'eval_split': split, 'train_seconds': seconds}
        example = next(iter(loaders[split]))[0]
        summary['models'] = export(main_learner, results[0], run_dir, facts, example)
        summary['baselines'] = {
            learner.name: export(learner, result, run_dir / 'baselines' / learner.name, facts, example)['student']
            for learner, result in zip(learners[1:], results[1:], strict=True)
        }
        plot_curves(run_dir / METRICS_FILE, run_dir / 'curves.png', f'{config.method}: {config.student}')
        write_summary(run_dir / 'summary.json', summary)
        say(closing_table(summary))
        for line in verdicts(summary):
            say(line)
        source = f'local-dir:{run_dir / "student"}'
        say(f'student: timm.create_model({source!r}, pretrained=True)')
        _publish(config, run_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return summary


def _publish(config: TrainConfig, run_dir: Path) -> None:
    if config.push_to_hub or config.push_prompt_path:
        options: dict[str, Any] = {'private': config.private or None, 'license': config.license}
        places = publish_run(run_dir, config.push_to_hub, push_prompt_path=config.push_prompt_path, **options)
        for kind, place in places.items():
            print(f'published the {kind.replace("_", " ")}: {place}')


def _run_dir(config: TrainConfig) -> Path:
    if config.output is not None:
        path = Path(config.output)
    else:
        dataset, student = (Path(str(name).split(':')[-1]).name for name in (config.dataset, config.student))
        path = Path('output') / f'{dataset}-{student}-{config.method}-s{config.seed}'
        if not config.resume:
            # A name of our choosing must not stand in the way of a second run.
            number = 1
            while path.exists():
                number += 1
                path = path.with_name(f'{path.name.removesuffix(f"-run{number - 1}")}-run{number}')
    started = path.is_dir() and any(path.iterdir())
    if config.resume:
        if not (path / 'config.yaml').is_file():
            raise ValueError(f'resume: {str(path)!r} holds no run. Leave --resume out to start one there.')
        _check_same_run(config, path)
    elif started or path.is_file():
        raise ValueError(
            f'output: {str(path)!r} exists and is not empty. Continue it with --resume, or name another folder.'
        )
    return path


def _check_same_run(config: TrainConfig, path: Path) -> None:
    before, now = load_recipe(path / 'config.yaml'), dataclasses.asdict(config)
    changed = [key for key in now if key not in _MAY_DIFFER and before.get(key) != now[key]]
    if changed:
        shown = ', '.join(f'{key}={now[key]!r} (was {before.get(key)!r})' for key in changed)
        raise ValueError(
            f'resume: the run in {str(path)!r} was started with other options: {shown}. Give the options it was '
            f'started with (--config {path / "config.yaml"}), or another --output.'
        )


def _open_run_dir(config: TrainConfig, run_dir: Path, accelerator: Accelerator) -> None:
    """Make the run folder; only now, when all that can be known to be wrong has been checked."""
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not config.resume:
            save_config(config, run_dir / 'config.yaml')
        (run_dir / METRICS_FILE).touch()
    accelerator.wait_for_everyone()
    accelerator.print(f'run folder: {run_dir}')


def _load_teacher(config: TrainConfig, data: DataSplits) -> nn.Module | None:
    if config.method == 'supervised':
        return None
    if config.teacher is None:
        # The prompt path knows its teacher.
        return DualForwardPathTeacher.from_pretrained(str(config.prompt_path)).unwrap()
    return create_teacher(config, data.class_names)


def _create_learner(
    config: TrainConfig,
    teacher: nn.Module | None,
    data: DataSplits,
    loaders: Mapping[str, Any],
    accelerator: Accelerator,
) -> Learner:
    # Seeded for each part, so that every method starts from the same student whatever was built before it.
    set_seed(config.seed)
    if teacher is not None and config.method in ('dfpt', 'dfpt+'):
        teacher = wrap_teacher(config, teacher)
    set_seed(config.seed)
    input_config = resolve_input_config(config)
    student = create_student(config, data.num_classes, data.class_names, input_config)
    task = create_task(config, student, None if config.method == 'supervised' else teacher, input_config, accelerator)
    updates_per_epoch = -(-len(loaders['train']) // config.grad_accum_steps)
    return Learner(config.method, config, task, accelerator, updates_per_epoch)


def _create_loaders(
    config: TrainConfig, data: DataSplits, input_config: Mapping[str, Any], accelerator: Accelerator
) -> dict[str, Any]:
    augmentation = AugmentConfig(
        no_aug=config.no_aug,
        train_crop_mode=config.train_crop_mode,
        scale=tuple(config.scale) or None,
        ratio=tuple(config.ratio) or None,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter,
        auto_augment=config.aa,
        reprob=config.reprob,
        crop_padding=config.crop_padding,
    )
    common: dict[str, Any] = {
        'data_config': input_config,
        'seed': config.seed,
        'num_workers': config.workers,
        'cache_images': config.cache_images,
        'pin_memory': accelerator.device.type == 'cuda',
    }
    evaluation = {
        **common,
        'batch_size': config.validation_batch_size or config.batch_size,
        'is_training': False,
        'cache_images': 'auto',
    }
    loaders = {
        'train': create_loader(
            data.train, batch_size=config.batch_size, is_training=True, augmentation=augmentation, **common
        ),
        'val': create_loader(data.val, **evaluation),
    }
    if data.test:
        loaders['test'] = create_loader(data.test, **evaluation)
    return {name: accelerator.prepare(loader) for name, loader in loaders.items()}


def _facts(
    config: TrainConfig,
    data: DataSplits,
    input_config: Mapping[str, Any],
    command: str,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Return what the run was, for `summary.json` and the records beside student and prompt path."""
    return {
        'method': config.method,
        'seed': config.seed,
        'command': command,
        'dataset': config.dataset,
        'dataset_sizes': {'train': len(data.train), 'val': len(data.val), 'test': len(data.test or ())},
        'class_names': data.class_names,
        'epochs': config.epochs,
        'input_config': {k: list(v) if isinstance(v, tuple) else v for k, v in input_config.items()},
        'versions': {
            'timm_dfpt': __version__,
            'timm': timm.__version__,
            'torch': torch.__version__,
            'python': platform.python_version(),
        },
        'processes': accelerator.num_processes,
    }


def _final_metrics(learner: Learner, loader: Any, accelerator: Accelerator) -> dict[str, dict[str, float]]:
    learner.eval()

    def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = learner.outputs(x)
        if learner.teacher is not None and 'teacher' not in outputs:
            outputs['teacher'] = learner.teacher_logits(x)
        return outputs

    metrics = evaluate(forward, loader, accelerator)
    if 'student_ema' in metrics:
        metrics['student_raw'] = metrics.pop('student')
        metrics['student'] = metrics.pop('student_ema')
    return metrics
