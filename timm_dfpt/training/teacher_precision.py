"""A frozen teacher in half precision: its head computes in float32, and what that changes is measured."""
from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from ..hub.heads import describe_precision
from ..job.options import TrainConfig
from ..losses.checks import upcast
from ..teacher.checks import find_classifier
from ..teacher.fitted_head import put_head
from ..teacher.head_record import fitted_head_of
from .learner import Learner

__all__ = ['compare_precision', 'compute_heads_in_float32']

_BATCHES = 4
_HALF = (torch.bfloat16, torch.float16)


class _Float32Forward:
    """The `forward` of a linear classifier with weights in half precision, computed in float32.

    The weights stay what they are, so that a saved prompt path knows its teacher. A class, not a closure, so that
    deepcopy and pickle take the module along.

    Args:
        module: The classifier.
    """

    def __init__(self, module: nn.Linear | nn.Conv2d) -> None:
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.module.weight.float(), self.module.bias
        bias = bias if bias is None else bias.float()
        # There is no autocast on the meta device, where saved prompt paths are compared with their teacher.
        with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            if isinstance(self.module, nn.Linear):
                return F.linear(x.float(), weight, bias)
            return self.module._conv_forward(x.float(), weight, bias)


def compute_heads_in_float32(teacher: nn.Module) -> None:
    """Let the linear classifiers of a teacher in half precision compute, and return logits, in float32."""
    head = fitted_head_of(teacher)
    if next(teacher.parameters()).dtype not in _HALF:
        return
    for name in head.classifier if head is not None else find_classifier(teacher, None):
        leaf: Any = teacher.get_submodule(name)
        if type(leaf) in (nn.Linear, nn.Conv2d):
            leaf.forward = _Float32Forward(leaf)


@torch.no_grad()
def compare_precision(
    learners: Sequence[Learner], create: Callable[[TrainConfig], nn.Module], val_loader: Any, accelerator: Accelerator
) -> None:
    """Print how far teachers in half precision are from the same in float32, on a few validation batches.

    It is noted as `precision` of each learner: `dtype`, `agreement` (images with the same top-1, in percent), `kl`
    (mean of `KL(softmax(float32) || softmax(half))`, nats) and `images`.

    Args:
        learners: The learners.
        create: Loads the teacher that options name.
        val_loader: Batches of the validation data.
        accelerator: Prints, and adds up over processes.

    Raises:
        ValueError: If the logits of a teacher in half precision are not finite.
    """
    found: dict[nn.Module, dict[str, Any]] = {}
    for learner in learners:
        teacher, config = learner.teacher, learner.config
        if teacher is None or config.teacher is None or config.teacher_dtype == 'float32':
            continue
        if not learner.task.compares_logits or not teacher.num_classes:
            # Features or an encoder: there are no classes to agree on.
            continue
        if teacher not in found:
            reference = _in_float32(create(dataclasses.replace(config, teacher_dtype='float32')), teacher)
            reference.to(accelerator.device).eval()
            task: Any = learner.task
            sums = torch.zeros(3, device=accelerator.device)
            for batch in itertools.islice(val_loader, _BATCHES):
                exact = upcast(reference(task.adapter(batch[0]).float()))
                half = upcast(task.teacher_logits(batch[0]))
                same = (exact.argmax(dim=1) == half.argmax(dim=1)).sum()
                kl = F.kl_div(half.log_softmax(dim=1), exact.log_softmax(dim=1), reduction='sum', log_target=True)
                sums += torch.stack([same, kl, torch.tensor(len(half), device=sums.device)]).float()
            total: Any = accelerator.reduce(sums)
            same, kl, images = total.tolist()
            if not torch.isfinite(total).all():
                raise ValueError(
                    f'teacher_dtype={config.teacher_dtype}: the logits of {config.teacher!r} are not finite in it: use '
                    'bfloat16 or float32.'
                )
            found[teacher] = {
                'dtype': config.teacher_dtype,
                'agreement': round(100 * same / images, 2),
                'kl': float(f'{kl / images:.3g}'),
                'images': int(images),
            }
            accelerator.print(f'teacher {config.teacher}: {describe_precision(found[teacher])}')
        learner.precision = found[teacher]


def _in_float32(reference: nn.Module, teacher: nn.Module) -> nn.Module:
    """Return the float32 teacher with what else was changed in that of half precision: its head and its statistics."""
    head = fitted_head_of(teacher)
    if head is not None:
        reference = put_head(reference, head)
    statistics = dict(teacher.named_buffers())
    for name, buffer in reference.named_buffers():
        if name.endswith(('running_mean', 'running_var')):
            buffer.copy_(statistics[name])
    return reference
