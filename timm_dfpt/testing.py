"""Check that a model can be a teacher, with everything that the documentation promises; like `torch.testing`."""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .backbone.heads import pool_features, watch_inputs
from .teacher.blocks import PromptConfig
from .teacher.checks import find_classifier
from .teacher.prompt_path import PromptPath
from .teacher.teacher import DualForwardPathTeacher
from .teacher.wrapping import wrap

__all__ = ['check_teacher', 'describe', 'randomize']

# Of parameters: copies of larger models share the frozen ones, for the time it takes.
_MAX_COPIED = 8e6
_NOISE = 1 << 20
# Logits and gradients beyond it would explode.
_LARGE = 1e3
# Of the head that an encoder gets.
_CLASSES = 5


def check_teacher(
    model: nn.Module, x: torch.Tensor | None = None, thorough: bool = True, prompt: PromptConfig | None = None
) -> dict[str, Any]:
    """Wrap a model and check, by running it, what `wrap` promises of a teacher.

        timm_dfpt.testing.check_teacher(my_model)

    The prompt path starts at the model's logits, or, of an encoder, with logits of zero for what the encoder returns;
    the original path stays the model to the last bit, also while both share their first layers, with gradients and in
    training; every weight of the prompt path gets a gradient and no frozen one does; `unwrap` gives the model back.
    The model is frozen, put into evaluation, and else left as it was.

    Args:
        model: A timm classifier or encoder on the CPU, with weights that are not trivial: see `randomize`.
        x: Images `[2, C, H, W]`; of the size in `pretrained_cfg` if None.
        thorough: Also check gradient checkpointing, copies, the state dict and a second input size.
        prompt: Shape of prompt blocks, fusion and head; by default that of `wrap` with another activation.

    Returns:
        What `describe` returns; relative difference of the prompt path's first logits (`init_difference`); and, if
        thorough, `'same'` or `'refused'` for `checkpointing` and the `second_size`, `'fixed'` if there is none.

    Raises:
        AssertionError: If a promise is broken; the message says which.
        ValueError: If `wrap` refuses the model.
    """
    if x is None:
        cfg: Any = model.pretrained_cfg
        x = torch.randn(2, *cfg['input_size'], generator=torch.Generator().manual_seed(3))
    model.eval().requires_grad_(False)
    input_size = (x.shape[1], x.shape[2], x.shape[3])
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(x)
    _expect(before.isfinite().all() and before.abs().max() > 0, 'the model gives no usable logits')
    statistics = [b.clone() for b in model.buffers()]
    # With ReLU a narrow block may be dead for two small images, and its gradient zero for no other reason.
    encoder = not find_classifier(model, None, _CLASSES, input_size)
    teacher = wrap(
        model,
        num_classes=_CLASSES if encoder else None,
        prompt=PromptConfig(act_layer='gelu') if prompt is None else prompt,
        input_size=input_size,
    )
    row = describe(teacher)

    _expect(list(model.state_dict()) == keys, 'names in the state dict changed')
    taps = [teacher.prompt_path.model.get_submodule(stage.module) for stage in teacher.stages]
    fired: list[int] = []
    head = teacher.prompt_path.model.get_submodule(teacher.prompt_path.heads[0])
    with _counting(taps, fired), watch_inputs(head) as features, torch.no_grad():
        teacher.eval()
        start = teacher.prompt(x)
    _expect(fired == list(range(len(taps))), f'hooks fired in the order {fired}')
    if encoder:
        _expect(not start.any(), 'the logits of a new head are not zero')
        row['init_difference'] = _relative(features[-1].flatten(1), pool_features(model, before))
    else:
        row['init_difference'] = _relative(start, before)
    _expect(row['init_difference'] <= 1e-5, f'prompt path starts {row["init_difference"]:.1e} off')

    _perturb(teacher)
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
    if not encoder:
        _expect(_relative(alone, before) > 1e-6, 'the blocks do not change the logits')
    if thorough:
        row['checkpointing'] = _check_checkpointing(teacher, x)
        row['second_size'] = _check_second_size(teacher, input_size)
        _check_state_dict(teacher, x, alone)
        _check_copies(teacher, x, alone, with_weights=sum(p.numel() for p in model.parameters()) <= _MAX_COPIED)
    _expect(all(map(torch.equal, statistics, model.buffers())), 'a buffer moved')
    _expect(teacher.unwrap() is model, 'unwrap gives another model back')
    _expect(not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), 'unwrap leaves hooks')
    with torch.no_grad():
        _expect(torch.equal(model(x), before), 'unwrap does not give the model back')
    return row


def describe(teacher: DualForwardPathTeacher) -> dict[str, Any]:
    """Return where the blocks of a teacher stand, and their size as a `share` of the teacher's parameters.

    Of an encoder also where its `head` is.
    """
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
        **({} if teacher.num_classes else {'head': list(teacher.prompt_path.classifier)}),
    }


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


@contextlib.contextmanager
def _counting(modules: list[nn.Module], fired: list[int]) -> Iterator[None]:
    handles = [m.register_forward_hook(lambda *_, i=i: fired.append(i)) for i, m in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _perturb(teacher: DualForwardPathTeacher) -> None:
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


def _check_gradients(teacher: DualForwardPathTeacher, logits: torch.Tensor) -> None:
    logits.square().mean().backward()
    for name, param in teacher.prompt_path.named_parameters():
        _expect(param.grad is not None, f'{name} gets no gradient')
        assert param.grad is not None
        _expect(param.grad.isfinite().all(), f'the gradient of {name} is not finite')
        _expect(param.grad.abs().max() > 0, f'the gradient of {name} is zero')
    _expect(all(p.grad is None for p in teacher.model.parameters()), 'a frozen parameter got a gradient')
    teacher.zero_grad(set_to_none=True)


def _check_second_size(teacher: DualForwardPathTeacher, input_size: tuple[int, int, int]) -> str:
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


def _check_state_dict(teacher: DualForwardPathTeacher, x: torch.Tensor, logits: torch.Tensor) -> None:
    """Check that a prompt path loaded from another's state dict gives the same logits, also with other classes.

    Args:
        teacher: The teacher, with its weights away from their start.
        x: Input `[2, C, H, W]`.
        logits: What the prompt path returns for it `[2, K]`.
    """
    path = teacher.prompt_path
    encoder = not teacher.num_classes
    how: Any = {'variant': path.variant, 'classifier': () if encoder else path.classifier, 'x': x}
    classes = path.num_classes if encoder else None
    other = PromptPath(teacher.model, path.stages, path.config, num_classes=classes, **how).eval()
    _expect(not torch.equal(other(x), logits), 'a new prompt path is not at its start')
    other.load_state_dict(path.state_dict())
    _expect(torch.equal(other(x), logits), 'the state dict does not restore the prompt path')
    config = dataclasses.replace(path.config, head_rank=None)
    other = PromptPath(teacher.model, path.stages, config, num_classes=7, **how).eval()
    _expect(other(x).shape == (len(x), 7), 'another number of classes fails')


def _check_copies(
    teacher: DualForwardPathTeacher, x: torch.Tensor, logits: torch.Tensor, with_weights: bool
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


def _check_checkpointing(teacher: DualForwardPathTeacher, x: torch.Tensor) -> str:
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
