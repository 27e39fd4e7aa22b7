"""`check_teacher` passes sound models, and says what is wrong with others."""
from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from timm_dfpt.testing import check_teacher, randomize


def make_model(name: str = 'test_resnet', classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes).eval()
    randomize(model, torch.randn(2, *model.pretrained_cfg['input_size']))
    return model


def test_a_model_alone_is_enough() -> None:
    row = check_teacher(make_model())
    assert row['stages'] == ['layer1.0', 'layer2.0', 'layer3.0']
    assert row['init_difference'] == 0


class Counting(nn.Module):
    """Changes its output a little each time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.calls / 1024


def test_a_model_that_never_answers_alike_is_found() -> None:
    model = make_model()
    model.maxpool = nn.Sequential(model.maxpool, Counting())
    with pytest.raises(ValueError, match='not deterministic'):
        check_teacher(model)


def test_a_dead_model_is_found() -> None:
    model = make_model()
    nn.init.constant_(model.fc.weight, float('nan'))
    with pytest.raises(AssertionError, match='no usable logits'):
        check_teacher(model)
