"""What an exported model expects of its images: normalisation inside the graph, or described in the metadata."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ['Normalised', 'describe_input', 'to_pixels']


class Normalised(nn.Module):
    """A model that takes pixels, and normalises them itself.

    Args:
        model: Maps normalised images to logits.
        mean: Mean of each channel, pixels being in [0, 1].
        std: Standard deviation of each channel.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer('mean', torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer('std', torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits `[B, K]` of pixels, uint8 `[B, C, H, W]`."""
        logits: torch.Tensor = self.model((image.float() / 255 - self.mean) / self.std)
        return logits


def to_pixels(images: torch.Tensor, data_config: Mapping[str, Any]) -> np.ndarray:
    """Return the pixels, uint8, that normalised images `[B, C, H, W]` were made from."""
    mean, std = (torch.tensor(data_config[key]).view(1, -1, 1, 1) for key in ('mean', 'std'))
    pixels: np.ndarray = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return pixels


def describe_input(
    data_config: Mapping[str, Any], class_names: Sequence[str] | None, include_preprocessing: bool
) -> dict[str, str]:
    """Return the metadata of an exported file, values of other types than text as JSON."""
    channels, height, width = data_config['input_size']
    color = 'grey' if channels == 1 else 'RGB'
    resized = f'resized and cropped to {height} x {width}'
    described = f'{color} in 0..1, {resized}, (x - mean) / std'
    if include_preprocessing:
        described = f'uint8 {color}, {resized}'
    facts: dict[str, Any] = {
        'input': described,
        'preprocessing': 'included' if include_preprocessing else 'described',
        'input_size': list(data_config['input_size']),
        'mean': list(data_config['mean']),
        'std': list(data_config['std']),
        'interpolation': data_config.get('interpolation', 'bicubic'),
        'crop_pct': data_config.get('crop_pct'),
        'crop_mode': data_config.get('crop_mode', 'center'),
    }
    if class_names is not None:
        facts['class_names'] = list(class_names)
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
