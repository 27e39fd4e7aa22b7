"""Wrap every architecture of timm and check the result; print a table sorted by family.

    python -m benchmarks.coverage                  # every name that has no result yet, then the table
    python -m benchmarks.coverage 'resnet*' --redo # some of them again

Results are kept one per line in `benchmarks/coverage.jsonl`, so the sweep resumes where it stopped and processes can
share the work (`--shard 0/2`, `--shard 1/2`). Architectures of up to 100 M parameters really run, with random but
non-trivial weights, at the smallest input they take; larger ones are checked for shapes on the `meta` device.
"""
from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import json
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import timm_dfpt
from timm_dfpt.testing import check_teacher, describe, randomize

_HERE = Path(__file__).parent
_MAX_REAL = 100e6
_MAX_THOROUGH = 30e6
_SIDES = (32, 48, 56, 64, 84, 96, 112, 128, 160, 192, 224, 256, 320, 384, 512)


class _FastInit(TorchFunctionMode):
    """Mode that leaves parameters unset where an initialiser would draw random numbers: `randomize` sets them all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, '__name__', '') in ('uniform_', 'normal_', 'erfinv_', 'trunc_normal_') and isinstance(
            args[0] if args else (kwargs or {}).get('tensor'), nn.Parameter
        ):
            tensor = args[0] if args else (kwargs or {})['tensor']
            with torch.no_grad():
                return tensor.zero_()
        return func(*args, **(kwargs or {}))


def create(name: str, device: str, **kwargs: Any) -> nn.Module:
    """Create an architecture, in evaluation; its weights are not initialised."""
    with contextlib.nullcontext() if device == 'meta' else _FastInit(), torch.device(device):
        model = timm.create_model(name, **kwargs)
    return model.eval().requires_grad_(False)


def build(name: str, meta: nn.Module, **kwargs: Any) -> tuple[nn.Module, torch.Tensor]:
    """Build an architecture with `randomize`d weights for the smallest square input that it takes.

    Args:
        name: Name of the architecture.
        meta: The architecture at its default size, on the meta device.
        **kwargs: More arguments for `timm.create_model`.

    Returns:
        The model and an input `[2, C, H, W]`.
    """
    cfg: Any = meta.pretrained_cfg
    channels, *default = cfg['input_size']
    model: nn.Module | None = None
    for height, width in [*((s, s) for s in _SIDES if _smallest_side(meta) <= s < default[0]), default]:
        x = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(3))
        resized = bool(cfg.get('fixed_input_size')) and (height, width) != tuple(default)
        try:
            if resized or model is None:
                model = create(name, 'cpu', **({'img_size': height} if resized else {}), **kwargs)
            randomize(model, x)
            return model, x
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError):
            if (height, width) == tuple(default):
                raise
            if resized:
                model = None
    raise AssertionError('not reached')


def _smallest_side(model: Any) -> int:
    # The deepest stage with a block shall have 2 x 2 pixels at least: one says nothing about their order.
    info = getattr(model, 'feature_info', None)
    reductions = [entry['reduction'] for entry in getattr(info, 'info', info) or []]
    return 2 * reductions[-2] if len(reductions) > 1 else 64


def check_meta(model: nn.Module) -> dict[str, Any]:
    """Wrap `model` on the meta device; `wrap` itself checks hooks, shapes, layouts and what the gradient reaches."""
    cfg: Any = model.pretrained_cfg
    input_size = cfg['input_size']
    teacher = timm_dfpt.wrap(model, num_classes=7, input_size=input_size)
    with torch.no_grad():
        out = teacher(torch.empty(2, *input_size, device='meta'))
    assert out.prompt.shape == (2, 7), 'another number of classes fails'
    classes: Any = model.num_classes
    if classes:
        assert out.original.shape[1] == classes, 'the original path lost its classes'
    else:
        assert out.original.shape == model(torch.empty(2, *input_size, device='meta')).shape, 'an encoder is another'
    return describe(teacher) | {'input': list(input_size)}


def check(name: str) -> dict[str, Any]:
    """Check one architecture and return its row."""
    start = time.perf_counter()
    row: dict[str, Any] = {'name': name, 'family': family(name)}
    try:
        model = create(name, 'meta')
        params = sum(p.numel() for p in model.parameters())
        row |= {'class': type(model).__name__, 'params': params}
        if params > _MAX_REAL:
            row |= check_meta(model) | {'status': 'shapes'}
        else:
            model, x = build(name, model)
            row['input'] = list(x.shape[1:])
            row |= check_teacher(model, x, thorough=params <= _MAX_THOROUGH) | {'status': 'run'}
    except Exception as error:  # the sweep goes on, and the table says what failed
        logging.debug('%s', name, exc_info=True)
        row |= {'status': 'failed', 'reason': f'{type(error).__name__}: {error}'}
    row['seconds'] = round(time.perf_counter() - start, 2)
    return row


def family(name: str) -> str:
    """Return the module of timm that defines an architecture."""
    return timm.models.model_entrypoint(name).__module__.rsplit('.', 1)[-1]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown, sorted by family."""
    counts = {status: sum(r['status'] == status for r in rows) for status in ('run', 'shapes', 'refused', 'failed')}
    for row in rows:
        row['family'] = family(row['name'])
    families = len({row['family'] for row in rows})
    seconds = sum(r['seconds'] for r in rows)
    same = sum(r.get('checkpointing') == 'same' for r in rows)
    shared = sum(r['status'] == 'run' and r['shares_prefix'] for r in rows)
    sizes = [r['second_size'] for r in rows if r.get('second_size')]
    lines = [
        '# Coverage: every architecture of timm',
        '',
        f'timm {timm.__version__}, torch {torch.__version__.split("+")[0]}, CPU. '
        'Made by `python -m benchmarks.coverage`.',
        '',
        f'- {len(rows)} names in {families} families: {counts["run"] + counts["shapes"]} wrapped, {counts["refused"]} '
        f'refused, {counts["failed"]} failed. {sum("head" in r for r in rows)} are encoders by default '
        '(`num_classes=0`), wrapped as such with `num_classes=5` or `7`.',
        f'- {counts["run"]} really ran, with values (up to {_MAX_REAL / 1e6:.0f} M parameters, smallest input); '
        f'{counts["shapes"]} were checked for shapes and gradient reachability on the meta device.',
        f'- {shared} of those that ran share the computation before the first block between the paths, bit for bit; '
        f'{sum(size != "fixed" for size in sizes)} of {len(sizes)} tried also at a second, non-square or larger size '
        '(the others take one size only).',
        f'- Of those that ran, gradient checkpointing gives bit-equal gradients in {same} and is refused by timm in '
        f'{sum(r.get("checkpointing") == "refused" for r in rows)}.',
        f'- {seconds / 60:.0f} minutes in all, added up over single-threaded processes on a machine shared with other '
        'work.',
        '',
        'Prompt path: trainable parameters (default `PromptConfig`) as a share of the teacher. Status: `run` '
        'with values, `shapes` on the meta device, `refused` in words. Notes: `encoder`: has no classifier, and which '
        'module its prompt path gets (`encoder_head`: behind the mean of its tokens or map); `no shared prefix`; '
        '`bypassed`: later layers also see features from before that stage; `off by`: relative difference of the '
        'logits (of an encoder, its features) at the start (another kernel for another memory layout), 0 where not '
        'named; `no checkpointing`: timm refuses it.',
        '',
        '| architecture | family | blocks after | channels | layout | prompt path | status | notes |',
        '|---|---|---|---|---|---:|---|---|',
    ]
    for row in sorted(rows, key=lambda r: (r['family'], r['name'])):
        if 'stages' not in row:
            lines.append(f'| {row["name"]} | {row["family"]} | | | | | {row["status"]} | {row["reason"]} |')
            continue
        notes = [f'encoder, new head: {", ".join(row["head"])}'] if 'head' in row else []
        if not row['shares_prefix']:
            notes.append('no shared prefix')
        if row['bypassed']:
            notes.append(f'bypassed: {", ".join(row["bypassed"])}')
        if row.get('init_difference'):
            notes.append(f'off by {row["init_difference"]:.0e}')
        if row.get('checkpointing') == 'refused':
            notes.append('no checkpointing')
        prefix = f' +{row["prefix_tokens"]}' if row['prefix_tokens'] else ''
        lines.append(
            f'| {row["name"]} | {row["family"]} | {", ".join(row["stages"])} | '
            f'{", ".join(str(c) for c in row["channels"])} | {row["layout"]}{prefix} | {100 * row["share"]:.1f}% | '
            f'{row["status"]} | {"; ".join(notes)} |'
        )
    return '\n'.join(lines) + '\n'


def architectures() -> list[str]:
    """Return the names of all architectures of timm itself, without those that timm_dfpt adds."""
    return [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith('timm.')]


def _load(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    return {row['name']: row for row in map(json.loads, path.read_text().splitlines())}


def main() -> None:
    """Run the sweep from the command line."""
    parser = argparse.ArgumentParser(description='Wrap every architecture of timm and check the result.')
    parser.add_argument('names', nargs='*', default=['*'], help='patterns of architecture names (default: all)')
    parser.add_argument('--redo', action='store_true', help='also those that have a result already')
    parser.add_argument('--retry', action='store_true', help='also those that failed')
    parser.add_argument('--shard', default='0/1', metavar='I/N', help='do every N-th name from the I-th on')
    parser.add_argument('--max-seconds', type=float, default=math.inf, help='stop after this time; resume later')
    parser.add_argument('--results', type=Path, default=_HERE / 'coverage.jsonl', help='where results are kept')
    parser.add_argument('--table', type=Path, default=_HERE / 'coverage.md', help='where the table goes')
    parser.add_argument('--verbose', action='store_true', help='show the traceback of a failure')
    args = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.ERROR)
    warnings.filterwarnings('ignore')
    shard, shards = (int(part) for part in args.shard.split('/'))
    names = [n for n in architectures() if any(fnmatch.fnmatch(n, pattern) for pattern in args.names)]
    start = time.perf_counter()
    for name in names[shard::shards]:
        if time.perf_counter() - start > args.max_seconds:
            break
        done = _load(args.results).get(name)
        if done and not args.redo and not (args.retry and done['status'] == 'failed'):
            continue
        row = check(name)
        gc.collect()
        with args.results.open('a') as file:
            file.write(json.dumps(row) + '\n')
        print(f'{row["seconds"]:6.1f} s  {row["status"]:8} {name}  {row.get("reason", "")}', flush=True)
    rows = list(_load(args.results).values())
    args.table.write_text(table(rows))
    print(table(rows).split('\n| arch')[0])


if __name__ == '__main__':
    main()
