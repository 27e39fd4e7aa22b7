"""Images that were not checked before training: what is wrong with them is found as the first epoch reads them."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data.datasets import DataSplits
from ..data.images import BadImageError
from ..data.inspection import report_findings
from ..utils.messages import without_traceback

__all__ = ['FirstReading', 'until_bad_image']


class FirstReading:
    """Reporter of what is unusual about images that were not checked before training.

    Args:
        data: The splits.
        accelerator: Knows the processes, each of which reads its share.
    """

    def __init__(self, data: DataSplits, accelerator: Accelerator) -> None:
        self.splits = {} if data.checked else {'train': data.train, 'val': data.val}
        self.accelerator = accelerator

    def report(self, line: Mapping[str, Any]) -> None:
        """Warn after the first epoch with a validation, in which both splits were read; together in all processes.

        Args:
            line: The epoch's line of `metrics.jsonl`.
        """
        validated = any(isinstance(each, Mapping) and 'val' in each for each in line.values())
        if not (self.splits and validated):
            return
        read = {role: split.findings.read() for role, split in self.splits.items() if split.findings is not None}
        if self.accelerator.num_processes > 1:
            parts: list[dict[str, np.ndarray]] = gather_object([read])
            read = {role: np.unique(np.concatenate([part[role] for part in parts]), axis=0) for role in read}
        if self.accelerator.is_main_process:
            report_findings(self.splits, read)
        self.splits = {}


def until_bad_image(
    batches: Any, accelerator: Accelerator, together: bool, save: Callable[[], str]
) -> Iterator[Any]:
    """Yield batches, and stop before one with an image that cannot be read.

    Args:
        batches: What yields them.
        accelerator: Knows the processes.
        together: Ask before each batch whether another process has met such an image, so that all can save.
        save: Saves what was trained, and returns how to go on.

    Raises:
        BadImageError: If there is such an image, with how to go on.
    """
    iterator = iter(batches)
    alone = accelerator.num_processes == 1
    while True:
        batch, reason = None, ''
        try:
            batch = next(iterator, None)
        except BadImageError as error:
            reason = without_traceback(str(error))
        bad = bool(reason)
        if together and not alone:
            if bad:
                accelerator.set_trigger()
            bad = accelerator.check_trigger()
        if bad:
            remedy = save() if together or alone else 'Continue with --resume from the last checkpoint.'
            raise BadImageError(f'{reason or "Another process found an image that cannot be read"}. {remedy}')
        if batch is None:
            return
        yield batch
