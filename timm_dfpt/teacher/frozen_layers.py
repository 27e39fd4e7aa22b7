"""Frozen convolution and BatchNorm layers that save no inputs for the backward pass.

torch saves the input of every convolution and every BatchNorm for the gradient of their weights. A frozen layer has no
such gradient, and that of its input depends on the weights alone. In a network such as ResNet this is more than half
of what the prompt path would save.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

__all__ = ['autocasts', 'save_fewer_activations']

_Ints = tuple[int, ...]


def autocasts(device: str) -> bool:
    """Say whether autocast is on for a type of device; for the meta device, which has none, torch would raise."""
    return device != 'meta' and torch.is_autocast_enabled(device)


def save_fewer_activations(model: nn.Module) -> None:
    """Do not save inputs of frozen convolution and BatchNorm layers for the backward pass.

    Results and gradients stay the same to the last bit. Layers whose weights are trained are not affected.
    """
    for module in model.modules():
        # A forward of its own means that other code has replaced it already.
        if isinstance(module, (nn.Conv2d, _BatchNorm)) and 'forward' not in vars(module):
            module.forward = _FrozenForward(module)  # type: ignore[method-assign]


class _FrozenForward:
    """The `forward` of a frozen layer: its class's own, with the functions in it exchanged.

    A class, not a closure, so that deepcopy and pickle take the module along.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.module).forward
        # A compiler sees both passes and itself decides what to keep.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return forward(self.module, *args, **kwargs)
        with _Exchange():
            return forward(self.module, *args, **kwargs)


class _Exchange(TorchFunctionMode):
    """Mode that replaces `conv2d` and `batch_norm` where their weights are frozen.

    On functions and not on layers, since layers of timm differ in what else they do: padding, standardisation,
    activation.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            return _conv2d(*args, **kwargs)
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | _Ints = 1,
    padding: int | _Ints | str = 0,
    dilation: int | _Ints = 1,
    groups: int = 1,
) -> torch.Tensor:
    if isinstance(padding, str) or not _only_input_learns(input, weight, bias):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    device = input.device.type
    if autocasts(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    return _Conv2d.apply(input, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups)


def _batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    if training or running_mean is None or running_var is None or not _only_input_learns(input, weight, bias):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _EvalBatchNorm.apply(input, running_mean, running_var, weight, bias, eps)


def _only_input_learns(input: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    return input.requires_grad and not any(w is not None and w.requires_grad for w in weights)


def _pair(value: int | _Ints) -> _Ints:
    return (value, value) if isinstance(value, int) else tuple(value)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: _Ints,
        padding: _Ints,
        dilation: _Ints,
        groups: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.strides = input.shape, input.stride()
        ctx.settings = stride, padding, dilation, False, (0, 0), groups
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        # Only its shape and layout are used.
        like = torch.empty_strided(ctx.shape, ctx.strides, dtype=grad.dtype, device=grad.device)
        mask = (True, False, False)
        dx, _, _ = torch.ops.aten.convolution_backward(grad, like, weight, None, *ctx.settings, mask)
        return dx, None, None, None, None, None, None


class _EvalBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(mean, var, weight)
        ctx.eps = eps
        return F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mean, var, weight = ctx.saved_tensors
        # In evaluation the gradient does not depend on the input, for which the gradient stands in here.
        # CUDA's kernel takes no None for the batch statistics, which evaluation does not have.
        none = grad.new_empty(0, dtype=torch.promote_types(grad.dtype, torch.float32)) if grad.is_cuda else None
        dx, _, _ = torch.ops.aten.native_batch_norm_backward(
            grad, grad, weight, mean, var, none, none, False, ctx.eps, (True, False, False)
        )
        return dx, None, None, None, None, None
