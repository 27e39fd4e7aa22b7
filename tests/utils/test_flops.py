"""FLOPs of a training step: the backward of a convolution takes twice its forward, in groups or not."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from timm_dfpt.utils.flops import flop_counter


@pytest.mark.parametrize('groups', [1, 2, 8])
@pytest.mark.parametrize('transposed', [False, True])
def test_a_step_is_three_forwards(groups: int, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer, x = kind(8, 16, 3, padding=1, groups=groups), torch.randn(2, 8, 6, 6, requires_grad=True)
    macs = 2 * 8 * 16 * 9 * 36 // groups
    with flop_counter() as forward, torch.no_grad():
        layer(x)
    with flop_counter() as step:
        layer(x).sum().backward()
    assert (forward.get_total_flops(), step.get_total_flops()) == (2 * macs, 6 * macs)
