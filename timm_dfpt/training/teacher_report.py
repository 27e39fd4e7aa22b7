"""What is reported of teachers before training: paths, heads, their accuracy, and whether it may harm."""
from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..job.options import TrainConfig
from ..tasks.evaluation import evaluate
from ..tasks.methods import METHODS
from .learner import Learner

__all__ = ['report_teachers']

_logger = logging.getLogger(__name__)

# Students of a teacher of 56.9% had 73% with the weights of 1, and 84% without the teacher (docs/STUDY.md).
_LOW = 75.0


def report_teachers(
    learners: Sequence[Learner], reasons: Mapping[nn.Module, str], val_loader: Any, accelerator: Accelerator
) -> None:
    """Print what each teacher is, whose classes it knows and how accurate it is; warn where that is not much.

    Args:
        learners: The learners.
        reasons: For each teacher what was decided on its head, in words.
        val_loader: Batches of the validation data; `None` where they have no labels.
        accelerator: Prints, and measures.
    """
    say = accelerator.print
    measured: dict[nn.Module, float] = {}
    harmed: dict[tuple[nn.Module, str, str], list[str]] = {}
    for learner in learners:
        teacher, config = learner.teacher, learner.config
        dual_teacher = learner.task.get_dual_teacher()
        if dual_teacher is not None and (learner is learners[0] or teacher not in measured):
            say(dual_teacher.summary())
            tuned, epochs = learner.task.prompt_epochs, config.epochs
            if tuned and tuned < epochs:
                say(f'the prompt path is tuned in the first {tuned} of {epochs} epochs and then frozen')
        if teacher is None:
            continue
        label = f'teacher {config.teacher or config.prompt_path}'
        reason = f' {reasons[teacher]}' if teacher in reasons else ''
        if not learner.task.shows_teacher or val_loader is None:
            if teacher not in measured:
                say(f'{label}{reason}')
                measured[teacher] = 100.0
            continue
        if teacher not in measured:
            measured[teacher] = _accuracy(learner.task.teacher_logits, val_loader, accelerator)
            say(f'{label}{reason}: {measured[teacher]:.2f}% top-1 on the validation data')
        remedy = _remedy(config)
        if measured[teacher] < _LOW and remedy:
            harmed.setdefault((teacher, label, remedy), []).append(learner.name)
    if val_loader is None:
        say('no labels to validate on: instead of top-1, agreement with what the student learns from is reported')
    for (teacher, label, remedy), names in harmed.items():
        if accelerator.is_main_process:
            _logger.warning(
                f'{label} classifies only {measured[teacher]:.1f}% of the validation data correctly, and at its '
                f'current weight a teacher below {_LOW:.0f}% may harm the student of {", ".join(names)}: {remedy}.'
            )


def _accuracy(forward: Callable[[torch.Tensor], torch.Tensor], loader: Any, accelerator: Accelerator) -> float:
    return evaluate(lambda x: {'teacher': forward(x)}, loader, accelerator)['teacher']['top1']


def _remedy(config: TrainConfig) -> str | None:
    """Return what helps against a bad teacher; `None` where its weight is not the default one, or all that there is."""
    if config.unlabelled:
        return None
    fit = ', or fit its head to these images with --teacher-head fit' if config.teacher_head == 'own' else ''
    if METHODS[config.method].variant:
        weights = config.dfpt_weights
        if weights['prompt_teacher'] < 1 and weights['student_teacher'] < 1:
            return None
        return (
            'exclude it from the losses of student and prompt path (--prompt-teacher-weight 0 '
            f'--student-teacher-weight 0){fit}'
        )
    if config.distill_loss_weight < 1:
        return None
    return f'lower its weight (--distill-loss-weight 0.1), let it adapt (--method dfpt){fit}'
