"""The hook that puts prompt and fusion blocks behind a stage, in whatever layout its features are."""
from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..backbone.layouts import TokenOrder, from_patches, to_patches, token_grid
from ..backbone.types import Feature, Stage
from .calls import Call, Calls
from .frozen_layers import autocasts

__all__ = ['CastInput', 'Injection', 'KeepStatistics', 'match_precision']


class Injection:
    """Forward hook on the module of a stage: replaces its features `h` by `F(h + P(h))`.

    A class, not a closure, so that deepcopy and pickle take the blocks along.

    Args:
        index: Number of the stage.
        stage: Where the features are in the output.
        blocks: Prompt block `P` of each feature.
        fusions: Fusion block `F` of each feature.
        orders: For tokens in an order of their own, how to undo it; else `nn.Identity`.
        calls: Of the prompt path.
    """

    def __init__(
        self,
        index: int,
        stage: Stage,
        blocks: Sequence[nn.Module],
        fusions: Sequence[nn.Module],
        orders: Sequence[nn.Module],
        calls: Calls,
    ) -> None:
        self.index, self.stage, self.calls = index, stage, calls
        self.parts = list(zip(stage.features, blocks, fusions, orders, strict=True))

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return `output` with its features replaced."""
        here = self.calls.here
        if here.call is not None:
            here.call.fired.append(self.index)
        call = here.call or here.recomputed
        leaves, spec = pytree.tree_flatten(output)
        for feature, block, fusion, order in self.parts:
            h = leaves[feature.index]
            x = match_precision(h, block, fusion)
            leaves[feature.index] = self._inject(x, feature, block, fusion, order, call).to(h.dtype)
        return pytree.tree_unflatten(leaves, spec)

    def _inject(
        self,
        h: torch.Tensor,
        feature: Feature,
        block: nn.Module,
        fusion: nn.Module,
        order: nn.Module,
        call: Call | None,
    ) -> torch.Tensor:
        if feature.layout == 'NCHW':
            return fusion(h + block(h))
        if feature.layout == 'NHWC':
            # A permuted view has channels_last strides, which convolutions take as they are: nothing is copied.
            x = h.permute(0, 3, 1, 2)
            return fusion(x + block(x)).permute(0, 2, 3, 1)
        if call is None:
            raise RuntimeError(
                f'The block behind {self.stage.module!r} ran outside of the prompt path, where the layout of its '
                'tokens is unknown. Call teacher.prompt(x); for gradient checkpointing, '
                'teacher.set_grad_checkpointing().'
            )
        prefix = feature.prefix_tokens
        tokens = h[:, prefix:] if prefix else h
        if call.patch_coord is not None:
            x, mask, index = to_patches(tokens, call.patch_coord, call.patch_valid)
            x = from_patches(fusion(x + block(x, mask)), index, tokens)
        else:
            if isinstance(order, TokenOrder):
                tokens = tokens[:, order.to_raster]
            count = tokens.shape[1]
            grid = token_grid(count, call.image_size, self.stage.reduction) or (count, 1)
            x = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
            x = fusion(x + block(x)).permute(0, 2, 3, 1).flatten(1, 2)
            if isinstance(order, TokenOrder):
                x = x[:, order.from_raster]
        return torch.cat([h[:, :prefix], x], dim=1) if prefix else x


class CastInput:
    """Forward pre-hook on a head of higher precision than the frozen backbone before it."""

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return the inputs in the precision of the module's weights."""
        return tuple(match_precision(arg, module) for arg in args)


class KeepStatistics:
    """Hooks around a layer with running statistics, which move once for a batch however often it is computed.

    Gradient checkpointing computes it again in the backward pass.

    Args:
        calls: Of the prompt path.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def around(self, module: nn.Module) -> None:
        """Register the hooks."""
        module.register_forward_pre_hook(self.before)
        # A recomputation may end by an exception as soon as it has what it is for.
        module.register_forward_hook(self.after, always_call=True)

    def before(self, module: nn.Module, args: Any) -> None:
        """Put copies in the place of the statistics if this is a recomputation."""
        here = self.calls.here
        if here.call is None and here.recomputed is not None and module.training:
            here.statistics = dict(module._buffers)
            copies = {name: None if value is None else value.clone() for name, value in module._buffers.items()}
            module._buffers.update(copies)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Put the statistics back."""
        here = self.calls.here
        module._buffers.update(here.statistics)
        here.statistics = {}


def match_precision(x: torch.Tensor, *modules: nn.Module) -> torch.Tensor:
    """Cast `x` to the precision of the modules' weights, unless autocast does."""
    param = next(itertools.chain.from_iterable(m.parameters() for m in modules), None)
    if param is None or param.dtype == x.dtype or autocasts(x.device.type):
        return x
    return x.to(param.dtype)
