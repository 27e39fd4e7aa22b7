"""The best epoch so far by the validation data: its weights, kept for the export, and how long ago it was."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import nn

from ..job.options import TrainConfig
from .learner import Learner

__all__ = ['BestEpochs', 'check_choice']


def check_choice(config: TrainConfig, measured: bool, sharded: bool) -> None:
    """Refuse to choose an epoch where there is nothing to choose by.

    Args:
        config: The options.
        measured: Whether the validation data can decide which epoch is better.
        sharded: Whether weights are spread over processes.

    Raises:
        ValueError: If `export_weights` or `patience` asks for what is not possible.
    """
    best = config.export_weights == 'best'
    if best and sharded:
        raise ValueError(
            'export_weights=best keeps a second copy of all weights, which sharded training (FSDP) spreads: leave '
            '--export-weights out.'
        )
    if (best or config.patience is not None) and not measured:
        option = 'export_weights=best' if best else f'patience={config.patience}'
        raise ValueError(
            f'{option} goes by the validation data, which have no labels: name a split that has some with --val-split, '
            'or leave it out.'
        )


class _Copy(nn.Module):
    """A copy of the tensors of a module, which a checkpoint can hold."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, tensor in module.state_dict().items():
            # Names of buffers have no dots.
            self.register_buffer(name.replace('.', '/'), tensor.detach().clone())

    @torch.no_grad()
    def take(self, module: nn.Module) -> None:
        """Copy the tensors of the module anew."""
        tensors = module.state_dict()
        for name, tensor in self.named_buffers():
            tensor.copy_(tensors[name.replace('/', '.')])

    def give(self, module: nn.Module) -> None:
        """Give the module the tensors that were copied."""
        module.load_state_dict({name.replace('/', '.'): tensor for name, tensor in self.named_buffers()})


class BestEpochs:
    """Record of which epoch of each learner is the best on the validation data, with its weights.

    The notes are part of `Progress` and the weights of every checkpoint, so that a run that is resumed makes the same
    choice. Of equal epochs the first is the best.

    Args:
        learners: The learners, prepared for training.
        keep: Whether the weights are kept: all that is trained, and its moving average.
    """

    def __init__(self, learners: Sequence[Learner], keep: bool) -> None:
        self.learners = learners
        self._copies: dict[str, _Copy] = {}
        for name, module in self._modules().items() if keep else ():
            self._copies[name] = _Copy(module)

    @property
    def weights(self) -> Mapping[str, nn.Module]:
        """What checkpoints hold of it, by the names of their files."""
        return self._copies

    def _modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        for i, learner in enumerate(self.learners):
            modules[f'best_{i}'] = unwrap_model(learner.module)
            if learner.average is not None:
                modules[f'best_average_{i}'] = learner.average
        return modules

    def note(self, notes: dict[str, Any], learner: Learner, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Take note of a validation.

        Args:
            notes: Of each learner `epoch` and `rank` of the best one, and the validations `since` then.
            learner: The learner.
            epoch: The epoch, counted from 1.
            metrics: Metrics on the validation data by model.
        """
        names = ('student', 'student_ema')
        rank = max(list(learner.rank(metrics[name])) for name in names if name in metrics)
        best = notes.get(learner.name)
        if best is not None and rank <= best['rank']:
            best['since'] += 1
            return
        notes[learner.name] = {'epoch': epoch, 'rank': rank, 'since': 0}
        i = list(self.learners).index(learner)
        modules = self._modules()
        for name in (f'best_{i}', f'best_average_{i}'):
            if name in self._copies:
                self._copies[name].take(modules[name])

    def waited(self, notes: Mapping[str, Any]) -> int:
        """Return the validations since any learner became better."""
        return min((notes[learner.name]['since'] for learner in self.learners if learner.name in notes), default=0)

    def restore(self, notes: Mapping[str, Any]) -> None:
        """Give the learners the weights of their best epochs, if these are kept."""
        if not self._copies:
            return
        modules = self._modules()
        for name, copy in self._copies.items():
            copy.give(modules[name])
        for learner in self.learners:
            # What is kept of weights in evaluation is forgotten in training.
            learner.train()
            learner.epoch = notes[learner.name]['epoch']
