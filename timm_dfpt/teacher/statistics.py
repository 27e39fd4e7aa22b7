"""BatchNorm statistics of other images: what a network can learn of them without labels and without a gradient."""
from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from ..backbone.modes import evaluating, look_through
from ..backbone.types import name_of
from .prompt_path import PromptPath, match_dtype
from .teacher import DualForwardPathTeacher

__all__ = ['adapt_statistics', 'estimate_statistics', 'own_layers']


_NAMES = ('running_mean', 'running_var')


def adapt_statistics(model: nn.Module, loader: Iterable[Any], device: torch.device | str | None = None) -> Any:
    """Estimate the BatchNorm statistics of a model anew on other images; labels are not used, weights stay.

    One pass of torch's `update_bn`: the running statistics become the mean of those of the batches, all of equal
    weight. Only BatchNorm is in training mode meanwhile, so that dropout and the like draw nothing. The batches should
    be of one size and in random order: class by class, each would have statistics of its own. Source: AdaBN, Li et al.,
    arXiv 1603.04779.

    Args:
        model: Any model, or a teacher made by `timm_dfpt.wrap`: then the statistics are those of its prompt path, which
            must have norms of its own (`PromptConfig(norms='own')`), and its original path keeps those it has.
        loader: Batches of images `[B, C, H, W]` as the model takes them, or tuples that begin with such.
        device: Where to put the batches; by default where the model is.

    Returns:
        A copy with other statistics, in the modes that `model` has; `model` itself is not touched.

    Raises:
        TypeError: If a batch has no tensor of images, alone or as its first part.
        ValueError: If there is no BatchNorm with running statistics, or no batch, or they become infinite.

    Example:
        >>> teacher = timm_dfpt.adapt_statistics(timm.create_model('resnet50', pretrained=True), loader)
    """
    model = look_through(model)
    if device is None:
        device = next((param.device for param in model.parameters()), torch.device('cpu'))
    adapted = copy.deepcopy(model)
    if isinstance(adapted, DualForwardPathTeacher):
        estimate_statistics(adapted.prompt_path, own_layers(adapted), adapted.prompt, loader, device)
    else:
        estimate_statistics(adapted, own_layers(adapted), lambda x: adapted(match_dtype(x, adapted)), loader, device)
    return adapted


def own_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers that keep running statistics: of a model, or those of a teacher's prompt path.

    Raises:
        ValueError: If the prompt path has the statistics of the original path, which must stay as they are.
    """
    if isinstance(model, DualForwardPathTeacher):
        if _layers_of(model.model) and model.config.norms != 'own':
            raise ValueError(
                'The prompt path has the BatchNorm statistics of the original path, which must stay as they are: wrap '
                "with PromptConfig(norms='own')."
            )
        return _layers_of(model.prompt_path) if _layers_of(model.model) else []
    return _layers_of(model)


def _layers_of(model: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]


@contextlib.contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Convert weights to float32 within the context; going there and back changes none of them."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict(keep_vars=True).items()}
    model.float()
    try:
        yield
    finally:
        for name, dtype in dtypes.items():
            path, _, leaf = name.rpartition('.')
            owner = model.get_submodule(path)
            if leaf in owner._parameters:
                param = owner.get_parameter(leaf)
                param.data = param.data.to(dtype)
            else:
                setattr(owner, leaf, owner.get_buffer(leaf).to(dtype))


class _Pass(nn.Module):
    """A forward whose only submodules are the layers that `update_bn` is to reset and put into training."""

    def __init__(self, layers: Sequence[nn.Module], forward: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._run = forward

    def train(self, mode: bool = True) -> _Pass:
        # Not of what is in them: those of timm may have a dropout.
        for module in (self, *self.layers):
            module.training = mode
        return self

    def forward(self, input: torch.Tensor) -> Any:
        return self._run(input)


def estimate_statistics(
    model: nn.Module,
    layers: Sequence[_BatchNorm],
    forward: Callable[[torch.Tensor], Any],
    loader: Iterable[Any],
    device: torch.device | str,
) -> None:
    """Do `adapt_statistics` in place.

    Args:
        model: The model, in evaluation mode except for the layers.
        layers: Its BatchNorm layers, see `own_layers`.
        forward: Runs it on images `[B, C, H, W]` of the loader.
        loader: As in `adapt_statistics`.
        device: Where to put the batches.

    Raises:
        TypeError: If `adapt_statistics` would raise it.
        ValueError: If `adapt_statistics` would raise it.
    """
    if not layers:
        named = model.model if isinstance(model, PromptPath) else model
        raise ValueError(
            f'{name_of(named)} has no BatchNorm with running statistics, so that there is nothing to estimate: use '
            'the model as it is.'
        )
    low = any(layer.get_buffer('running_mean').dtype.itemsize < 4 for layer in layers)
    count = 0

    def counted() -> Iterator[Any]:
        nonlocal count
        for batch in loader:
            images = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
            if not isinstance(images, torch.Tensor):
                raise TypeError(
                    f'The loader gives {type(images).__name__} and not tensors of images [B, C, H, W], alone or first '
                    'in a tuple: pick them out, as in (batch["image"] for batch in loader).'
                )
            count += 1
            yield batch

    # A mean of many batches that is kept in half precision would stop moving.
    with evaluating(model), _in_float32(model) if low else contextlib.nullcontext():
        if isinstance(model, PromptPath):
            # Its layers stay in training only where it is itself.
            model.training = True
        update_bn(counted(), _Pass(layers, forward), device=torch.device(device))
    if not count:
        raise ValueError('The loader has no batches to estimate statistics on: give more images, or smaller batches.')
    if not all(layer.get_buffer(name).isfinite().all() for layer in layers for name in _NAMES):
        raise ValueError(
            'The statistics of these images are not finite (NaN or Inf): normalize the images as the model expects.'
        )
