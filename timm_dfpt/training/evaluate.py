"""What is measured on images that are not trained on."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.utils import accuracy
from torch.utils.data import DataLoader

__all__ = ['TOP5_FROM', 'evaluate']

TOP5_FROM = 20
"""Number of classes from which on top-5 accuracy is told."""

Outputs = Mapping[str, torch.Tensor]


@torch.no_grad()
def evaluate(
    forward: Callable[[torch.Tensor], Outputs], loader: DataLoader, accelerator: Accelerator
) -> dict[str, dict[str, float]]:
    """Measure one or several models on every sample of a loader exactly once.

    Args:
        forward: Maps images `[B, C, H, W]` to logits `[B, K]` by model name.
        loader: The loader, prepared by `accelerator`.
        accelerator: Gathers over processes and drops what was repeated to fill a batch.

    Returns:
        For each model `top1` (and from 20 classes up `top5`) in percent, `loss` (cross entropy, nats), `entropy` (nats)
        and `confidence` of the softmax. Where there is a `student`, the others also have `kl_to_student`:
        `KL(softmax(model) || softmax(student))` in nats at temperature 1.
    """
    sums: dict[str, dict[str, torch.Tensor]] = {}
    count = 0
    for batch in loader:
        inputs, target = batch[0], batch[1]
        with accelerator.autocast():
            outputs = dict(forward(inputs))
        names = list(outputs)
        gathered: Any = accelerator.gather_for_metrics((*(outputs[name].float() for name in names), target))
        outputs, target = dict(zip(names, gathered[:-1], strict=True)), gathered[-1]
        count += len(target)
        for name, logits in outputs.items():
            totals = sums.setdefault(name, {})
            for key, value in _batch_metrics(name, logits, target, outputs.get('student')).items():
                # Doubles: the sum over a large validation set must not depend on the order of its batches.
                totals[key] = totals.get(key, 0) + value.double() * len(target)
    if not count:
        raise ValueError('There is no sample to evaluate.')
    return {name: {key: float(total) / count for key, total in totals.items()} for name, totals in sums.items()}


def _batch_metrics(
    name: str, logits: torch.Tensor, target: torch.Tensor, student: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    top = (1, 5) if logits.shape[1] >= TOP5_FROM else (1,)
    metrics = dict(zip((f'top{k}' for k in top), accuracy(logits, target, topk=top), strict=True))
    log_probs = F.log_softmax(logits, dim=1)
    probs = log_probs.exp()
    metrics['loss'] = F.nll_loss(log_probs, target)
    metrics['entropy'] = -(probs * log_probs).sum(dim=1).mean()
    metrics['confidence'] = probs.amax(dim=1).mean()
    if student is not None and name != 'student':
        metrics['kl_to_student'] = F.kl_div(
            F.log_softmax(student, dim=1), log_probs, reduction='batchmean', log_target=True
        )
    return metrics
