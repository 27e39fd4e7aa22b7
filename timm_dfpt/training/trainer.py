"""The training loop: learners side by side on the same batches, exact across kills and processes."""
from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from accelerate.utils import gather_object
from timm.data import Mixup
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.seeding import derive_seed
from ..job.options import TrainConfig
from ..job.stopping import NonFiniteLossError, Preempted, StopRequest, on_stop, stop_signal
from ..tasks.evaluation import evaluate
from .best import BestEpochs
from .checkpoint import remove_leftovers, restore_checkpoint, save_checkpoint
from .first_reading import until_bad_image
from .kept_logits import KeptLogits
from .learner import Learner
from .progress import Note, Progress
from .report import attempt, epoch_line
from .run_folder import RunFolder

__all__ = ['Trainer']

_logger = logging.getLogger(__name__)

_MIXUP_STREAM = 3
_STEP_STREAM = 4
# Updates in a row that a gradient scaler leaves out, after which there is nothing to wait for any more.
_MAX_OVERFLOWS = 20


class Trainer:
    """Loop that trains one or several learners and writes `metrics.jsonl` and checkpoints.

    Order and augmentation are functions of seed, epoch and row, and what a step draws of seed, step and process: with
    the weights and the state of the optimizers, the number of steps determines where a run is.

    Args:
        config: Options of the run.
        accelerator: Devices, processes, precision and accumulation.
        learners: What to train; each sees the same batches. Those with a prompt path come first, since they compute
            the teacher's logits on the way.
        train_loader: Loader of `(input, target, index)`, prepared by `accelerator`.
        val_loader: Loader of the validation data, prepared by `accelerator`.
        folder: The run folder.
        mixup: timm's mixup, if any.
        after_epoch: Called with each epoch's line of `metrics.jsonl` before its checkpoint; again after a stop between.
        kept: Logits that the first learner is trained on, kept for later epochs and runs.
        origin: What the run is made from besides its options, in the main process; see `describe_data` and
            `describe_teachers`. A checkpoint of another origin is refused.
        unchecked: Whether the images were not checked before.
    """

    def __init__(
        self,
        *,
        config: TrainConfig,
        accelerator: Accelerator,
        learners: Sequence[Learner],
        train_loader: DataLoader,
        val_loader: DataLoader,
        folder: RunFolder,
        mixup: Mixup | None = None,
        after_epoch: Callable[[Mapping[str, Any]], None] | None = None,
        kept: KeptLogits | None = None,
        origin: Mapping[str, str] | None = None,
        unchecked: bool = False,
    ) -> None:
        self.config, self.accelerator, self.learners = config, accelerator, list(learners)
        self.train_loader, self.val_loader, self.folder, self.mixup = train_loader, val_loader, folder, mixup
        self.kept, self.origin, self.unchecked = kept, dict(origin or {}), unchecked
        self.steps = len(train_loader)
        self.after_epoch = after_epoch
        self.progress = Progress()
        self.stop = StopRequest(accelerator)
        self.best = BestEpochs(self.learners, config.export_weights == 'best')
        self._notes: list[Note] = []
        self._seeds: list[int] = []
        self._clock = time.monotonic()

    def fit(self) -> float:
        """Train to the last epoch, from the newest checkpoint if there is one.

        With `patience` that may be an earlier one than `epochs`. The learners are left with the weights that are to be
        exported.

        Returns:
            Seconds spent, those before a resumption counted in up to the checkpoint.

        Raises:
            BadImageError: If an image cannot be read; a checkpoint was saved.
            NonFiniteLossError: If a loss or gradient is NaN or infinite.
            OSError: If a checkpoint cannot be written.
            Preempted: A signal asked to stop, see `on_stop`; a checkpoint was saved.
            ValueError: If the checkpoint is of another run, of other data or another teacher, or all are damaged.
        """
        self._restore()
        progress = self.progress
        bar = tqdm(
            desc='training',
            unit='step',
            initial=progress.epoch * self.steps + progress.step_in_epoch,
            total=self.config.epochs * self.steps,
            disable=not self.accelerator.is_main_process or sys.stderr is None,
            dynamic_ncols=True,
            mininterval=1.0,
        )
        # What was asked for is seen between two updates, where there is nothing but weights to save.
        with bar, on_stop(lambda signum: None):
            while progress.epoch < self.config.epochs and not self._ran_out_of_patience():
                if progress.step_in_epoch < self.steps:
                    self._train_epoch(bar)
                self._finish_epoch()
        if stop_signal() is not None and self.accelerator.num_processes == 1:
            raise self._preempted()
        if progress.epoch < self.config.epochs:
            self.accelerator.print(
                f'stopped after epoch {progress.epoch} of {self.config.epochs}: the last {self.config.patience} '
                'validations were not better than the best before'
            )
        self.best.restore(progress.best)
        return progress.seconds

    def _ran_out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.best.waited(self.progress.best) >= patience

    def _preempted(self) -> Preempted:
        # Where another process was asked, it is that one which knows the signal.
        signum = stop_signal() or signal.SIGTERM
        return Preempted(signum, f'continue with --output {shlex.quote(str(self.folder))} --resume')

    def _train_epoch(self, bar: Any) -> None:
        config, progress, accelerator = self.config, self.progress, self.accelerator
        loader: Any = self.train_loader
        loader.set_epoch(progress.epoch)
        if progress.step_in_epoch:
            loader = skip_first_batches(loader, progress.step_in_epoch)
            # accelerate before 1.15 starts what is left at epoch 0.
            loader.set_epoch(progress.epoch)
        self._seeds = [self._derive_seed(_STEP_STREAM, step) for step in range(self.steps)]
        for learner in self.learners:
            learner.train()
            # Before the first step accumulates: what ends with an epoch may wrap anew what is trained.
            learner.set_progress(progress.epoch, progress.updates)
        for input, target, index in self._until_bad_image(loader):
            # One context for all learners: each would count a step of the accumulation of its own.
            with accelerator.accumulate(*(learner.module for learner in self.learners)):
                self._step(input, target, index)
            progress.step_in_epoch += 1
            bar.update()
            if not accelerator.sync_gradients or progress.step_in_epoch == self.steps:
                # Gradients are in no checkpoint: only between updates is there nothing but weights to save.
                continue
            if len(self._notes) >= config.log_interval * len(self.learners):
                bar.set_postfix(self._look(), refresh=False)
            stop = self.stop.arrived()
            if stop or (config.checkpoint_steps and progress.updates % config.checkpoint_steps == 0):
                self._save()
            if stop:
                raise self._preempted()

    def _until_bad_image(self, loader: Any) -> Iterator[Any]:
        # After the first epoch all have been read.
        together = self.unchecked and self.progress.epoch == 0
        return until_bad_image(loader, self.accelerator, together, self._save_before_bad_image)

    def _save_before_bad_image(self) -> str:
        progress = self.progress
        named = 'Start again with --check-images on, which names all such images, or --on-bad-image skip.'
        if progress.updates == 0:
            return named
        # Gradients are in no checkpoint.
        if progress.step_in_epoch % self.config.grad_accum_steps == 0 or progress.step_in_epoch == self.steps:
            self._save()
        resume = f'continue with --output {shlex.quote(str(self.folder))} --resume'
        return f'With a readable image of the same name in its place, {resume}. {named}'

    def _derive_seed(self, stream: int, step_in_epoch: int) -> int:
        step = self.progress.epoch * self.steps + step_in_epoch
        return derive_seed(self.config.seed, stream, step, self.accelerator.process_index)

    def _step(self, input: torch.Tensor, target: torch.Tensor, index: torch.Tensor) -> None:
        """Let every learner make a step on one batch."""
        progress = self.progress
        step = progress.epoch * self.steps + progress.step_in_epoch
        if self.config.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        if self.mixup is not None:
            seed = self._derive_seed(_MIXUP_STREAM, progress.step_in_epoch)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            # Without labels all are -1, of which no class can be made; what becomes of them does not matter then.
            input, target = self.mixup(input, target.clamp(min=0))
        if self.config.compile_mode == 'reduce-overhead' and progress.step_in_epoch % self.config.grad_accum_steps == 0:
            # Gradients that add up, and logits that learners share, are of CUDA graphs that must not be replayed yet.
            torch.compiler.cudagraph_mark_step_begin()
        cached = self.kept.get(progress.epoch, index) if self.kept is not None else {}
        known = dict(cached)
        for learner in self.learners:
            learner.set_progress(progress.epoch, progress.updates)
            terms = learner.step(input, target, self._seeds[progress.step_in_epoch], known, self._weight())
            self._notes.append(Note(step, learner.name, terms, index))
            if self.accelerator.sync_gradients:
                self._count_overflows(learner, step)
                learner.update_average(progress.updates + 1)
        if self.kept is not None:
            computed = {model: logits for model, logits in known.items() if model not in cached}
            self.kept.put(progress.epoch, index, computed)
        if self.accelerator.sync_gradients:
            progress.updates += 1

    def _weight(self) -> float:
        """Return the weight of a micro-batch in its update: the last of an epoch may be made from fewer."""
        usual, rest = self.config.grad_accum_steps, self.steps % self.config.grad_accum_steps
        return usual / rest if rest and self.progress.step_in_epoch >= self.steps - rest else 1.0

    def _count_overflows(self, learner: Learner, step: int) -> None:
        in_a_row = self.progress.overflows_in_a_row
        in_a_row[learner.name] = in_a_row.get(learner.name, 0) + 1 if learner.overflowed else 0
        if in_a_row[learner.name] >= _MAX_OVERFLOWS:
            # A scaler that searches for the largest scale overflows once, and then not for thousands of updates.
            raise NonFiniteLossError(
                f'{learner.name}: the gradients of {_MAX_OVERFLOWS} updates in a row were not finite, the last at '
                f'step {step + 1}, though the gradient scaler went down to {self.accelerator.scaler.get_scale():.0e}: '
                'no update was made from them; use --mixed-precision bf16, which needs no scaler',
                self.folder,
            )

    def _look(self) -> dict[str, str]:
        """Add what was noted since the last call to the sums of the epoch, and make sure that all is finite."""
        shown: dict[str, str] = {}
        for note in self._notes:
            values = note.values()
            bad = note.find_non_finite(values, self.steps)
            if bad is not None:
                raise NonFiniteLossError(bad, self.folder)
            for key, value in zip(note.terms, values, strict=True):
                total = self.progress.sums.setdefault(f'{note.learner}/{key}', [0.0, 0])
                total[0] += value
                total[1] += 1
            if note.learner == self.learners[0].name:
                terms = zip(note.terms, values, strict=True)
                shown = {key.removesuffix('_loss'): f'{value:.3f}' for key, value in terms if 'loss' in key}
        if self._notes:
            self._look_at_weights()
        self._notes.clear()
        return shown

    def _look_at_weights(self) -> None:
        for learner in self.learners:
            name = learner.find_non_finite()
            if name is None:
                continue
            found = f'{learner.name}: {name} is not finite after step {self._notes[-1].step + 1}'
            if 'running_' in name:
                found += ' (statistics of the images: are --mean and --std right for them?)'
            raise NonFiniteLossError(found, self.folder)

    def _means(self) -> dict[str, float]:
        """Return the means of the epoch over steps and processes."""
        sums = self.progress.sums
        means = torch.tensor([total / count for total, count in sums.values()], dtype=torch.float64)
        if self.accelerator.num_processes > 1 and len(means):
            # Every process has made the same steps, so that the mean of means is the mean.
            gathered: list[list[float]] = gather_object([means.tolist()])
            means = torch.tensor(gathered, dtype=torch.float64).mean(dim=0)
        return dict(zip(sums, means.tolist(), strict=True))

    def _finish_epoch(self) -> None:
        progress, accelerator = self.progress, self.accelerator
        self._look()
        line: dict[str, Any] = {'epoch': progress.epoch + 1, 'updates': progress.updates}
        means = self._means()
        due = (progress.epoch + 1) % self.config.val_interval == 0 or progress.epoch + 1 == self.config.epochs
        for learner in self.learners:
            prefix = f'{learner.name}/'
            train = {key.removeprefix(prefix): value for key, value in means.items() if key.startswith(prefix)}
            line[learner.name] = {
                'lr': [group['lr'] for o in learner.optimizers for group in o.param_groups[:1]],
                'train': train,
            }
            # A student that is exported is published with its accuracy.
            if due or progress.epoch + 1 in learner.config.export_epochs:
                line[learner.name]['val'] = metrics = self._evaluate(learner)
                self.best.note(progress.best, learner, progress.epoch + 1, metrics)
        progress.epoch += 1
        progress.step_in_epoch = 0
        progress.sums = {}
        progress.lines.append(json.dumps(line))
        self._write_metrics()
        attempt('logging an epoch', lambda: accelerator.log(_flat(line), step=progress.epoch))
        if self.after_epoch is not None:
            self.after_epoch(line)
        self._save()
        if accelerator.is_main_process:
            tqdm.write(epoch_line(line, self.config.epochs))
        if self.stop.arrived(at_once=True):
            raise self._preempted()

    def _evaluate(self, learner: Learner) -> dict[str, dict[str, float]]:
        def batches() -> Iterator[Any]:
            for batch in self._until_bad_image(self.val_loader):
                if self.stop.arrived():
                    # Nothing has changed since the last step: a run stopped here evaluates once more.
                    self._save()
                    raise self._preempted()
                yield batch

        learner.eval()
        metrics = evaluate(learner.outputs, batches(), self.accelerator, learner.measure)
        for who, values in metrics.items():
            bad = ', '.join(f'{key} is {value}' for key, value in values.items() if not math.isfinite(value))
            if bad:
                where = f'for {who} on the validation data after epoch {self.progress.epoch + 1}'
                raise NonFiniteLossError(f'{learner.name}: {bad} {where}', self.folder)
        return metrics

    def _write_metrics(self) -> None:
        if self.accelerator.is_main_process:
            self.folder.write_metrics(self.progress.lines)

    def _unprepared(self) -> dict[str, nn.Module]:
        averages = {f'average_{i}': learner.average for i, learner in enumerate(self.learners)}
        return {**{name: average for name, average in averages.items() if average is not None}, **self.best.weights}

    def _save(self) -> None:
        self._look()
        if self.kept is not None:
            self.kept.flush()
        progress, now = self.progress, time.monotonic()
        progress.seconds += now - self._clock
        self._clock = now
        state = {
            **dataclasses.asdict(progress),
            # Sums are of each process; the rest is the same everywhere.
            'sums': gather_object([progress.sums]),
            'origin': self.origin,
        }
        step = progress.epoch * self.steps + progress.step_in_epoch
        save_checkpoint(
            self.accelerator, self.folder.checkpoints, step, self.config.checkpoint_hist, self._unprepared(), state
        )

    def _restore(self) -> None:
        if self.accelerator.is_main_process:
            remove_leftovers(self.folder.path)
        state = restore_checkpoint(self.accelerator, self.folder.checkpoints, self._unprepared(), self.origin)
        if state is not None:
            state.pop('origin', None)
            self.progress = Progress(**{**state, 'sums': self._own_sums(state['sums'])})
        self._write_metrics()
        self._clock = time.monotonic()

    def _own_sums(self, saved: list[dict[str, list[float]]]) -> dict[str, list[float]]:
        if len(saved) == self.accelerator.num_processes:
            return saved[self.accelerator.process_index]
        _logger.warning(
            f'The run was saved by {len(saved)} processes and continues with {self.accelerator.num_processes}: the '
            'order of the images is the same, but dropout, mixup and rounding will differ from an uninterrupted run.'
        )
        return {key: [sum(sums[key][0] for sums in saved) / len(saved), saved[0][key][1]] for key in saved[0]}


def _flat(values: Mapping[str, Any], prefix: str = '') -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f'{prefix}{key}/')
        elif isinstance(value, (int, float)):
            flat[f'{prefix}{key}'] = value
    return flat
