"""Whose classes a teacher knows, and with which head it teaches those of the data: its own, a fitted one, or none."""
from __future__ import annotations

import dataclasses
import json
import time
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from safetensors import safe_open
from torch import nn

from ..data.image_split import ImageSplit
from ..data.loader import create_loader
from ..hub.files import read_tensors, write_tensors
from ..job.devices import on_main
from ..job.options import TrainConfig
from ..tasks.inputs import InputAdapter, input_config_of
from ..teacher.fitted_head import fit_head, put_head, reorder_classes
from ..teacher.head_record import FittedHead, fitted_head_of

__all__ = ['TeacherHeads', 'read_heads', 'write_heads']

Choice = Literal['own', 'reordered', 'fit', 'new']


@dataclasses.dataclass
class TeacherHeads:
    """Provider of heads for the classes of the data to the teachers of a run.

    Args:
        class_names: The classes.
        images: The training images.
        input_config: What loaders give, see `resolve_input_config`.
        accelerator: Devices and processes; the main one fits, and the others get its head to the bit.
        known: Heads of the run so far, by name of the learner: a run that is resumed fits none again.
    """

    class_names: Sequence[str]
    images: ImageSplit
    input_config: Mapping[str, Any]
    accelerator: Accelerator
    known: Mapping[str, FittedHead] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reasons: dict[nn.Module, str] = {}
        """What was decided for each teacher, in words."""

    def give(self, name: str, config: TrainConfig, teacher: nn.Module) -> tuple[nn.Module, Choice]:
        """Return the teacher with a head for the classes of the data, and which that is.

        Args:
            name: Name of the learner.
            config: Its options.
            teacher: The teacher as it was published, or with the head that a prompt path brings along.

        Raises:
            ValueError: If the teacher's head cannot be what the options ask for.
        """
        brought = fitted_head_of(teacher)
        if brought is not None:
            self._check_brought(config, brought)
            self.reasons[teacher] = f'with the head of its prompt path ({_describe(brought)})'
            return teacher, 'own'
        choice, reason, order = self._choose(config, teacher)
        if choice in ('fit', 'reordered'):
            start = time.perf_counter()
            head = self.known.get(name) or on_main(self.accelerator, lambda: self._make(config, teacher, order))
            teacher = put_head(teacher, head, self.class_names)
            if choice == 'fit':
                took = 'kept in the run folder' if name in self.known else f'{time.perf_counter() - start:.1f} s'
                reason = f'head fitted, as {reason} ({_describe(head)}; {took})'
        self.reasons[teacher] = reason
        return teacher, choice

    def _check_brought(self, config: TrainConfig, head: FittedHead) -> None:
        if head.num_classes != len(self.class_names):
            raise ValueError(
                f'prompt_path={config.prompt_path!r} has a head of {head.num_classes} classes, but the data have '
                f'{len(self.class_names)}: leave --prompt-path out, or use the data that it was tuned on.'
            )

    def _choose(self, config: TrainConfig, teacher: Any) -> tuple[Choice, str, list[int]]:
        """Return the choice, why, and for classes in another order which of the teacher's each of the data's is."""
        classes, wanted = len(self.class_names), config.teacher_head
        known = [unicodedata.normalize('NFC', name) for name in teacher.pretrained_cfg.get('label_names') or []]
        count = teacher.num_classes
        label = config.teacher or config.prompt_path
        if known and count and len(known) != count:
            if count == classes and wanted in ('auto', 'own'):
                raise ValueError(
                    f'teacher {label!r} has {len(known)} names for {count} classes: correct label_names in its '
                    'config.json, or fit a head with --teacher-head fit.'
                )
            known = []
        match, order = _match(known, self.class_names) if count == classes else ('others', [])
        if wanted == 'new':
            return 'new', 'with a new head on the prompt path alone; its own logits are not used: a = c = 0', []
        if wanted == 'fit':
            return 'fit', '--teacher-head says', []
        if match == 'same':
            return 'own', 'with its own head, as its classes are those of the data', []
        if match == 'trust':
            return 'own', 'with its own head; that its classes are those of the data is taken on trust', []
        if match == 'order':
            return 'reordered', 'with its own head, put into the order in which the data have the same classes', order
        if not count:
            why = 'it is an encoder without classes'
        elif count != classes:
            why = f'it knows {count} classes and the data have {classes}'
        else:
            where = next(i for i, (a, b) in enumerate(zip(known, self.class_names, strict=True)) if a != b)
            why = (
                f'class {where} is {known[where]!r} for the teacher and {self.class_names[where]!r} in the data'
            )
        if wanted == 'own':
            raise ValueError(
                f'teacher_head=own: teacher {label!r} has other classes than the data: {why}. Fit a head to the data '
                '(--teacher-head fit), or fine-tune it on them first (--method supervised --student TEACHER '
                '--student-pretrained) and give the result as --teacher local-dir:RUN/student.'
            )
        return 'fit', why, []

    def _make(self, config: TrainConfig, teacher: nn.Module, order: list[int]) -> FittedHead:
        if order:
            made = reorder_classes(teacher, order)
        else:
            teacher = teacher.to(self.accelerator.device)
            size = config.validation_batch_size or config.batch_size
            assert size is not None
            loader = create_loader(
                self.images,
                data_config=self.input_config,
                batch_size=size,
                is_training=False,
                seed=config.seed,
                workers=config.workers,
                cache_images='off',
            )
            adapter = InputAdapter(self.input_config, input_config_of(teacher)).to(self.accelerator.device)
            try:
                made = fit_head(
                    teacher, loader, len(self.class_names), balanced=config.teacher_head_balanced, prepare=adapter
                )
            except ValueError as error:
                raise ValueError(f'teacher_head=fit for {config.teacher!r}: {error}') from error
        head = fitted_head_of(made)
        assert head is not None
        return head


def _match(known: Sequence[str], names: Sequence[str]) -> tuple[str, list[int]]:
    """Compare names of classes, of which there are equally many.

    Returns:
        `'same'`, `'trust'` where one side has numbers or nothing for names, `'order'` with the place of each of `names`
        in `known`, or `'others'`.
    """
    if not known:
        return 'trust', []
    ours, theirs = _numbers(names), _numbers(known)
    if (ours is None) != (theirs is None):
        return 'trust', []
    wanted: list[Any] = list(names) if ours is None else list(ours)
    found: list[Any] = list(known) if theirs is None else list(theirs)
    if found == wanted:
        return 'same', []
    if sorted(found) == sorted(wanted) and len(set(found)) == len(found):
        return 'order', [found.index(name) for name in wanted]
    return 'others', []


def _numbers(names: Sequence[str]) -> list[int] | None:
    """Return the numbers that integer labels are called by, or `save_student` where it is given no names."""
    plain = [name.removeprefix('LABEL_') for name in names]
    if not all(name.removeprefix('-').isdecimal() for name in plain):
        return None
    return [int(name) for name in plain]


def _describe(head: FittedHead) -> str:
    if head.how == 'reordered':
        return 'its own, in the order of the data'
    return (
        f'ridge regression on {head.images:,} images, penalty {head.penalty:.2g}, temperature {head.temperature:.2g}, '
        f'{head.accuracy:.2f}% top-1 on images left out'
    )


def write_heads(folder: Path, teachers: Mapping[str, nn.Module | None]) -> None:
    """Keep the heads that teachers got in the run folder, each under the name of the first learner trained with it."""
    kept: list[FittedHead] = []
    for name, teacher in teachers.items():
        head = fitted_head_of(teacher)
        if head is not None and not any(head is other for other in kept):
            kept.append(head)
            folder.mkdir(exist_ok=True)
            path = folder / f'{name}.safetensors'
            if not path.exists():
                write_tensors(path, head.tensors, {'head': json.dumps(head.facts())})


def read_heads(folder: Path) -> dict[str, FittedHead]:
    """Read what `write_heads` wrote, by name of the learner.

    Raises:
        ValueError: If a file is damaged.
    """
    heads = {}
    for path in sorted(folder.glob('*.safetensors')):
        tensors = read_tensors(path)
        try:
            with safe_open(path, 'pt') as file:
                facts = json.loads((file.metadata() or {})['head'])
            heads[path.stem] = FittedHead.from_facts(facts, tensors)
        except (KeyError, ValueError) as error:
            raise ValueError(f'{str(path)!r} is not the head of a teacher: {error}') from error
    return heads
