"""What is measured on images that are not trained on."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from .base import TeacherLogits

__all__ = [
    'SCORES', 'TOP5_FROM', 'Measure', 'evaluate', 'evaluate_together', 'measure_features', 'measure_logits', 'score_of',
]  # fmt: skip

TOP5_FROM = 20
"""Number of classes from which on top-5 accuracy is reported."""

SCORES = {
    'top1': 'top-1 %',
    'agreement': 'agreement with the teacher %',
    'similarity': 'cosine similarity of features %',
}
"""What a model can be judged by, in percent, the first that was measured: the labels, or without them its teacher."""

Outputs = Mapping[str, torch.Tensor]
Measure = Callable[[Outputs, torch.Tensor], dict[str, dict[str, torch.Tensor]]]
"""From outputs by model name, and class indices `[B]`, to the sums of metrics over the batch by model name."""


def score_of(metrics: Mapping[str, float] | None) -> str | None:
    """Return by which of `SCORES` metrics judge a model; `None` if by none."""
    return next((score for score in SCORES if score in (metrics or {})), None)


def evaluate(
    forward: Callable[[torch.Tensor], Outputs],
    loader: Iterable[Any],
    accelerator: Accelerator,
    measure: Measure | None = None,
) -> dict[str, dict[str, float]]:
    """Measure one or several models on every sample of a loader exactly once.

    Args:
        forward: Maps images `[B, C, H, W]` to logits `[B, K]` by model name.
        loader: Batches whose first two parts are images and class indices `[B]`, prepared by `accelerator`.
        accelerator: Gathers over processes and drops what was repeated to fill a batch.
        measure: What measures the outputs; `measure_logits` by default.

    Returns:
        For each model `top1` (and from 20 classes up `top5`) in percent, `loss` (cross entropy, nats), `entropy` (nats)
        and `confidence` of the softmax. Where there is a `student`, the others also have `kl_to_student`:
        `KL(softmax(model) || softmax(student))` in nats at temperature 1.

    Raises:
        ValueError: If the loader has no sample.
    """
    measures = None if measure is None else [measure]
    (metrics,) = evaluate_together([lambda input, _: forward(input)], loader, accelerator, measures)
    return metrics


@torch.no_grad()
def evaluate_together(
    forwards: Sequence[Callable[[torch.Tensor, TeacherLogits], Outputs]],
    loader: Iterable[Any],
    accelerator: Accelerator,
    measures: Sequence[Measure] | None = None,
    observe: Callable[[Sequence[Outputs], torch.Tensor, torch.Tensor], None] | None = None,
) -> list[dict[str, dict[str, float]]]:
    """Do `evaluate` for several functions in one pass over a loader.

    Args:
        forwards: As in `evaluate`. The second argument, empty at the start of a batch, is for what they share: the
            teachers' logits.
        loader: As in `evaluate`.
        accelerator: As in `evaluate`.
        measures: What measures the outputs of each function; `measure_logits` for all by default.
        observe: Called with each batch of all processes: the outputs of each function, the classes `[B]`, and the rows
            `[B]` of the images, which are the third part of a batch.

    Returns:
        What `evaluate` returns, for each function.
    """
    measures = measures or [measure_logits] * len(forwards)
    sums: list[dict[str, list[torch.Tensor]]] = [{} for _ in forwards]
    keys: list[dict[str, list[str]]] = [{} for _ in forwards]
    count = 0
    for batch in loader:
        known: TeacherLogits = {}
        seen: list[Outputs] = []
        for forward, parts, known_keys, measure in zip(forwards, sums, keys, measures, strict=True):
            with accelerator.autocast():
                outputs = dict(forward(batch[0], known))
            names = list(outputs)
            gathered: Any = accelerator.gather_for_metrics((*(outputs[name].float() for name in names), batch[1]))
            outputs, target = dict(zip(names, gathered[:-1], strict=True)), gathered[-1]
            for name, metrics in measure(outputs, target).items():
                known_keys[name] = list(metrics)
                parts.setdefault(name, []).append(torch.stack(list(metrics.values())))
            seen.append(outputs)
        if observe is not None:
            rows: Any = accelerator.gather_for_metrics(batch[2])
            observe(seen, target, rows)
        count += len(target)
    if not count:
        raise ValueError('There are no samples to evaluate: give at least one batch.')
    # Doubles on the CPU, since not every device has them: a large validation set must not lose its last samples.
    return [
        {
            name: dict(zip(known_keys[name], (torch.stack(s).cpu().double().sum(dim=0) / count).tolist(), strict=True))
            for name, s in parts.items()
        }
        for parts, known_keys in zip(sums, keys, strict=True)
    ]


def measure_logits(
    outputs: Outputs, target: torch.Tensor, by_teacher: bool = False
) -> dict[str, dict[str, torch.Tensor]]:
    """Measure logits `[B, K]` by the labels; see `evaluate`.

    Args:
        outputs: Logits by model name.
        target: Class indices `[B]`; of a dataset without labels they are -1.
        by_teacher: Also measure on how many images the student, and its average, name the class of what it learns from,
            the `prompt_path` where there is one and else the `teacher`: `agreement`, in percent. Without labels that is
            all, and `loss` is the cross entropy with its probabilities.

    Raises:
        ValueError: If there are no labels, and it is not `by_teacher`.
    """
    labelled = bool((target >= 0).all())
    if not (labelled or by_teacher):
        raise ValueError('The evaluation split has no labels: add some, or train with --unlabelled.')
    heard = next((name for name in ('prompt_path', 'teacher') if name in outputs), '')
    measured = {}
    for name, logits in outputs.items():
        metrics = _batch_sums(name, logits, target if labelled else None, outputs.get('student'))
        if by_teacher and name.startswith('student'):
            metrics['agreement'] = 100.0 * (logits.argmax(dim=1) == outputs[heard].argmax(dim=1)).sum().float()
            if not labelled:
                metrics['loss'] = F.cross_entropy(logits, outputs[heard].softmax(dim=1), reduction='sum')
        measured[name] = metrics
    return measured


def measure_features(outputs: Outputs, target: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Measure pooled features `[B, D]` by those of the `teacher`.

    Args:
        outputs: Features by model name.
        target: Not used.

    Returns:
        For each model but the teacher `similarity`, the cosine in percent, and `loss`, the mean squared error.
    """
    teacher = outputs['teacher']
    return {
        name: {
            'similarity': 100.0 * F.cosine_similarity(features, teacher, dim=1).sum(),
            'loss': (features - teacher).square().mean(dim=1).sum(),
        }
        for name, features in outputs.items()
        if name != 'teacher'
    }


# Not timm's ClassificationEvaluator: it has no entropy, confidence and divergence, and where logits tie, as those of
# half precision do, the first of its top 5 is not always the top 1.
def _batch_sums(
    name: str, logits: torch.Tensor, target: torch.Tensor | None, student: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    log_probs = F.log_softmax(logits, dim=1)
    probs = log_probs.exp()
    metrics = {}
    if target is not None:
        metrics['top1'] = 100.0 * _correct(logits, target, 1)
        if logits.shape[1] >= TOP5_FROM:
            metrics['top5'] = 100.0 * _correct(logits, target, 5)
        metrics['loss'] = F.nll_loss(log_probs, target, reduction='sum')
    metrics['entropy'] = -(probs * log_probs).sum()
    metrics['confidence'] = probs.amax(dim=1).sum()
    if student is not None and name != 'student':
        metrics['kl_to_student'] = F.kl_div(
            F.log_softmax(student, dim=1), log_probs, reduction='sum', log_target=True
        )
    return metrics


def _correct(logits: torch.Tensor, target: torch.Tensor, k: int) -> torch.Tensor:
    # Counts, not shares: a share of a batch of three times three is not one.
    return (logits.topk(k, dim=1).indices == target[:, None]).any(dim=1).sum().float()
