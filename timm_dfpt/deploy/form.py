"""The form in which a model is deployed: branches that exist for training only are folded into one layer."""
from __future__ import annotations

import copy

import torch
from timm.utils import unwrap_model
from timm.utils.model import reparameterize_model
from torch import nn

__all__ = ['deployed_form', 'has_deployed_form']

# What timm's `reparameterize_model` calls on a module.
_FOLDS = ('fuse', 'reparameterize', 'switch_to_deploy')


def deployed_form(model: nn.Module) -> nn.Module:
    """Return a copy of a model as it is deployed: in evaluation mode, on the CPU, in float32, branches folded.

    timm folds MobileOne, RepVGG, RepViT, FastViT, LeViT and others (`timm.utils.reparameterize_model`); the logits stay
    the same up to rounding. Any other model is only copied.

    Args:
        model: Classifier made by `timm.create_model`; wrappers of `torch.compile`, DDP and EMA are removed.
    """
    plain: nn.Module = copy.deepcopy(unwrap_model(model)).to('cpu', torch.float32).eval()
    with torch.no_grad():
        folded: nn.Module = reparameterize_model(plain, inplace=True) if has_deployed_form(plain) else plain
    return folded.eval().requires_grad_(False)


def has_deployed_form(model: nn.Module) -> bool:
    """Say whether a model is deployed in another form than it is trained in."""
    modules = list(unwrap_model(model).modules())[1:]
    return any(callable(getattr(module, name, None)) for module in modules for name in _FOLDS)
