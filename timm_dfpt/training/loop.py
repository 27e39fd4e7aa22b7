"""The training loop: learners side by side on the same batches, exact across kills and processes."""
from __future__ import annotations

import json
import logging
import random
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from timm.data import Mixup
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .augment import derive_seed
from .checkpoint import latest_checkpoint, save_checkpoint
from .config import TrainConfig
from .evaluate import evaluate
from .learner import Learner

__all__ = ['METRICS_FILE', 'NonFiniteLossError', 'Preempted', 'Trainer']

_logger = logging.getLogger(__name__)

METRICS_FILE = 'metrics.jsonl'
_MIXUP_STREAM = 3
_NOT_SUMMED = ('output', 'prompt_output', 'teacher_output')


class NonFiniteLossError(RuntimeError):
    """A loss is NaN or infinite; the message says which term, where, and what to try."""


class Preempted(RuntimeError):
    """The process was asked to stop (SIGTERM) and has saved a checkpoint."""


class _Progress:
    """Where the run is, and the sums of the epoch so far: what a checkpoint needs beside weights."""

    def __init__(self) -> None:
        self.epoch = 0
        self.step_in_epoch = 0
        self.updates = 0
        self.metrics_bytes = 0
        self.sums: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


class Trainer:
    """Trains one or several learners and writes `metrics.jsonl` and checkpoints.

    Args:
        config: Options of the run.
        accelerator: Devices, processes, precision and accumulation.
        learners: What to train; each sees the same batches. Those with a prompt path come first, since they compute
            the teacher's logits on the way.
        train_loader: Loader of `(input, target, index)`, prepared by `accelerator`.
        val_loader: Loader of the validation data, prepared by `accelerator`.
        run_dir: The run folder.
        mixup: timm's mixup, if any.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        learners: Sequence[Learner],
        train_loader: DataLoader,
        val_loader: DataLoader,
        run_dir: Path,
        mixup: Mixup | None = None,
    ) -> None:
        self.config, self.accelerator, self.learners = config, accelerator, list(learners)
        self.train_loader, self.val_loader, self.run_dir, self.mixup = train_loader, val_loader, run_dir, mixup
        self.progress = _Progress()
        accelerator.register_for_checkpointing(self.progress)
        self.checkpoints = run_dir / 'checkpoints'
        self.stop_requested = False
        # The terms of the steps since the last look: checked together, so that a device need not wait every step.
        self._pending: list[tuple[int, str, dict[str, torch.Tensor], torch.Tensor]] = []

    def fit(self) -> float:
        """Train to the last epoch, from the newest checkpoint if there is one.

        Returns:
            Seconds spent.

        Raises:
            NonFiniteLossError: A loss is NaN or infinite.
            Preempted: SIGTERM arrived; a checkpoint was saved.
        """
        self._restore()
        start = time.monotonic()
        previous = signal.signal(signal.SIGTERM, self._request_stop)
        total = self.config.epochs * len(self.train_loader)
        done = self.progress.epoch * len(self.train_loader) + self.progress.step_in_epoch
        bar = tqdm(
            total=total,
            initial=done,
            desc='training',
            unit='step',
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=1.0,
        )
        try:
            while self.progress.epoch < self.config.epochs:
                self._train_epoch(bar)
        finally:
            bar.close()
            signal.signal(signal.SIGTERM, previous)
        return time.monotonic() - start

    def _request_stop(self, signum: int, frame: Any) -> None:
        self.stop_requested = True

    def _restore(self) -> None:
        path = latest_checkpoint(self.checkpoints)
        if path is not None:
            self.accelerator.load_state(str(path))
            self.accelerator.print(f'resuming from {path} (epoch {self.progress.epoch + 1})')
        metrics = self.run_dir / METRICS_FILE
        if self.accelerator.is_main_process:
            # Lines of an epoch that was evaluated but not yet in a checkpoint are written again.
            with open(metrics, 'ab') as file:
                file.truncate(self.progress.metrics_bytes)

    def _train_epoch(self, bar: Any) -> None:
        config, progress, accelerator = self.config, self.progress, self.accelerator
        loader: Any = self.train_loader
        loader.set_epoch(progress.epoch)
        steps = len(loader)
        if progress.step_in_epoch:
            loader = skip_first_batches(loader, progress.step_in_epoch)
            loader.set_epoch(progress.epoch)
        for learner in self.learners:
            learner.train()
        for input, target, index in loader:
            step = progress.epoch * steps + progress.step_in_epoch
            if config.channels_last:
                input = input.contiguous(memory_format=torch.channels_last)
            input, target = self._mixed(input, target, step)
            known: dict[int, torch.Tensor] = {}
            for learner in self.learners:
                learner.set_update(progress.updates, progress.epoch)
                result = learner.step(input, target, step, known)
                self._note(step, learner.name, result, index)
            progress.step_in_epoch += 1
            if accelerator.sync_gradients:
                progress.updates += 1
                for learner in self.learners:
                    learner.task.update_ema(step=progress.updates)
            bar.update()
            last = progress.step_in_epoch == steps
            save = config.checkpoint_steps and progress.step_in_epoch % config.checkpoint_steps == 0
            if last or save or self.stop_requested or progress.step_in_epoch % config.log_interval == 0:
                shown = self._look()
                bar.set_postfix(shown, refresh=False)
            if not last and (save or self.stop_requested):
                self._save()
            if self.stop_requested:
                raise Preempted(f'stopped by SIGTERM; continue with --output {self.run_dir} --resume')
        self._finish_epoch()

    def _mixed(self, input: torch.Tensor, target: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.mixup is None:
            return input, target
        seed = derive_seed(self.config.seed, _MIXUP_STREAM, step, self.accelerator.process_index)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        return self.mixup(input, target)

    def _note(self, step: int, name: str, result: Mapping[str, torch.Tensor], index: torch.Tensor) -> None:
        terms = {key: value.detach() for key, value in result.items() if key not in _NOT_SUMMED}
        self._pending.append((step, name, terms, index))
        if self.config.on_nonfinite == 'stop' and len(self._pending) > 4096:
            self._look()

    def _look(self) -> dict[str, str]:
        """Add the terms since the last look to the sums of the epoch, and make sure that all are finite."""
        sums = self.progress.sums
        for step, name, terms, index in self._pending:
            for key, value in terms.items():
                number = float(value)
                if not np.isfinite(number):
                    rows = ', '.join(str(i) for i in index.tolist()[:16])
                    raise NonFiniteLossError(
                        f'{name}: {key} is {number} at step {step + 1} (epoch {self.progress.epoch + 1}, training rows '
                        f'{rows}, ...). The last checkpoint is from before. Try a lower --lr or --prompt-lr, '
                        '--clip-grad 1.0, --warmup-epochs or a lower --temperature.'
                    )
                sums[f'{name}/{key}'] = sums.get(f'{name}/{key}', 0.0) + number
        shown = {}
        if self._pending:
            _, name, terms, _ = self._pending[-len(self.learners)]
            shown = {key.removesuffix('_loss'): f'{float(v):.3f}' for key, v in terms.items() if 'loss' in key}
        self._pending.clear()
        return shown

    def _finish_epoch(self) -> None:
        progress, accelerator = self.progress, self.accelerator
        steps = progress.step_in_epoch
        line: dict[str, Any] = {'epoch': progress.epoch + 1, 'updates': progress.updates}
        sums = {key: torch.tensor(value / steps, dtype=torch.float64) for key, value in progress.sums.items()}
        means = {
            key: float(accelerator.reduce(value.to(accelerator.device), 'mean')) if accelerator.num_processes > 1 else
            float(value)
            for key, value in sums.items()
        }  # fmt: skip
        for learner in self.learners:
            prefix = f'{learner.name}/'
            train = {key.removeprefix(prefix): value for key, value in means.items() if key.startswith(prefix)}
            line[learner.name] = {
                'lr': [group['lr'] for o in learner.optimizers for group in o.param_groups[:1]],
                'train': train,
                'val': self.evaluate(learner, self.val_loader),
            }
        progress.epoch += 1
        progress.step_in_epoch = 0
        progress.sums = {}
        if accelerator.is_main_process:
            with open(self.run_dir / METRICS_FILE, 'ab') as file:
                file.write((json.dumps(line) + '\n').encode())
                progress.metrics_bytes = file.tell()
        accelerator.log(_flat(line), step=progress.epoch)
        self._save()
        tqdm.write(_epoch_line(line, self.config.epochs)) if accelerator.is_main_process else None

    def evaluate(self, learner: Learner, loader: DataLoader) -> dict[str, dict[str, float]]:
        """Measure what `learner` has so far; see `timm_dfpt.training.evaluate`."""
        learner.eval()
        result = evaluate(learner.outputs, loader, self.accelerator)
        learner.train()
        return result

    def _save(self) -> None:
        self._look()
        save_checkpoint(self.accelerator, self.checkpoints, self._checkpoint_number(), self.config.checkpoint_hist)

    def _checkpoint_number(self) -> int:
        return self.progress.epoch * len(self.train_loader) + self.progress.step_in_epoch


def _flat(values: Mapping[str, Any], prefix: str = '') -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f'{prefix}{key}/')
        elif isinstance(value, (int, float)):
            flat[f'{prefix}{key}'] = value
    return flat


def _epoch_line(line: Mapping[str, Any], epochs: int) -> str:
    parts = [f'epoch {line["epoch"]:>{len(str(epochs))}}/{epochs}']
    for name, values in line.items():
        if not isinstance(values, Mapping):
            continue
        top1 = ', '.join(f'{who} {metrics["top1"]:.2f}' for who, metrics in values['val'].items())
        parts.append(f'{name}: loss {values["train"]["loss"]:.3f}, val top-1 {top1}')
    return ' | '.join(parts)
