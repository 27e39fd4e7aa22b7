"""The command `timm-dfpt`, and what the scripts in `train/` and `python -m timm_dfpt` call.

It stands outside of the package, of which any import takes seconds (torch, timm): help need not wait for them, and a
signal that arrives meanwhile ends the process in one line.
"""
from __future__ import annotations

import difflib
import gc
import importlib
import importlib.util
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

__all__ = ['COMMANDS', 'Command', 'main', 'script', 'start']


class Command(NamedTuple):
    """A command.

    Args:
        module: The module whose `main` does it.
        about: What it does, for the list of commands.
        remedy: How to go on after a signal that arrives when there is nothing to save.
    """

    module: str
    about: str
    remedy: str = 'give the same command again'


COMMANDS = {
    'distill': Command(
        'timm_dfpt.training.run', 'train a student with a dual-forward path teacher, or by another method',
        'the same command with --resume goes on',
    ),
    'compare': Command('timm_dfpt.training.compare', 'train several methods over several seeds on the same batches'),
    'evaluate': Command(
        'timm_dfpt.commands.evaluate', 'measure a model on labelled images: accuracy by class, calibration'
    ),
    'predict': Command('timm_dfpt.commands.predict', 'write the most likely classes of images to a CSV file'),
    'export': Command('timm_dfpt.commands.export', 'write a student as ONNX files or as a program of torch'),
    'report': Command('timm_dfpt.training.pages', 'write the page about a finished run or comparison'),
    'publish': Command('timm_dfpt.training.publish', 'push a finished run to the Hugging Face Hub'),
}  # fmt: skip
PROGRAM = 'timm-dfpt'


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Do what a command line asks for, and end the process.

    Args:
        argv: Arguments; `None` for those of the process.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
    if name in COMMANDS:
        start(name, rest, f'{PROGRAM} {name}')
    if name in ('-h', '--help', '--version'):
        _print(_version() if name == '--version' else _usage())
        sys.exit(0)
    close = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    print(f'error: {name[:80]!r} is not a command.{hint} See {PROGRAM} --help.', file=sys.stderr)
    sys.exit(2)


def script(file: str) -> NoReturn:
    """Do the command that a script in `train/` is named after, and end the process.

    Args:
        file: The script.
    """
    name = Path(file).stem
    start(name, sys.argv[1:], f'train/{name}.py')


def start(name: str, argv: Sequence[str], program: str) -> NoReturn:
    """Do a command, and end the process with its exit code.

    Args:
        name: One of `COMMANDS`.
        argv: Its arguments.
        program: What the command was called as, for its help and for the record of a run.
    """
    command = COMMANDS[name]

    def stop(signum: int, frame: object) -> None:
        try:
            os.write(2, f'Stopped by {signal.Signals(signum).name}: {command.remedy}.\n'.encode())
        finally:
            os._exit(128 + signum)

    # Imports take seconds; the job has handlers of its own.
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)

    # Imports leave next to no garbage, and looking for it takes a quarter of their time; what they made stays.
    gc.disable()
    module = importlib.import_module(command.module)
    gc.freeze()
    gc.enable()
    importlib.import_module('timm_dfpt.job.stopping').leave(module.main(argv, program=program))
    raise AssertionError('leave() does not return')


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError:
        # The reader of a pipe has gone; at its end Python would try again with what is left in the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f'  {name:{width}}  {command.about}' for name, command in COMMANDS.items()]
    return '\n'.join([
        f'usage: {PROGRAM} COMMAND [options]', '',
        'Knowledge distillation with a dual-forward path teacher for any timm backbone.', '',
        'commands:', *lines, '',
        f'{PROGRAM} COMMAND --help lists the options of a command.',
        f'{_version()}; {PROGRAM} --version prints this alone.',
    ])  # fmt: skip


def _version() -> str:
    # Found, and not imported.
    spec = importlib.util.find_spec('timm_dfpt')
    assert spec is not None
    assert spec.origin is not None
    version = runpy.run_path(str(Path(spec.origin).with_name('version.py')))['__version__']
    return f'{PROGRAM} {version}'


if __name__ == '__main__':
    main()
