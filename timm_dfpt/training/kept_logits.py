"""Which logits of a run are kept: those of the teacher, and from the freeze on those of its prompt path."""
from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..data.datasets import DataSplits
from ..data.fingerprint import dataset_fingerprint
from ..job.devices import whole_weights
from ..job.options import TrainConfig
from ..tasks.base import TeacherLogits
from .learner import Learner
from .teacher_cache import TeacherCache, cache_key, check_exact

__all__ = ['KeptLogits', 'keep_logits']

_logger = logging.getLogger(__name__)


class KeptLogits:
    """Logits of the frozen models that learners are trained on, each model's in a file of its own.

    Args:
        learners: The learners. The teacher of the first is kept if one of them uses it, and its path once it is
            frozen.
        open_cache: Opens the file of a model; returns `None` for one whose logits cannot be kept.
        device: Where logits are to be.
    """

    def __init__(
        self, learners: Sequence[Learner], open_cache: Callable[[nn.Module], TeacherCache | None], device: torch.device
    ) -> None:
        self.learners, self.open_cache, self.device = list(learners), open_cache, device
        self.caches: dict[nn.Module, TeacherCache | None] = {}

    def get(self, epoch: int, rows: torch.Tensor) -> TeacherLogits:
        """Return what is known of a batch.

        Args:
            epoch: Number of the epoch.
            rows: Rows of the batch, int64 `[B]`.
        """
        known = {}
        for model in _models(self.learners):
            if model not in self.caches:
                self.caches[model] = self.open_cache(model)
            cache = self.caches[model]
            logits = cache.get(epoch, rows, self.device) if cache is not None else None
            if logits is not None:
                known[model] = logits
        return known

    def put(self, epoch: int, rows: torch.Tensor, computed: TeacherLogits) -> None:
        """Keep what was computed for a batch; see `TeacherCache.put`."""
        for model, cache in self.caches.items():
            if cache is not None and model in computed:
                cache.put(epoch, rows, computed[model])

    def flush(self) -> None:
        """Bring everything to the disk."""
        for cache in filter(None, self.caches.values()):
            cache.flush()


def _models(learners: Sequence[Learner]) -> list[nn.Module]:
    first, *others = learners
    heard = any(first.teacher is model for learner in others for model in learner.frozen_models)
    teacher = [first.teacher] if heard and first.teacher is not None else []
    return list(dict.fromkeys([*teacher, *first.frozen_models]))


def keep_logits(
    config: TrainConfig,
    learners: Sequence[Learner],
    data: DataSplits,
    input_config: Mapping[str, Any],
    accelerator: Accelerator,
) -> KeptLogits | None:
    """Prepare for keeping logits, if the options ask for that.

    Args:
        config: The options.
        learners: The learners, see `KeptLogits`.
        data: The splits.
        input_config: What the loader makes of images.
        accelerator: Devices and processes.

    Raises:
        ValueError: If they would not be those that the models give in training.
    """
    if not config.cache_teacher:
        return None
    if accelerator.num_processes > 1:
        raise ValueError('cache_teacher works in a single process only: leave it out, or start one process.')
    learner = learners[0]
    teacher = learner.teacher
    if teacher is None:
        raise ValueError(
            f'cache_teacher needs a teacher, which {learner.name} does not have: leave it out, or choose another '
            '--method.'
        )
    heard = teacher in _models(learners)
    if not (heard or learner.freezes):
        raise ValueError(
            "cache_teacher has no effect, since the teacher's logits are not used (prompt_teacher_weight and "
            'student_teacher_weight are 0) and its prompt path is trained to the end: leave --cache-teacher out, or '
            'freeze the path with --prompt-epochs.'
        )
    size, seed = tuple(input_config['input_size']), torch.Generator().manual_seed(config.seed)
    assert config.batch_size is not None
    images = torch.randn(config.batch_size, *size, generator=seed).to(accelerator.device)
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    if heard:
        with accelerator.autocast():
            check_exact(learner.task.teacher_logits, images)
    fingerprint, options = dataset_fingerprint(data.train), dataclasses.asdict(config)

    def open_cache(model: nn.Module) -> TeacherCache | None:
        paths = None if model is teacher else learner.task.get_dual_teacher()
        with whole_weights(learner.module):
            if paths is not None:
                # Only now: blocks that are not tuned yet add zero, whatever they compute.
                try:
                    with accelerator.autocast():
                        check_exact(learner.task.prompt_logits, images)
                except ValueError as error:
                    _logger.warning(f'The prompt path is computed in every step. {error}')
                    return None
            key = cache_key(options, teacher, fingerprint, input_config, accelerator.device, paths)
        folder, rows = Path(config.teacher_cache_dir), len(data.train)
        return TeacherCache(folder, key, rows, data.num_classes, config.aug_cycle or 1)

    return KeptLogits(learners, open_cache, accelerator.device)
