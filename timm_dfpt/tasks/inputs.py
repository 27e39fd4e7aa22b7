"""The input contract: a teacher sees what it was trained on, whatever the loader made for the student."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import nn

__all__ = ['InputAdapter', 'create_input_adapter', 'input_config_of']


def input_config_of(model: nn.Module) -> dict[str, Any]:
    """Return what a timm model was trained on: `input_size`, `mean`, `std` and the rest of timm's data config."""
    return dict(resolve_model_data_config(model))


class InputAdapter(nn.Module):
    """Turns a batch normalised and sized for one model into a batch for another.

    Re-normalises in one multiply-add, resizes (bicubic, antialiased) where the sizes differ, and repeats a grey channel
    for a model of three. Does nothing where both models agree.

    Args:
        source: What the loader used: `input_size` `(C, H, W)`, `mean` and `std` a channel.
        target: What the model behind the adapter was trained with.

    Raises:
        ValueError: The channels cannot be converted.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
        super().__init__()
        channels, target_channels = source['input_size'][0], target['input_size'][0]
        if target_channels not in (channels, 3) or channels not in (1, target_channels):
            raise ValueError(
                f'The images are loaded with {channels} channels, but the teacher takes {target_channels}. '
                f'Load them with input_size=({target_channels}, H, W) and a student of in_chans={target_channels}.'
            )
        self.repeat = target_channels if channels != target_channels else 0
        self.size = tuple(target['input_size'][1:]) if source['input_size'][1:] != target['input_size'][1:] else None
        mean, std = _per_channel(source, 'mean', target_channels), _per_channel(source, 'std', target_channels)
        target_mean = _per_channel(target, 'mean', target_channels)
        target_std = _per_channel(target, 'std', target_channels)
        # Compared here and once: a comparison of tensors in forward would wait for the device at every step.
        self.renormalize = not (torch.equal(mean, target_mean) and torch.equal(std, target_std))
        self.register_buffer('scale', (std / target_std).float(), persistent=False)
        self.register_buffer('shift', ((mean - target_mean) / target_std).float(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convert images `[B, C, H, W]` of the loader to those of the target model."""
        if self.repeat:
            x = x.expand(-1, self.repeat, -1, -1)
        if self.renormalize:
            x = x * self.scale.to(x.dtype) + self.shift.to(x.dtype)
        if self.size and tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(x, self.size, mode='bicubic', antialias=True)
        return x


def create_input_adapter(source: Mapping[str, Any], target: Mapping[str, Any]) -> nn.Module:
    """Return an `InputAdapter`, or `nn.Identity` where both models agree; arguments and errors as there."""
    adapter = InputAdapter(source, target)
    return adapter if adapter.repeat or adapter.renormalize or adapter.size else nn.Identity()


def _per_channel(config: Mapping[str, Any], key: str, channels: int) -> torch.Tensor:
    values = torch.tensor(config[key], dtype=torch.float64).flatten()
    if values.numel() not in (1, channels):
        raise ValueError(f'{key}={tuple(config[key])} must have one value or {channels}, one a channel.')
    return values.expand(channels).reshape(1, channels, 1, 1)
