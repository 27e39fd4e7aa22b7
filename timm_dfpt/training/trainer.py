"""The training loop: learners side by side on the same batches, exact across kills and processes."""
from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
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
from .checkpoint import remove_leftovers, restore_checkpoint, save_checkpoint
from .evaluate import evaluate
from .learner import Learner
from .options import TrainConfig
from .run_folder import RunFolder
from .sigterm import on_sigterm
from .teacher_cache import TeacherCache

__all__ = ['NonFiniteLossError', 'Preempted', 'Trainer']

_logger = logging.getLogger(__name__)

_MIXUP_STREAM = 3
# Steps between two looks of several processes at whether one of them was asked to stop; each look waits for all.
_STOP_INTERVAL = 8
# Updates left out in a row after which there is nothing to wait for any more.
_MAX_SKIPPED = 20


class NonFiniteLossError(RuntimeError):
    """A loss or gradient is NaN or infinite; the message says which, where, and what to try."""


class Preempted(RuntimeError):
    """The process was asked to stop (SIGTERM) and has saved a checkpoint."""


@dataclasses.dataclass
class _Progress:
    """Where the run is, and what the epoch has summed up so far: what a checkpoint needs beside weights."""

    epoch: int = 0
    step_in_epoch: int = 0
    updates: int = 0
    seconds: float = 0.0
    # The lines of the metrics file: kept here, it can never be ahead of the weights or behind them.
    lines: list[str] = dataclasses.field(default_factory=list)
    # By `learner/term` the sum and the count of this process.
    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    # By learner the updates left out in this epoch, and in a row.
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped_in_a_row: dict[str, int] = dataclasses.field(default_factory=dict)
    # By learner the updates in a row that the gradient scaler left out.
    overflows_in_a_row: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class _Note:
    """What a step of a learner computed, to be looked at later: a device need not wait for us every step."""

    step: int
    learner: str
    terms: dict[str, torch.Tensor]
    rows: torch.Tensor

    def values(self) -> list[float]:
        """Return the terms as numbers, in one transfer."""
        values: list[float] = torch.stack([value.float() for value in self.terms.values()]).tolist()
        return values


class Trainer:
    """Trains one or several learners and writes `metrics.jsonl` and checkpoints.

    Order and augmentation are functions of seed, epoch and row, and what a step draws of seed, step and process: with
    the weights and the state of the optimizers, a number of steps says all about where a run is.

    Args:
        config: Options of the run.
        accelerator: Devices, processes, precision and accumulation.
        learners: What to train; each sees the same batches. Those with a prompt path come first, since they compute
            the teacher's logits on the way.
        train_loader: Loader of `(input, target, index)`, prepared by `accelerator`.
        val_loader: Loader of the validation data, prepared by `accelerator`.
        folder: The run folder.
        mixup: timm's mixup, if any.
        after_epoch: Called with each epoch's line of `metrics.jsonl`, before its checkpoint: again, if a run is stopped
            between the two.
        teacher_cache: Logits of the first learner's teacher that are kept for later epochs and runs.
        origin: What the run is made from besides its options, see `describe_data` and `describe_teachers`; it
            counts in the main process. A checkpoint of another origin is refused.
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
        teacher_cache: TeacherCache | None = None,
        origin: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.accelerator, self.learners = config, accelerator, list(learners)
        self.train_loader, self.val_loader, self.folder, self.mixup = train_loader, val_loader, folder, mixup
        self.teacher_cache, self.origin = teacher_cache, dict(origin or {})
        self.steps = len(train_loader)
        self.after_epoch = after_epoch
        self.progress = _Progress()
        self.stop_requested = False
        self._stop_looks = 0
        self._notes: list[_Note] = []
        self._clock = time.monotonic()

    def fit(self) -> float:
        """Train to the last epoch, from the newest checkpoint if there is one.

        Returns:
            Seconds spent, those before a resumption counted in up to the checkpoint.

        Raises:
            NonFiniteLossError: A loss or gradient is NaN or infinite.
            OSError: A checkpoint cannot be written.
            Preempted: SIGTERM arrived; a checkpoint was saved.
            ValueError: The checkpoint is of another run, of other data or another teacher, or all are damaged.
        """
        self._restore()
        progress = self.progress
        bar = tqdm(
            total=self.config.epochs * self.steps,
            initial=progress.epoch * self.steps + progress.step_in_epoch,
            desc='training',
            unit='step',
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=1.0,
        )
        with bar, on_sigterm(self._request_stop):
            while progress.epoch < self.config.epochs:
                if progress.step_in_epoch < self.steps:
                    self._train_epoch(bar)
                self._finish_epoch()
        return progress.seconds

    def _request_stop(self) -> None:
        self.stop_requested = True

    def _asked_to_stop(self, at_once: bool = False) -> bool:
        """Say whether this process was asked to stop, or, looked at now and then, one of the others."""
        if self.accelerator.num_processes == 1:
            return self.stop_requested
        self._stop_looks += 1
        if self._stop_looks % _STOP_INTERVAL and not at_once:
            return False
        if self.stop_requested:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _preempted(self) -> Preempted:
        return Preempted(f'Stopped by SIGTERM; continue with --output {self.folder} --resume.')

    def _train_epoch(self, bar: Any) -> None:
        config, progress, accelerator = self.config, self.progress, self.accelerator
        loader: Any = self.train_loader
        loader.set_epoch(progress.epoch)
        if progress.step_in_epoch:
            loader = skip_first_batches(loader, progress.step_in_epoch)
            # accelerate before 1.15 starts what is left at epoch 0.
            loader.set_epoch(progress.epoch)
        for learner in self.learners:
            learner.train()
        for input, target, index in loader:
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
            stop = self._asked_to_stop()
            if stop or (config.checkpoint_steps and progress.updates % config.checkpoint_steps == 0):
                self._save()
            if stop:
                raise self._preempted()

    def _step(self, input: torch.Tensor, target: torch.Tensor, index: torch.Tensor) -> None:
        progress = self.progress
        step = progress.epoch * self.steps + progress.step_in_epoch
        if self.config.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        if self.mixup is not None:
            seed = derive_seed(self.config.seed, _MIXUP_STREAM, step, self.accelerator.process_index)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            input, target = self.mixup(input, target)
        known = self._known_logits(index)
        cached = set(known)
        for learner in self.learners:
            learner.set_update(progress.updates, progress.epoch)
            terms, kept = learner.step(input, target, step, known)
            self._notes.append(_Note(step, learner.name, terms, index))
            if not self.accelerator.sync_gradients:
                continue
            self._count_overflows(learner, step)
            if kept:
                learner.update_average(step=progress.updates + 1)
            if self.config.on_nonfinite == 'skip':
                self._count_skipped(learner.name, step, kept)
        if self.teacher_cache is not None and id(self.learners[0].teacher) not in cached:
            self.teacher_cache.put(progress.epoch, index, known[id(self.learners[0].teacher)])
        if self.accelerator.sync_gradients:
            progress.updates += 1

    def _known_logits(self, index: torch.Tensor) -> dict[int, torch.Tensor]:
        if self.teacher_cache is None:
            return {}
        logits = self.teacher_cache.get(self.progress.epoch, index, self.accelerator.device)
        return {} if logits is None else {id(self.learners[0].teacher): logits}

    def _count_skipped(self, learner: str, step: int, kept: bool) -> None:
        skipped, in_a_row = self.progress.skipped, self.progress.skipped_in_a_row
        if kept:
            in_a_row[learner] = 0
            return
        skipped[learner] = skipped.get(learner, 0) + 1
        in_a_row[learner] = in_a_row.get(learner, 0) + 1
        # All that would have gone into the update.
        first = step - step % self.steps % self.accelerator.gradient_accumulation_steps
        lost = [note for note in self._notes if note.learner == learner and note.step >= first]
        self._notes = [note for note in self._notes if note not in lost]
        found = next((bad for note in lost if (bad := self._describe(note, note.values()))), None)
        found = found or f'{learner}: step {step + 1} is not finite on another process'
        _logger.warning(f'{found}: no update from it.')
        if in_a_row[learner] >= _MAX_SKIPPED:
            raise NonFiniteLossError(
                f'{learner}: {_MAX_SKIPPED} updates in a row were not finite, the last at step {step + 1}. {_REMEDY}'
            )

    def _count_overflows(self, learner: Learner, step: int) -> None:
        in_a_row = self.progress.overflows_in_a_row
        in_a_row[learner.name] = in_a_row.get(learner.name, 0) + 1 if learner.overflowed else 0
        if in_a_row[learner.name] >= _MAX_SKIPPED:
            # A scaler that looks for the largest scale overflows once, and then not for thousands of updates.
            raise NonFiniteLossError(
                f'{learner.name}: the gradients of {_MAX_SKIPPED} updates in a row were not finite, the last at step '
                f'{step + 1}, though the gradient scaler went down to {self.accelerator.scaler.get_scale():.0e}: no '
                f'update was made from them. {_REMEDY} Or use --mixed-precision bf16.'
            )

    def _describe(self, note: _Note, values: Sequence[float]) -> str | None:
        """Say which term of a step is not finite, and where; `None` if all are."""
        for key, value in zip(note.terms, values, strict=True):
            if not math.isfinite(value):
                rows = ', '.join(str(row) for row in note.rows.tolist()[:16]) + (', ...' if len(note.rows) > 16 else '')
                return (
                    f'{note.learner}: {key} is {value} at step {note.step + 1} (epoch {note.step // self.steps + 1}, '
                    f'training rows {rows})'
                )
        return None

    def _look(self) -> dict[str, str]:
        """Add what was noted since the last look to the sums of the epoch, and make sure that all is finite."""
        shown: dict[str, str] = {}
        for note in self._notes:
            values = note.values()
            bad = self._describe(note, values)
            if bad is not None:
                raise NonFiniteLossError(f'{bad}. The last checkpoint is from before. {_REMEDY}')
            for key, value in zip(note.terms, values, strict=True):
                total = self.progress.sums.setdefault(f'{note.learner}/{key}', [0.0, 0])
                total[0] += value
                total[1] += 1
            if note.learner == self.learners[0].name:
                terms = zip(note.terms, values, strict=True)
                shown = {key.removesuffix('_loss'): f'{value:.3f}' for key, value in terms if 'loss' in key}
        self._notes.clear()
        return shown

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
        for learner in self.learners:
            prefix = f'{learner.name}/'
            train = {key.removeprefix(prefix): value for key, value in means.items() if key.startswith(prefix)}
            if not train:
                raise NonFiniteLossError(
                    f'{learner.name}: not one update of epoch {progress.epoch + 1} was finite. {_REMEDY}'
                )
            line[learner.name] = {
                'lr': [group['lr'] for o in learner.optimizers for group in o.param_groups[:1]],
                'train': train,
            }
            if self._is_validated(progress.epoch + 1, learner):
                line[learner.name]['val'] = self._evaluate(learner)
            if self.config.on_nonfinite == 'skip':
                line[learner.name]['skipped'] = progress.skipped.get(learner.name, 0)
        progress.epoch += 1
        progress.step_in_epoch = 0
        progress.sums, progress.skipped = {}, {}
        progress.lines.append(json.dumps(line))
        self._write_metrics()
        accelerator.log(_flat(line), step=progress.epoch)
        if self.after_epoch is not None:
            self.after_epoch(line)
        self._save()
        if accelerator.is_main_process:
            tqdm.write(_epoch_line(line, self.config.epochs))
        if self._asked_to_stop(at_once=True):
            raise self._preempted()

    def _is_validated(self, epoch: int, learner: Learner) -> bool:
        # A student that is exported is published with its accuracy.
        due = epoch % self.config.val_interval == 0 or epoch == self.config.epochs
        return due or epoch in learner.config.export_epochs

    def _evaluate(self, learner: Learner) -> dict[str, dict[str, float | None]]:
        def batches() -> Iterator[Any]:
            for batch in self.val_loader:
                if self._asked_to_stop():
                    # Nothing has changed since the last step: a run stopped here evaluates once more.
                    self._save()
                    raise self._preempted()
                yield batch

        learner.eval()
        metrics = evaluate(learner.outputs, batches(), self.accelerator)
        return {who: self._finite_metrics(learner, who, values) for who, values in metrics.items()}

    def _finite_metrics(self, learner: Learner, who: str, values: Mapping[str, float]) -> dict[str, float | None]:
        """Stop at a metric that is NaN or infinite, or make it `None`: JSON has no such numbers."""
        bad = {key: value for key, value in values.items() if not math.isfinite(value)}
        if bad:
            found = ', '.join(f'{key} is {value}' for key, value in bad.items())
            found = f'{learner.name}: {found} for {who} on the validation data after epoch {self.progress.epoch + 1}'
            if self.config.on_nonfinite == 'stop':
                raise NonFiniteLossError(f'{found}. The last checkpoint is from before. {_REMEDY}')
            _logger.warning(f'{found}: null in {self.folder.metrics.name}.')
        return {key: None if key in bad else value for key, value in values.items()}

    def _write_metrics(self) -> None:
        if self.accelerator.is_main_process:
            self.folder.write_metrics(self.progress.lines)

    def _averages(self) -> dict[str, nn.Module]:
        return {
            f'average_{i}': learner.average for i, learner in enumerate(self.learners) if learner.average is not None
        }

    def _save(self) -> None:
        self._look()
        if self.teacher_cache is not None:
            self.teacher_cache.flush()
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
            self.accelerator, self.folder.checkpoints, step, self.config.checkpoint_hist, self._averages(), state
        )

    def _restore(self) -> None:
        if self.accelerator.is_main_process:
            remove_leftovers(self.folder.path)
        state = restore_checkpoint(self.accelerator, self.folder.checkpoints, self._averages(), self.origin)
        if state is not None:
            state.pop('origin', None)
            self.progress = _Progress(**{**state, 'sums': self._own_sums(state['sums'])})
        self._write_metrics()
        self._clock = time.monotonic()

    def _own_sums(self, saved: list[dict[str, list[float]]]) -> dict[str, list[float]]:
        if len(saved) == self.accelerator.num_processes:
            return saved[self.accelerator.process_index]
        _logger.warning(
            f'The run was saved by {len(saved)} processes and goes on with {self.accelerator.num_processes}: the order '
            'of the images stays, but dropout, mixup and rounding will differ from a run that was not interrupted.'
        )
        return {
            key: [sum(sums[key][0] for sums in saved) / len(saved), saved[0][key][1]] for key in saved[0]
        }


_REMEDY = (
    'Try a lower --lr or --prompt-lr, --clip-grad 1.0, --warmup-epochs 1, a higher --temperature, or --on-nonfinite '
    'skip if a few images are to blame.'
)


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
        top1 = ', '.join(f'{who} {metrics["top1"]:.2f}' for who, metrics in values.get('val', {}).items())
        parts.append(f'{name}: loss {values["train"]["loss"]:.3f}' + (f', val top-1 {top1}' if top1 else ''))
        if values.get('skipped'):
            parts.append(f'{values["skipped"]} updates left out')
    return ' | '.join(parts)
