"""BatchNorm statistics of teachers, adapted to images without labels: estimated once, and kept with the run."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.datasets import DataSplits
from ..data.loader import create_loader
from ..hub.files import read_tensors, write_tensors
from ..job.devices import on_main
from ..job.options import TrainConfig
from ..tasks.base import StudentTask
from ..tasks.evaluation import evaluate
from ..teacher.prompt_path import match_dtype
from ..teacher.statistics import estimate_statistics, own_layers
from .build import augmentation_of
from .models import explain_no_statistics

__all__ = ['TeacherStatistics']


class TeacherStatistics:
    """Statistics of the teachers of a run for its training images, as the first epoch orders and augments them.

    The main process estimates them and the others get its own; a run that is resumed reads what it began with, so that
    they are the same to the bit whatever it goes on with.

    Args:
        data: The splits.
        input_config: What the loader makes of images.
        val_loader: Loader of the validation data.
        accelerator: Devices and processes.
        file: Where the statistics are kept.
    """

    def __init__(
        self,
        data: DataSplits,
        input_config: Mapping[str, Any],
        val_loader: Any,
        accelerator: Accelerator,
        file: Path,
    ) -> None:
        self.data, self.input_config, self.val_loader = data, input_config, val_loader
        self.accelerator, self.file = accelerator, file
        self._known = read_tensors(file) if file.is_file() else {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._adapted: list[nn.Module] = []

    def adapt(self, task: StudentTask, config: TrainConfig) -> None:
        """Give what the student learns from statistics of these images, where it has any; say in a line what was done.

        Args:
            task: The task, not yet prepared for training.
            config: Its options.

        Raises:
            ValueError: If a new prompt path would be nothing but the teacher.
        """
        teacher, dual = task.get_teacher(), task.get_dual_teacher()
        say, name = self.accelerator.print, config.teacher or config.prompt_path
        if not config.unlabelled or teacher is None:
            return
        if not task.compares_logits:
            say(
                f'without labels: the student learns the features of {name} and has no classes: it is judged by their '
                'similarity, and not by top-1'
            )
            return
        model: Any = teacher if dual is None else dual.prompt_path
        if any(model is each for each in self._adapted):
            return
        self._adapted.append(model)
        tuned = dual is not None and config.prompt_path is not None
        if not config.adapt_statistics or tuned:
            say(f'without labels: the student learns what {name} says as it is')
            return
        layers = own_layers(teacher if dual is None else dual)
        if not layers:
            if dual is not None:
                raise ValueError(explain_no_statistics(config))
            say(f'without labels: {name} has no BatchNorm to adapt, and is used as it is')
            return
        task.to(self.accelerator.device)
        adapter: Any = task.adapter

        def forward(input: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = model(match_dtype(adapter(input), teacher))
            return logits

        before, start = self._top1(forward, model), time.perf_counter()
        self._estimate(model, layers, forward, config)
        after = self._top1(forward, model)
        size = config.batch_size or len(self.data.train)
        images = len(self.data.train) // size * size
        seconds = time.perf_counter() - start
        measured = f': {before:.2f}% top-1 on the validation data before, {after:.2f}% now' if after else ''
        say(
            f'without labels: statistics of {len(layers)} BatchNorm layers of {name} estimated on '
            f'{images:,} training images ({seconds:.1f} s){measured}'
        )

    def _estimate(
        self,
        model: nn.Module,
        layers: Sequence[_BatchNorm],
        forward: Callable[[torch.Tensor], Any],
        config: TrainConfig,
    ) -> None:
        def estimate() -> None:
            assert config.batch_size is not None
            loader = create_loader(
                self.data.train,
                data_config=self.input_config,
                batch_size=config.batch_size,
                is_training=True,
                seed=config.seed,
                augmentation=augmentation_of(config),
                cache_images='off',
            )
            estimate_statistics(model, layers, forward, loader, self.accelerator.device)

        if not self._known:
            on_main(self.accelerator, estimate)
        for number, layer in enumerate(layers):
            for name, buffer in layer.named_buffers(recurse=False):
                key = f'{len(self._adapted) - 1}.{number}.{name}'
                with torch.no_grad():
                    buffer.copy_(self._known[key] if self._known else broadcast(buffer))
                self._tensors[key] = buffer.detach().cpu().clone()

    def _top1(self, forward: Callable[[torch.Tensor], torch.Tensor], model: nn.Module) -> float | None:
        if not self.data.val.labelled:
            return None
        model.eval()
        with torch.no_grad():
            metrics = evaluate(lambda x: {'teacher': forward(x)}, self.val_loader, self.accelerator)
        return metrics['teacher']['top1']

    def save(self) -> None:
        """Keep the statistics for a run that is resumed."""
        if self._tensors and self.accelerator.is_main_process and not self.file.is_file():
            write_tensors(self.file, self._tensors)
