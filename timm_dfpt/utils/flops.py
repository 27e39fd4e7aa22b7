"""FLOPs of whole training steps."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['flop_counter']


def flop_counter() -> FlopCounterMode:
    """Return torch's counter: two FLOPs a multiply-accumulate of matrix products and convolutions, backward included.

    Of a convolution in groups torch counts the gradient of its weight as if it had none, which for depthwise networks
    is many times the rest of the step.
    """
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward}
    )


def _convolution_backward(
    grad: Sequence[int], input: Sequence[int], weight: Sequence[int], *settings: Any, out_shape: Any = None
) -> int:
    """Return the FLOPs of the gradients that are asked for: of input and weight each what the forward takes."""
    *_, transposed, _, _, (of_input, of_weight, _) = settings
    positions = math.prod((input if transposed else grad)[2:])
    return 2 * grad[0] * positions * math.prod(weight) * (of_input + of_weight)
