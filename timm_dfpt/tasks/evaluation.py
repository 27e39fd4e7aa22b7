"""What is measured on images that are not trained on."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from .base import TeacherLogits

__all__ = ['TOP5_FROM', 'evaluate', 'evaluate_together']

TOP5_FROM = 20
"""Number of classes from which on top-5 accuracy is reported."""

Outputs = Mapping[str, torch.Tensor]


def evaluate(
    forward: Callable[[torch.Tensor], Outputs], loader: Iterable[Any], accelerator: Accelerator
) -> dict[str, dict[str, float]]:
    """Measure one or several models on every sample of a loader exactly once.

    Args:
        forward: Maps images `[B, C, H, W]` to logits `[B, K]` by model name.
        loader: Batches whose first two parts are images and class indices `[B]`, prepared by `accelerator`.
        accelerator: Gathers over processes and drops what was repeated to fill a batch.

    Returns:
        For each model `top1` (and from 20 classes up `top5`) in percent, `loss` (cross entropy, nats), `entropy` (nats)
        and `confidence` of the softmax. Where there is a `student`, the others also have `kl_to_student`:
        `KL(softmax(model) || softmax(student))` in nats at temperature 1.

    Raises:
        ValueError: If the loader has no sample.
    """
    (metrics,) = evaluate_together([lambda input, _: forward(input)], loader, accelerator)
    return metrics


@torch.no_grad()
def evaluate_together(
    forwards: Sequence[Callable[[torch.Tensor, TeacherLogits], Outputs]],
    loader: Iterable[Any],
    accelerator: Accelerator,
) -> list[dict[str, dict[str, float]]]:
    """Do `evaluate` for several functions in one pass over a loader.

    Args:
        forwards: As in `evaluate`. The second argument, empty at the start of a batch, is for what they share: the
            teachers' logits.
        loader: As in `evaluate`.
        accelerator: As in `evaluate`.

    Returns:
        What `evaluate` returns, for each function.
    """
    sums: list[dict[str, list[torch.Tensor]]] = [{} for _ in forwards]
    keys: dict[str, list[str]] = {}
    count = 0
    for batch in loader:
        known: TeacherLogits = {}
        for forward, parts in zip(forwards, sums, strict=True):
            with accelerator.autocast():
                outputs = dict(forward(batch[0], known))
            names = list(outputs)
            gathered: Any = accelerator.gather_for_metrics((*(outputs[name].float() for name in names), batch[1]))
            outputs, target = dict(zip(names, gathered[:-1], strict=True)), gathered[-1]
            for name, logits in outputs.items():
                metrics = _batch_sums(name, logits, target, outputs.get('student'))
                keys[name] = list(metrics)
                parts.setdefault(name, []).append(torch.stack(list(metrics.values())))
        count += len(target)
    if not count:
        raise ValueError('There is no sample to evaluate.')
    # Doubles on the CPU, since not every device has them: a large validation set must not lose its last samples.
    return [
        {
            name: dict(zip(keys[name], (torch.stack(s).cpu().double().sum(dim=0) / count).tolist(), strict=True))
            for name, s in parts.items()
        }
        for parts in sums
    ]


# Not timm's ClassificationEvaluator: it has no entropy, confidence and divergence, and where logits tie, as those of
# half precision do, the first of its top 5 is not always the top 1.
def _batch_sums(
    name: str, logits: torch.Tensor, target: torch.Tensor, student: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    log_probs = F.log_softmax(logits, dim=1)
    probs = log_probs.exp()
    metrics = {'top1': 100.0 * _correct(logits, target, 1)}
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
