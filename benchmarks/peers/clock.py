"""Run a script as `python SCRIPT ...` does, and note CPU time, memory and the clock at the steps of its optimizer.

    python clock.py NOTES PEER SCRIPT ...

`NOTES` is written at every step, since a script may end without a word. Nothing heavy is imported before the script
does it, but for what a peer needs of this project (the CIFAR networks), whose cost is noted as `apart`.
"""
from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import time
from typing import Any


def _note_steps(path: str, notes: dict[str, Any]) -> None:
    """Write at each step of the optimizer that takes most of them: there may be others, such as for a trial."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

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

    register_optimizer_step_post_hook(note)


def _note_evaluations(notes: dict[str, Any]) -> None:
    """Note the CPU time of the teacher's evaluation, which comes before the first step."""
    from timm_dfpt.tasks import evaluation

    evaluate = evaluation.evaluate

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = evaluate(*args, **kwargs)
        # A trial is one step, and a job has several.
        if notes['steps'] < 2:
            notes['evaluation'] += time.process_time() - start
        return result

    evaluation.evaluate = timed


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
    if peer in ('timm', 'torchdistill'):
        notes['apart'] = _offer_networks(peer)
    else:
        _note_evaluations(notes)
    _note_steps(path, notes)
    runpy.run_path(sys.argv[0], run_name='__main__')
