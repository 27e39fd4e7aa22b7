"""Wrap every architecture of timm and check the result; print a table sorted by family.

    python -m benchmarks.coverage                  # every name that has no result yet, then the table
    python -m benchmarks.coverage 'resnet*' --redo # some of them again

Results are kept one a line in `benchmarks/coverage.jsonl`, so the sweep resumes where it stopped and several processes
can share the work (`--shard 0/2`, `--shard 1/2`). Architectures of up to 100 M parameters really run, with random but
non-trivial weights, at the smallest input they take; larger ones are checked for shapes on the `meta` device.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import gc
import io
import json
import logging
import math
import pickle
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import timm_dfpt
from timm_dfpt.teacher.prompt_path import PromptPath

_HERE = Path(__file__).parent
_MAX_REAL = 100e6
_MAX_THOROUGH = 30e6
_MAX_COPIED = 8e6
_SIDES = (32, 48, 56, 64, 84, 96, 112, 128, 160, 192, 224, 256, 320, 384, 512)
_NOISE = 1 << 20
_LARGE = 1e3


class _FastInit(TorchFunctionMode):
    """Leaves parameters unset where an initialiser would draw random numbers: `randomize` sets them all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, '__name__', '') in ('uniform_', 'normal_', 'erfinv_', 'trunc_normal_') and isinstance(
            args[0] if args else (kwargs or {}).get('tensor'), nn.Parameter
        ):
            tensor = args[0] if args else (kwargs or {})['tensor']
            with torch.no_grad():
                return tensor.zero_()
        return func(*args, **(kwargs or {}))


def randomize(model: nn.Module, x: torch.Tensor) -> None:
    """Give every weight, scale, bias and BatchNorm statistic a value that is not trivial.

    Freshly made networks hide mistakes: layer scales near 0 switch blocks off, running statistics are those of the
    identity. Where many branches add up, logits or gradients for `x` `[2, C, H, W]` would explode; the weights are then
    smaller.
    """
    x = x.clone().requires_grad_(True)
    for gain in (1.0, 0.5, 0.25, 0.125):
        _draw(model, gain)
        logits = model(x + 0)
        (grad,) = torch.autograd.grad(logits.square().mean(), x)
        if logits.abs().max() < _LARGE and grad.abs().max() < _LARGE:
            return


def _draw(model: nn.Module, gain: float) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_NOISE, generator=generator)
    with torch.no_grad():
        for param in model.parameters():
            count = param.numel()
            fan_in = max(1, count // max(1, param.shape[0])) if param.ndim > 1 else 1
            draw = noise[:count] if count <= _NOISE else noise.repeat(math.ceil(count / _NOISE))[:count]
            draw = draw.view(param.shape)
            if param.ndim > 1:
                param.copy_(draw).mul_(gain * fan_in**-0.5)
            else:
                # Around what the layer starts with, but a scale of 1e-6 becomes one that lets the block through.
                param.add_(torch.where(param.abs() < 1e-3, 0.2, 0.05) * draw)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                size = module.running_mean.shape
                module.running_mean.copy_(0.1 * torch.randn(size, generator=generator))
                assert module.running_var is not None
                module.running_var.copy_(0.5 + torch.rand(size, generator=generator))


def create(name: str, device: str, **kwargs: Any) -> nn.Module:
    """Create an architecture with classes, in evaluation; its weights are not initialised."""
    with contextlib.nullcontext() if device == 'meta' else _FastInit(), torch.device(device):
        model = timm.create_model(name, **kwargs)
        if getattr(model, 'num_classes', None) == 0 and hasattr(model, 'get_classifier'):
            model = timm.create_model(name, num_classes=10, **kwargs)
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


@contextlib.contextmanager
def _counting(modules: list[nn.Module], fired: list[int]) -> Iterator[None]:
    handles = [m.register_forward_hook(lambda *_, i=i: fired.append(i)) for i, m in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def perturb(teacher: timm_dfpt.DualForwardPathTeacher) -> None:
    """Move every trainable weight of a `'dfpt'` teacher away from its start, so that no gradient is trivially zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in teacher.prompt_path.parameters():
            fan_in = max(1, param.numel() // max(1, param.shape[0])) if param.ndim > 1 else 1
            param.add_(0.2 * fan_in**-0.5 * torch.randn(param.shape, generator=generator))


def _expect(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def check_real(model: nn.Module, x: torch.Tensor, thorough: bool = True) -> dict[str, Any]:
    """Wrap `model`, which has values, and check everything that the documentation promises.

    Args:
        model: The architecture in evaluation, frozen, with `randomize`d weights.
        x: Input `[2, C, H, W]`.
        thorough: Also check gradient checkpointing, copies, the state dict and a second input size.

    Returns:
        What goes into the table.

    Raises:
        AssertionError: A promise is broken; the message says which.
    """
    input_size = (x.shape[1], x.shape[2], x.shape[3])
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(x)
    _expect(before.isfinite().all() and before.abs().max() > 0, 'the random model gives no usable logits')
    statistics = [b.clone() for b in model.buffers()]
    # With ReLU a narrow block may be dead for two small images, and its gradient zero for no other reason.
    teacher = timm_dfpt.wrap(model, prompt=timm_dfpt.PromptConfig(act_layer='gelu'), input_size=input_size)
    row = describe(teacher)

    _expect(list(model.state_dict()) == keys, 'names in the state dict changed')
    taps = [teacher.prompt_path.model.get_submodule(stage.module) for stage in teacher.stages]
    fired: list[int] = []
    with _counting(taps, fired), torch.no_grad():
        teacher.eval()
        prompt = teacher.prompt(x)
    _expect(fired == list(range(len(taps))), f'hooks fired in the order {fired}')
    row['init_difference'] = _relative(prompt, before)
    _expect(row['init_difference'] <= 1e-5, f'prompt path starts {row["init_difference"]:.1e} off')

    perturb(teacher)
    if thorough:
        teacher.train()
        model.train()  # must not matter
        _expect(torch.equal(teacher(x).original, before), 'the original path moves in training')
        teacher.eval()
    alone = teacher.prompt(x)
    _check_gradients(teacher, alone)
    alone = alone.detach()
    # With gradients, as above: without them torch chooses other kernels in some families.
    shared = teacher(x)
    _expect(torch.equal(shared.original, before), 'the original path is not bit-identical')
    _expect(torch.equal(shared.prompt, alone), 'sharing the prefix changes the logits')
    _expect(_relative(alone, before) > 1e-6, 'the blocks do not change the logits')
    if thorough:
        row['checkpointing'] = check_checkpointing(teacher, x)
        row['second_size'] = check_second_size(teacher, input_size)
        check_state_dict(teacher, x, alone)
        check_copies(teacher, x, alone, with_weights=sum(p.numel() for p in model.parameters()) <= _MAX_COPIED)
    _expect(all(map(torch.equal, statistics, model.buffers())), 'a buffer moved')
    _expect(teacher.unwrap() is model, 'unwrap gives another model back')
    _expect(not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), 'unwrap leaves hooks')
    with torch.no_grad():
        _expect(torch.equal(model(x), before), 'unwrap does not give the model back')
    return row


def _check_gradients(teacher: timm_dfpt.DualForwardPathTeacher, logits: torch.Tensor) -> None:
    logits.square().mean().backward()
    for name, param in teacher.prompt_path.named_parameters():
        _expect(param.grad is not None, f'{name} gets no gradient')
        assert param.grad is not None
        _expect(param.grad.isfinite().all(), f'the gradient of {name} is not finite')
        _expect(param.grad.abs().max() > 0, f'the gradient of {name} is zero')
    _expect(all(p.grad is None for p in teacher.model.parameters()), 'a frozen parameter got a gradient')
    teacher.zero_grad(set_to_none=True)


def check_second_size(teacher: timm_dfpt.DualForwardPathTeacher, input_size: tuple[int, int, int]) -> str:
    """Check that sharing the prefix stays exact at another, non-square size, where the model takes one."""
    channels, height, width = input_size
    for size in ((channels, height, width + 32), (channels, height + 32, width + 32), (channels, height, 2 * width)):
        x = torch.randn(2, *size, generator=torch.Generator().manual_seed(2))
        try:
            with torch.no_grad():
                expected = teacher.model(x)
        except (AssertionError, IndexError, RuntimeError, ValueError):
            continue
        with torch.no_grad():
            out = teacher(x)
            alone = teacher.prompt(x)
        _expect(torch.equal(out.original, expected), f'the original path is not bit-identical at {size}')
        _expect(torch.equal(out.prompt, alone), f'sharing the prefix changes the logits at {size}')
        return f'{size[1]}x{size[2]}'
    return 'fixed'


def check_state_dict(teacher: timm_dfpt.DualForwardPathTeacher, x: torch.Tensor, logits: torch.Tensor) -> None:
    """Check that a prompt path loaded from another's state dict gives the same logits, also with other classes.

    Args:
        teacher: The teacher, with its weights away from their start.
        x: Input `[2, C, H, W]`.
        logits: What the prompt path returns for it `[2, K]`.
    """
    path = teacher.prompt_path
    how: Any = {'variant': path.variant, 'classifier': path.classifier}
    other = PromptPath(teacher.model, path.stages, path.config, **how).eval()
    _expect(not torch.equal(other(x), logits), 'a new prompt path is not at its start')
    other.load_state_dict(path.state_dict())
    _expect(torch.equal(other(x), logits), 'the state dict does not restore the prompt path')
    other = PromptPath(teacher.model, path.stages, path.config, num_classes=7, **how).eval()
    _expect(other(x).shape == (len(x), 7), 'another number of classes fails')


def check_copies(
    teacher: timm_dfpt.DualForwardPathTeacher, x: torch.Tensor, logits: torch.Tensor, with_weights: bool
) -> None:
    """Check that copies by deepcopy and pickle compute the same and share nothing trainable.

    Args:
        teacher: The teacher.
        x: Input `[2, C, H, W]`.
        logits: What the prompt path returns for it `[2, K]`.
        with_weights: Copy the frozen weights, too; else copies share them (for the time it takes).
    """
    frozen = {id(t): t for t in [*teacher.model.parameters(), *teacher.model.buffers()]}
    copies = {'deepcopy': copy.deepcopy(teacher, {} if with_weights else dict(frozen))}
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer)
    if not with_weights:
        pickler.persistent_id = lambda obj: id(obj) if id(obj) in frozen else None  # type: ignore[method-assign]
    pickler.dump(teacher)
    buffer.seek(0)
    unpickler = pickle.Unpickler(buffer)
    unpickler.persistent_load = lambda key: frozen[key]  # type: ignore[method-assign]
    copies['pickle'] = unpickler.load()
    for kind, other in copies.items():
        _expect(torch.equal(other(x).prompt, logits), f'{kind} computes something else')
        with torch.no_grad():
            for param in other.prompt_path.parameters():
                param.zero_()
        _expect(torch.equal(teacher.prompt(x), logits), f'{kind} shares weights with what it was copied from')
        other.unwrap()
        _expect(teacher.shares_prefix == bool(teacher.prefix), f'unwrapping the {kind} changes the teacher')


def check_checkpointing(teacher: timm_dfpt.DualForwardPathTeacher, x: torch.Tensor) -> str:
    """Check that gradient checkpointing gives the same gradients, or is refused."""
    params = [p for p in teacher.prompt_path.parameters() if p.requires_grad]
    try:
        teacher.set_grad_checkpointing(True)
    except ValueError:
        return 'refused'
    teacher.set_grad_checkpointing(False)
    expected = torch.autograd.grad(teacher(x).prompt.square().mean(), params)
    teacher.set_grad_checkpointing(True)
    logits = teacher(x).prompt
    grads = torch.autograd.grad(logits.square().mean(), params)
    teacher.set_grad_checkpointing(False)
    _expect(all(map(torch.equal, grads, expected)), 'gradient checkpointing changes the gradients')
    return 'same'


def check_meta(model: nn.Module) -> dict[str, Any]:
    """Wrap `model` on the meta device; `wrap` itself checks hooks, shapes, layouts and what the gradient reaches."""
    cfg: Any = model.pretrained_cfg
    input_size = cfg['input_size']
    teacher = timm_dfpt.wrap(model, num_classes=7, input_size=input_size)
    with torch.no_grad():
        out = teacher(torch.empty(2, *input_size, device='meta'))
    _expect(out.prompt.shape == (2, 7), 'another number of classes fails')
    _expect(out.original.shape[1] == model.num_classes, 'the original path lost its classes')
    return describe(teacher) | {'input': list(input_size)}


def describe(teacher: timm_dfpt.DualForwardPathTeacher) -> dict[str, Any]:
    """Return what the table says of a teacher."""
    features = [feature for stage in teacher.stages for feature in stage.features]
    trained = sum(p.numel() for group in teacher.parameter_groups() for p in group['params'])
    return {
        'stages': [stage.module for stage in teacher.stages],
        'channels': [feature.channels for feature in features],
        'layout': '/'.join(sorted({feature.layout for feature in features})),
        'prefix_tokens': max(feature.prefix_tokens for feature in features),
        'share': trained / sum(p.numel() for p in teacher.model.parameters()),
        'shares_prefix': teacher.shares_prefix,
        'bypassed': list(teacher.bypassed),
    }


def check(name: str) -> dict[str, Any]:
    """Check one architecture and return its row."""
    start = time.perf_counter()
    row: dict[str, Any] = {'name': name, 'family': family(name)}
    try:
        model = create(name, 'meta')
        params = sum(p.numel() for p in model.parameters())
        row |= {'class': type(model).__name__, 'params': params}
        if not hasattr(model, 'get_classifier'):
            row['status'] = 'encoder'
            try:
                timm_dfpt.wrap(model)
            except ValueError as error:
                row |= {'status': 'refused', 'reason': str(error)}
        else:
            if params > _MAX_REAL:
                row |= check_meta(model) | {'status': 'shapes'}
            else:
                model, x = build(name, model)
                row['input'] = list(x.shape[1:])
                row |= check_real(model, x, thorough=params <= _MAX_THOROUGH) | {'status': 'run'}
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
        f'refused (encoders without a classifier), {counts["failed"]} failed.',
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
        'with values, `shapes` on the meta device, `refused` in words. Notes: `no shared prefix`; `bypassed`: later '
        'layers also see features from before that stage; `off by`: relative difference of the logits at the start '
        '(another kernel for another memory layout), 0 where not named; `no checkpointing`: timm refuses it.',
        '',
        '| architecture | family | blocks after | channels | layout | prompt path | status | notes |',
        '|---|---|---|---|---|---:|---|---|',
    ]
    for row in sorted(rows, key=lambda r: (r['family'], r['name'])):
        if 'stages' not in row:
            lines.append(f'| {row["name"]} | {row["family"]} | | | | | {row["status"]} | {row["reason"]} |')
            continue
        notes = []
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
