"""The input contract: a teacher sees what it was trained on, whatever the loader made for the student."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import nn

from ..backbone.modes import look_through

__all__ = ['InputAdapter', 'adapt_inputs', 'input_config_of']


def input_config_of(model: nn.Module) -> dict[str, Any]:
    """Return what a timm model was trained on: `input_size`, `mean`, `std` and the rest of timm's data config.

    With the channels that the model takes, of which its `pretrained_cfg` may know nothing; a model of grey images gets
    the average of three means.
    """
    config = dict(resolve_model_data_config(model))
    patches: Any = getattr(model, 'patch_embed', None)
    if getattr(patches, 'strict_img_size', False) and patches.img_size:
        # As it was created with img_size=..., of which its `pretrained_cfg` knows nothing.
        config['input_size'] = (config['input_size'][0], *patches.img_size)
    channels = getattr(model, 'in_chans', None)
    if isinstance(channels, int):
        config['input_size'] = (channels, *config['input_size'][1:])
        for key in ('mean', 'std'):
            if channels == 1:
                config[key] = (sum(config[key]) / len(config[key]),)
    return config


class InputAdapter(nn.Module):
    """Module that turns a batch normalised and sized for one model into a batch for another.

    Re-normalises in one multiply-add, resizes (bicubic, antialiased) where the sizes differ, and repeats a grey channel
    for a model of three. Does nothing where both models agree.

    Args:
        source: What the loader used: `input_size` `(C, H, W)`, `mean` and `std` per channel.
        target: What the model behind the adapter was trained with.

    Raises:
        ValueError: If the channels cannot be converted.
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
        if _same(source, target, 'mean') and _same(source, target, 'std'):
            # So it does not matter whether there is a value for each channel.
            mean = target_mean = torch.zeros(1)
            std = target_std = torch.ones(1)
        else:
            shape = (1, target_channels, 1, 1)
            mean, std = (_per_channel(source, key, channels, 'images').expand(shape) for key in ('mean', 'std'))
            target_mean, target_std = (
                _per_channel(target, key, target_channels, 'teacher').expand(shape) for key in ('mean', 'std')
            )
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


def adapt_inputs(
    student: nn.Module,
    teacher: nn.Module,
    source: Mapping[str, Any] | None = None,
    target: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return what makes the teacher's input of the student's: an `InputAdapter`, or `nn.Identity` where both agree.

    Args:
        student: The student.
        teacher: The teacher.
        source: What the loader gives: `input_size` `(C, H, W)`, `mean`, `std`. By default the student's own.
        target: What the teacher was trained with. By default its own.

    Raises:
        ValueError: If channels cannot be converted, or a model does not take those of its configuration.
    """
    student, teacher = look_through(student), look_through(teacher)
    source, target = source or input_config_of(student), target or input_config_of(teacher)
    for name, key, model, config in (
        ('student', 'input_config', student, source), ('teacher', 'teacher_input_config', teacher, target)
    ):  # fmt: skip
        channels = getattr(model, 'in_chans', None)
        if isinstance(channels, int) and channels != config['input_size'][0]:
            raise ValueError(
                f'{key} has {config["input_size"][0]} channels (input_size={tuple(config["input_size"])}), but the '
                f'{name} takes {channels}: create it with in_chans={config["input_size"][0]}, or load other images.'
            )
    adapter = InputAdapter(source, target)
    return adapter if adapter.repeat or adapter.renormalize or adapter.size else nn.Identity()


def _same(source: Mapping[str, Any], target: Mapping[str, Any], key: str) -> bool:
    return tuple(source[key]) == tuple(target[key])


def _per_channel(config: Mapping[str, Any], key: str, channels: int, whose: str) -> torch.Tensor:
    values = torch.tensor(config[key], dtype=torch.float64).flatten()
    if values.numel() not in (1, channels):
        where = 'input_config' if whose == 'images' else "teacher_input_config, or the teacher's pretrained_cfg"
        raise ValueError(
            f'{key}={tuple(config[key])} of the {whose} must have one value, or {channels} (one per channel): give '
            f'them in {where}.'
        )
    return values.view(1, -1, 1, 1)
