"""Run a script as `python SCRIPT ...` does, and note CPU time, memory and the clock at the steps of its optimizer.

    python clock.py NOTES PEER SCRIPT ...

`NOTES` is written at every step, since a script may end without a word. Nothing heavy is imported before the script
does it, except what a peer needs of this project (the CIFAR networks), whose cost is noted as `apart`.
"""
from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import resource
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class _After(importlib.abc.MetaPathFinder):
    """Import hook that changes a module when the script has imported it, whenever that is."""

    def __init__(self, module: str, act: Callable[[ModuleType], None]) -> None:
        self.module, self.act = module, act
        sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.act(module)

        loader.exec_module = exec_module
        return spec


def _note_steps(path: str, notes: dict[str, Any]) -> None:
    """Write at each step of the optimizer that takes most of them: there may be others, such as for a trial."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    # Optimizers are kept, so that none gets the number of one that is gone.
    seen: dict[int, dict[str, Any]] = {}

    def note(optimizer: object, args: object, kwargs: object) -> None:
        now = {
            'cpu': time.process_time(), 'clock': time.time(),
            'mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }  # fmt: skip
        own = seen.setdefault(id(optimizer), {'optimizer': optimizer, 'first': now, 'steps': 0})
        own['steps'] += 1
        if own['steps'] > notes['steps']:
            notes.update(first=own['first'], last=now, steps=own['steps'])
            os.pwrite(file, json.dumps(notes).encode().ljust(1024), 0)

    _After('torch.optim.optimizer', lambda module: module.register_optimizer_step_post_hook(note))


def _note_evaluations(notes: dict[str, Any]) -> None:
    """Note the CPU time of the teacher's evaluation, which comes before the first step."""
    def replace(module: Any) -> None:
        evaluate = module.evaluate

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = evaluate(*args, **kwargs)
            # A trial is one step, and a job has several.
            if notes['steps'] < 2:
                notes['evaluation'] += time.process_time() - start
            return result

        module.evaluate = timed

    _After('timm_dfpt.tasks.evaluation', replace)


def _offer_networks(peer: str) -> float:
    """Make this project's networks known to timm, and timm's to torchdistill; return the CPU time of the former."""
    import timm

    start = time.process_time()
    import timm_dfpt.models  # noqa: F401

    spent = time.process_time() - start
    if peer == 'torchdistill':
        from torchdistill.models.registry import register_model

        register_model(key='timm')(timm.create_model)
    return spent


if __name__ == '__main__':
    path, peer, *sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    notes: dict[str, Any] = {'apart': 0.0, 'evaluation': 0.0, 'steps': 0}
    _note_steps(path, notes)
    if peer in ('timm', 'torchdistill'):
        notes['apart'] = _offer_networks(peer)
    else:
        _note_evaluations(notes)
    runpy.run_path(sys.argv[0], run_name='__main__')
