"""The norm layers of a model, of whatever library: what scales and shifts channels by statistics, running or not."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ['find_norms', 'has_statistics', 'unshare']

_TORCH_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def find_norms(model: nn.Module, outside: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Find the outermost norm layers by what they are, not by a list of names.

    A norm layer is one of torch's, or derived from it; or has nothing but parameters with one number per channel, and
    is called a norm: by its class or one that it is derived from (`GlobalResponseNorm`, `EvoNorm2dS0`,
    `LlamaRMSNorm`), or where it stands (`norm1`, as the affine layers of ResMLP). A norm layer with weights in its
    activation has these, too.

    Args:
        model: The model.
        outside: Names of modules to leave out, with all in them.

    Returns:
        Norm layers by name that have parameters or running statistics, each once, in the order of `named_modules`.
    """
    found: dict[str, nn.Module] = {}
    inside = {id(part) for name in outside for part in model.get_submodule(name).modules()}
    for name, module in model.named_modules():
        if id(module) in inside or not _is_norm(name, module):
            continue
        inside |= {id(part) for part in module.modules()}
        if has_statistics(module) or next(module.parameters(), None) is not None:
            found[name] = module
    return found


def _is_norm(name: str, module: nn.Module) -> bool:
    if isinstance(module, _TORCH_NORMS):
        return True
    params = list(module.parameters())
    # Of its own, and with no others below it: a block that holds a norm may be called after it.
    if len(params) > sum(param is not None for param in module._parameters.values()):
        return False
    per_channel = bool(params) and all(param.numel() == max(param.shape, default=1) for param in params)
    names = [name.rsplit('.', 1)[-1], *(kind.__name__ for kind in type(module).__mro__)]
    return per_channel and any('norm' in each.lower() for each in names)


def has_statistics(module: nn.Module) -> bool:
    """Say whether a norm layer keeps running statistics, which it uses in evaluation and updates in training."""
    return any(name.startswith('running_') and buffer is not None for name, buffer in module._buffers.items())


def unshare(modules: Iterable[nn.Module]) -> None:
    """Give modules that share tensors with others copies of their own; those that they share with each other stay so.

    Args:
        modules: The modules.
    """
    copies: dict[int, torch.Tensor] = {}

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            plain = tensor.detach().clone()
            copies[id(tensor)] = nn.Parameter(plain) if isinstance(tensor, nn.Parameter) else plain
        return copies[id(tensor)]

    for module in modules:
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        tensors[key] = own(tensor)  # type: ignore[assignment]
