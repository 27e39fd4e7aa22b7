"""Linear layers of low rank that are added to what is there, zero at the start.

Source: LoRA, arXiv 2106.09685, whose `A` and `B` are `down` and `up` here. What it is used for, the head and the fusion
of a prompt path, is ours.
"""
from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from ..backbone.types import name_of
from .hooks import match_precision

__all__ = ['LowRank', 'LowRankHead', 'correct_head']


class LowRank(nn.Sequential):
    """`B A x + b` with `A` as torch draws it, `B` and `b` zero at the start.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        rank: Channels between the two layers.
        option: The option that asks for this rank, for the message.
        layer: `nn.Linear`, or `nn.Conv2d` for 1x1 convolutions.
        bias: Whether there is `b`.

    Raises:
        ValueError: If a whole matrix had no more weights.
    """

    def __init__(
        self, inputs: int, outputs: int, rank: int, option: str, layer: type[nn.Module] = nn.Conv2d, bias: bool = True
    ) -> None:
        if rank * (inputs + outputs) >= inputs * outputs:
            largest = math.ceil(inputs * outputs / (inputs + outputs)) - 1
            raise ValueError(
                f'{option}={rank} saves nothing where the whole matrix has {outputs} x {inputs} weights: '
                + (f'at most {largest}, or None for the whole.' if largest else 'leave it None, for the whole.')
            )
        kernel: dict[str, Any] = {'kernel_size': 1} if issubclass(layer, nn.Conv2d) else {}
        up = layer(rank, outputs, bias=bias, **kernel)
        for param in up.parameters():
            nn.init.zeros_(param)
        super().__init__(OrderedDict(down=layer(inputs, rank, bias=False, **kernel), up=up))


class LowRankHead(LowRank):
    """A frozen classifier with a trained correction: `H(x) + B A x + b`.

    Args:
        frozen: The classifier `H`, linear or a 1x1 convolution. It is not registered: its weights are those of the
            original path, and are neither trained nor saved here.
        rank: Rank of the correction.
    """

    def __init__(self, frozen: nn.Linear | nn.Conv2d, rank: int) -> None:
        outputs, inputs = frozen.weight.shape[:2]
        layer = nn.Linear if isinstance(frozen, nn.Linear) else nn.Conv2d
        super().__init__(inputs, outputs, rank, 'head_rank', layer, bias=frozen.bias is not None)
        self._frozen = (frozen,)

    @property
    def frozen(self) -> nn.Module:
        """The classifier that is corrected."""
        return self._frozen[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map what enters the classifier, `[B, D]`, `[B, L, D]` or `[B, D, 1, 1]`, to logits."""
        return self.frozen(match_precision(x, self.frozen)) + super().forward(x)


def correct_head(model: nn.Module, name: str, rank: int) -> None:
    """Put a correction around a classifier of a model.

    Args:
        model: The model; is changed.
        name: Name of the classifier module.
        rank: Rank of the correction.

    Raises:
        ValueError: If the classifier is neither linear nor a 1x1 convolution, or small for this rank.
    """
    frozen = model.get_submodule(name)
    if not isinstance(frozen, nn.Linear) and not (isinstance(frozen, nn.Conv2d) and frozen.kernel_size == (1, 1)):
        raise ValueError(
            f'head_rank={rank} corrects a linear classifier or a 1x1 convolution, but {name!r} of {name_of(model)} is '
            f'a {type(frozen).__name__}: leave head_rank=None for a copy of it.'
        )
    model.set_submodule(name, LowRankHead(frozen, rank).to(device=frozen.weight.device))
