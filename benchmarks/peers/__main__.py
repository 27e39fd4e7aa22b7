"""The same distillation job in this project's trainer, in timm's and in torchdistill's: time and memory of processes.

Their scripts are not in their packages. These commands get those of the installed versions:

    python -c "import timm, urllib.request as u; u.urlretrieve('https://raw.githubusercontent.com/huggingface/\
pytorch-image-models/v' + timm.__version__ + '/train.py', 'timm_train.py')"
    pip install torchdistill; python -c "import urllib.request as u; u.urlretrieve('https://raw.githubusercontent.com/\
yoshitomo-matsubara/torchdistill/main/examples/torchvision/image_classification.py', 'torchdistill_train.py')"

    python -m benchmarks.peers --timm-train timm_train.py --torchdistill-train torchdistill_train.py --rounds 9
    python -m benchmarks.peers --timm-train timm_train.py --before ../an/earlier/checkout

Each run is a process of its own with one thread, in turns (A B C, C B A, ...), after one that is not counted: it caches
byte code. The tables and what they are made of are written to `--out`, benchmarks/results/peers-JOB by default. Linux.
"""
from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .jobs import JOBS, arguments
from .table import table

_ROOT = Path(__file__).parents[2]
_PACKAGES = ('torch', 'timm', 'torchdistill')


def run(peer: str, job: str, folder: Path, script: Path, tree: Path) -> dict[str, Any]:
    """Run the job in one trainer, and return what `benchmarks.peers.table.figures` reads."""
    clock = Path(__file__).with_name('clock.py')
    places = [str(tree), *map(os.path.abspath, filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep)))]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(places)}
    environment.pop('PYTHONDONTWRITEBYTECODE', None)
    with tempfile.TemporaryDirectory(dir=folder) as place, open(folder / 'log', 'w+', encoding='utf-8') as log:
        notes = Path(place) / 'notes.json'
        argv = [sys.executable, str(clock), str(notes), peer, str(script)]
        argv += arguments(peer, JOBS[job], folder, Path(place) / 'output')
        began = time.time()
        process = subprocess.Popen(argv, cwd=place, env=environment, stdout=log, stderr=log)
        # Of this process and those that it waited for, to its very end.
        _, status, usage = os.wait4(process.pid, 0)
        wall, process.returncode = time.time() - began, os.waitstatus_to_exitcode(status)
        if process.returncode or not notes.exists():
            log.seek(0)
            raise SystemExit(f'{log.read()[-3000:]}\n{peer} ended with {process.returncode}: {" ".join(argv)}')
        noted: dict[str, Any] = json.loads(notes.read_text(encoding='utf-8'))
    cpu = usage.ru_utime + usage.ru_stime
    return {'cpu': cpu, 'mib': usage.ru_maxrss / 1024, 'wall': wall, 'began': began, **noted}


def _participants(args: argparse.Namespace) -> dict[str, tuple[str, Path, Path]]:
    """Return peer, script and tree by name; name those that are left out."""
    found = {'this project': ('ours', _ROOT / 'train/distill.py', _ROOT)}
    if args.before:
        found['before'] = ('ours', args.before.resolve() / 'train/distill.py', args.before.resolve())
    for peer, script in (('timm', args.timm_train), ('torchdistill', args.torchdistill_train)):
        if script is None:
            print(f'{peer} is left out: its script is given by --{peer}-train')
        elif importlib.util.find_spec(peer) is None:
            print(f'{peer} is left out: it is not installed (pip install {peer})')
        else:
            found[peer] = (peer, script.resolve(), _ROOT)
    return found


def _report(about: dict[str, Any], rounds: list[dict[str, Any]]) -> str:
    job, versions = JOBS[about['job']], ', '.join(f'{name} {number}' for name, number in about['versions'].items())
    return (
        f'# One job in several trainers ({about["job"]})\n\nMade by `python -m benchmarks.peers`: {job.teacher} -> '
        f'{job.student}, {job.images} JPEGs of {job.size} px, batch {job.batch}, one epoch, one validation, no '
        f'workers, 1 thread; {versions}, {about["machine"]} CPU. {len(rounds)} rounds in turns: median (quartiles), '
        f'ratios within a round. Load of the machine: {about["load"]}.\n\n' + table(rounds, 'timm')
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--timm-train', type=Path, help="timm's train.py")
    parser.add_argument('--torchdistill-train', type=Path, help="torchdistill's image_classification.py")
    parser.add_argument('--before', type=Path, help='another checkout of this project, to run as well')
    parser.add_argument('--job', choices=list(JOBS), default='32px')
    parser.add_argument('--rounds', type=int, default=9, help='how often each runs, beyond the first')
    parser.add_argument('--more', action='store_true', help='add rounds to those that were written before')
    parser.add_argument('--out', type=Path, help='where to write, without a suffix')
    args = parser.parse_args()
    for path in (args.timm_train, args.torchdistill_train, args.before and args.before / 'train/distill.py'):
        if path is not None and not path.is_file():
            parser.error(f'there is no file {path}')
    if args.rounds < 1:
        parser.error(f'--rounds must be at least 1, got {args.rounds}')
    participants = _participants(args)
    out = args.out or _ROOT / f'benchmarks/results/peers-{args.job}'
    about: dict[str, Any] = {
        'job': args.job, 'who': list(participants), 'machine': platform.machine(),
        'versions': {name: importlib.metadata.version(name) for name in _PACKAGES if importlib.util.find_spec(name)},
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    rounds: list[dict[str, Any]] = []
    if args.more and out.with_suffix('.json').exists():
        kept = json.loads(out.with_suffix('.json').read_text(encoding='utf-8'))
        rounds = kept['rounds']
        del kept['about']['load']
        if kept['about'] != about:
            parser.error(f'{out.with_suffix(".json")} is of {kept["about"]}, this is {about}')
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # In a process of its own: a child's peak of memory is at least what its parent held when it began.
        writer = [sys.executable, '-m', 'benchmarks.peers.jobs', args.job, place]
        subprocess.run(writer, check=True, cwd=_ROOT, env={**os.environ, 'PYTHONPATH': str(_ROOT)})
        for who, (peer, script, tree) in participants.items() if not rounds else ():
            print(f'{who}: once, not counted', flush=True)
            run(peer, args.job, folder, script, tree)
        for _ in range(args.rounds):
            order = list(participants)[:: -1 if len(rounds) % 2 else 1]
            done = {who: run(participants[who][0], args.job, folder, *participants[who][1:]) for who in order}
            rounds.append({who: done[who] for who in participants})
            about['load'] = ' '.join(f'{value:.1f}' for value in os.getloadavg())
            out.with_suffix('.json').write_text(json.dumps({'about': about, 'rounds': rounds}, indent=1) + '\n')
            out.with_suffix('.md').write_text(_report(about, rounds), encoding='utf-8')
            print(table(rounds, 'timm'), flush=True)


if __name__ == '__main__':
    main()
