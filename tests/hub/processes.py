"""Runs functions in new processes that see only the test Hub.

Nearly all that the client reads from the environment it reads at import, so that every scenario gets a process of its
own. They fork from a server process that has imported torch (which knows no Hub) and nothing of huggingface_hub.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.forked import CONTEXT

_UNSET = (
    'HF_HUB_OFFLINE',
    'TRANSFORMERS_OFFLINE',
    'HF_HUB_CACHE',
    'HF_TOKEN',
    'HUGGING_FACE_HUB_TOKEN',
    'http_proxy',
    'https_proxy',
    'all_proxy',
    'HTTP_PROXY',
    'HTTPS_PROXY',
    'ALL_PROXY',
)


@dataclass
class Outcome:
    """What a process ended in: a `value`, or the chain of `errors` (the one raised first, then its causes)."""

    value: Any
    errors: list[tuple[list[str], str]]  # class names along the MRO, message
    logs: list[str]
    stdout: str
    trace: str

    @property
    def error(self) -> str:
        """Class and message of the error."""
        return f'{self.errors[0][0][0]}: {self.errors[0][1]}' if self.errors else ''

    @property
    def causes(self) -> list[str]:
        """Class names of the error and everything behind it."""
        return [names[0] for names, _ in self.errors]

    def is_a(self, name: str) -> bool:
        return bool(self.errors) and name in self.errors[0][0]


class Pending:
    """A process under way."""

    def __init__(self, process: Any, pipe: Any, timeout: float) -> None:
        self.process, self.pipe, self.timeout = process, pipe, timeout

    def outcome(self) -> Outcome:
        if not self.pipe.poll(self.timeout):
            self.process.kill()
            raise AssertionError(f'the client was still busy after {self.timeout} s')
        try:
            outcome = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise AssertionError(f'the client died with exit code {self.process.exitcode}') from None
        self.process.join()
        return outcome


class Client:
    """A user's machine: a home for the cache and a working folder, in which processes are started.

    Args:
        endpoint: Address of the Hub.
        root: Folder for cache and working folder.
        token: The user's token, or `None`.
    """

    def __init__(self, endpoint: str, root: Path, token: str | None = 'hf_alice') -> None:
        self.endpoint, self.root, self.token = endpoint, root, token
        self.home, self.cwd = root / 'hf_home', root / 'cwd'
        for folder in (self.home, self.cwd):
            folder.mkdir(parents=True, exist_ok=True)

    def environment(self) -> dict[str, str]:
        env = {
            'HF_ENDPOINT': self.endpoint,
            'HF_HOME': str(self.home),
            'TORCH_HOME': str(self.home / 'torch'),
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1',
            'OMP_NUM_THREADS': '1',
        }
        return env | ({'HF_TOKEN': self.token} if self.token else {})

    def start(
        self,
        function: Callable[..., Any],
        *args: Any,
        env: dict[str, str] | None = None,
        without: tuple[str, ...] = (),
        timeout: float = 90,
        **kwargs: Any,
    ) -> Pending:
        """Start `function(*args, **kwargs)` with the modules `without` not importable."""
        receiver, sender = CONTEXT.Pipe(duplex=False)
        where = (function.__module__, function.__name__)
        job = (where, args, kwargs, self.environment() | (env or {}), str(self.cwd), without, sender)
        process = CONTEXT.Process(target=_run, args=job, daemon=True)
        process.start()
        sender.close()
        return Pending(process, receiver, timeout)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the function's value; it must not raise."""
        outcome = self.start(function, *args, **kwargs).outcome()
        assert not outcome.errors, outcome.trace
        return outcome.value

    def fail(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
        """Return how the function failed; it must raise."""
        outcome = self.start(function, *args, **kwargs).outcome()
        assert outcome.errors, f'no error, but {outcome.value!r}'
        return outcome


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f'{record.levelname} {record.name}: {record.getMessage()}')


def _run(
    where: tuple[str, str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    env: dict[str, str],
    cwd: str,
    without: tuple[str, ...],
    pipe: Any,
) -> None:
    for name in _UNSET:
        os.environ.pop(name, None)
    os.environ.update(env)
    os.chdir(cwd)
    for name in without:
        sys.modules[name] = None  # type: ignore[assignment]  # import then raises ImportError
    import torch

    torch.set_num_threads(1)
    records = _Records()
    logging.getLogger().addHandler(records)
    stdout = io.StringIO()
    value, errors, trace = None, [], ''
    with contextlib.redirect_stdout(stdout):
        try:
            # Imported only now, since its module may import the client, for which the environment must be set.
            function = getattr(importlib.import_module(where[0]), where[1])
            value = function(*args, **kwargs)
        except (Exception, SystemExit) as error:
            trace = traceback.format_exc()
            while error is not None and len(errors) < 10:
                errors.append(([c.__name__ for c in type(error).__mro__], str(error)))
                error = error.__cause__ or error.__context__  # type: ignore[assignment]
    pipe.send(Outcome(value, errors, records.lines, stdout.getvalue(), trace))
    pipe.close()
