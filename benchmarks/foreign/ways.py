"""Go one way from a foreign teacher to a student, and measure what all of it costs.

Every stage is the trainer's own. What counts as cost is what happens between data that are there and a model that is
trained: models are made, heads fitted, paths and students trained. Evaluation is not in it, because a run sees training
images only, and is evaluated here afterwards.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import timm_dfpt
from benchmarks.foreign import lora
from benchmarks.foreign.meter import Meter
from benchmarks.foreign.plan import Cell, Plan, Stage
from timm_dfpt.data.datasets import load_splits
from timm_dfpt.data.loader import create_loader
from timm_dfpt.job.devices import create_accelerator
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.tasks.evaluation import evaluate
from timm_dfpt.training.learner import Learner
from timm_dfpt.training.run import Setup, close, export_and_measure, set_up, train_side_by_side
from timm_dfpt.training.run_folder import RunFolder, claimed

__all__ = ['go', 'train']


def train(config: TrainConfig, meter: Meter) -> tuple[Setup, Learner]:
    """Do what `timm_dfpt.training.run.run` does, except its closing table, and measure the training alone."""
    accelerator = create_accelerator(config)
    with claimed(config, accelerator) as folder:
        setup = set_up(config, accelerator)
        with meter.running():
            (learner,), _ = train_side_by_side(setup, {config.method: config}, folder, '')
        export_and_measure(setup, [learner], folder, '')
    return setup, learner


def go(plan: Plan, cell: Cell, folder: Path) -> dict[str, Any]:
    """Train a student by its way, and evaluate it.

    Args:
        plan: The study.
        cell: The student.
        folder: An empty folder to work in.

    Returns:
        `cpu_s` by stage, or in the phase `flops` these; epochs by stage; images of the training split; and `metrics`
        by split and model: the student, and where there are such the prompt path and the teacher that it learnt from.
    """
    spent: list[float] = []
    flops: list[int] = []
    epochs: list[int | None] = []
    made: list[Path] = []
    last: tuple[Setup, Learner] | None = None
    for number, stage in enumerate(plan.stages(cell)):
        meter, output = Meter(counting=cell.phase == 'flops'), folder / str(number)
        if stage.do == 'fit':
            made.append(_fit(plan, cell, stage, output, made, meter))
            epochs.append(None)
        elif stage.do == 'lora':
            adapters = {key: stage.options[key] for key in ('rank', 'alpha')}
            rest = {key: value for key, value in stage.options.items() if key not in adapters}
            as_run = dataclasses.replace(stage, options={'method': 'supervised', **rest})
            config = plan.config(cell, as_run, output, made)
            made.append(lora.tune(config, adapters, meter))
            epochs.append(config.epochs)
        else:
            config = plan.config(cell, stage, output, made)
            last = train(config, meter)
            made.append(RunFolder(output).student)
            epochs.append(config.epochs)
        spent.append(round(meter.seconds, 2))
        flops.append(meter.flops)
    assert last is not None
    setup, learner = last
    metrics = {} if cell.phase in ('time', 'flops') else _evaluate(plan, cell, setup, learner)
    close(setup)
    cost = {'flops': flops} if cell.phase == 'flops' else {'cpu_s': spent}
    return {**cost, 'epochs': epochs, 'images': len(setup.data.train), 'metrics': metrics}


def _fit(plan: Plan, cell: Cell, stage: Stage, output: Path, made: Sequence[Path], meter: Meter) -> Path:
    """Put a head that is fitted to frozen features on a model with its pre-trained weights."""
    as_run = dataclasses.replace(stage, options={'method': 'supervised'})
    config = plan.config(cell, as_run, output, made)
    setup = set_up(config, create_accelerator(config))
    loader = create_loader(
        setup.data.train, batch_size=128, is_training=False, data_config=setup.input_config, seed=0, cache_images='auto'
    )
    model: Any = timm.create_model(str(config.student), pretrained=True)
    with meter.running():
        fitted: Any = timm_dfpt.fit_head(model, loader, setup.data.num_classes)
    fitted.pretrained_cfg = {**model.pretrained_cfg, **{
        key: setup.input_config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')
    }}
    timm_dfpt.save_student(fitted, str(output / 'student'), label_names=setup.data.class_names)
    close(setup)
    return output / 'student'


def _evaluate(plan: Plan, cell: Cell, setup: Setup, learner: Learner) -> dict[str, Any]:
    """Evaluate what a way has made on images that no stage has seen; in the phase `tune` not on test images."""
    config = setup.config
    data = load_splits(str(plan.dataset(cell)), input_key=config.input_key, target_key=config.target_key)
    if data.class_names != setup.data.class_names:
        raise ValueError(f'{cell}: other classes in {plan.dataset(cell)} than in what it was trained on.')
    parts = {'val': data.val} if cell.phase == 'tune' else {'val': data.val, 'test': data.test}
    if data.val_from.startswith('split') is False:
        # Photographs of a final run have no validation images: what was split off is trained on.
        del parts['val']
    learner.eval()
    task = learner.task

    def forward(input: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = dict(task.eval_outputs(input))
        if learner.teacher is not None and task.get_dual_teacher() is None:
            outputs.setdefault('teacher', task.teacher_logits(input))
        return outputs

    found: dict[str, Any] = {}
    for name, part in parts.items():
        assert part is not None
        loader = create_loader(
            part, batch_size=128, is_training=False, data_config=setup.input_config, seed=0, cache_images='auto'
        )
        with torch.no_grad():
            found[name] = evaluate(forward, loader, setup.accelerator)
    return found
