"""Rename the weights of the KD community's CIFAR checkpoints to those of the networks here.

RepDistiller and MDistiller define the same networks with the same parameter names; this maps those names to ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import Tensor

__all__ = ['convert_state_dict']

_PREFIX = 'cifar_'

# Pattern of a whole community name, and what it becomes: a template or a function of the match.
_Rule = tuple[str, str | Callable[[re.Match[str]], str]]


def _stage(match: re.Match[str]) -> str:
    return f'stages.{int(match[1]) - 1}.{match[2]}'


def _wrn_block(match: re.Match[str]) -> str:
    name = match[3].replace('convShortcut', 'downsample.conv').replace('bn', 'norm')
    return f'stages.{int(match[1]) - 1}.{match[2]}.{name}'


def _vgg_layer(match: re.Match[str]) -> str:
    stage, layer = int(match[1]), int(match[2])
    # The community counts convolution, norm and activation one by one; stages 1 to 3 here begin with their pooling.
    conv, part = divmod(layer, 3)
    return f'stages.{stage}.{conv + (1 <= stage <= 3)}.{("conv", "bn", "act")[part]}.{match[3]}'


def _mobilenetv2_layer(match: re.Match[str]) -> str:
    names = {'0': 'conv_pw', '1': 'bn1', '3': 'conv_dw', '4': 'bn2', '6': 'conv_pwl', '7': 'bn3'}
    return f'blocks.{match[1]}.{names[match[2]]}.{match[3]}'


def _shufflenetv2_layer(match: re.Match[str]) -> str:
    stage, unit, kind, layer, rest = int(match[1]) - 1, int(match[2]), match[3], int(match[4]), match[5]
    if unit == 0:
        # Only the unit that halves the resolution has layers on the left: the first two of its five.
        branch = f'left.{layer - 1}' if layer <= 2 else f'right.{layer - 3}'
    else:
        branch = f'right.{layer - 1}'
    return f'stages.{stage}.{unit}.{branch}.{kind}.{rest}'


_STEM: tuple[_Rule, ...] = ((r'(conv|bn)1\.(.+)', r'stem.\1.\2'),)

# The first pattern that matches a model's whole name decides.
_RULES: dict[str, tuple[_Rule, ...]] = {
    r'resnet(18|50)': (
        (r'((?:conv|bn)1\..+)', r'\1'),
        (r'(layer\d\.\d+)\.shortcut\.(.+)', r'\1.downsample.\2'),
        (r'(layer\d\.\d+\..+)', r'\1'),
        (r'linear\.(.+)', r'fc.\1'),
    ),
    r'resnet\d+(x4)?': (*_STEM, (r'layer(\d)\.(.+)', _stage), (r'fc\.(.+)', r'head.fc.\1')),
    r'wrn_.+': (
        (r'conv1\.(.+)', r'stem.\1'),
        (r'block(\d)\.layer\.(\d+)\.(.+)', _wrn_block),
        (r'bn1\.(.+)', r'final.\1'),
        (r'fc\.(.+)', r'head.fc.\1'),
    ),
    r'vgg\d+': ((r'block(\d)\.(\d+)\.(.+)', _vgg_layer), (r'classifier\.(.+)', r'head.fc.\1')),
    r'mobilenetv2_.+': (
        (r'conv1\.0\.(.+)', r'conv_stem.\1'),
        (r'conv1\.1\.(.+)', r'bn1.\1'),
        (r'blocks\.(\d\.\d)\.conv\.([013467])\.(.+)', _mobilenetv2_layer),
        (r'conv2\.0\.(.+)', r'conv_head.\1'),
        (r'conv2\.1\.(.+)', r'bn2.\1'),
        (r'classifier\.0\.(.+)', r'classifier.\1'),
    ),
    r'shufflenetv1': (
        *_STEM,
        (r'layer(\d)\.(\d\.)(conv|bn)(\d)\.(.+)', lambda m: f'stages.{int(m[1]) - 1}.{m[2]}conv{m[4]}.{m[3]}.{m[5]}'),
        (r'linear\.(.+)', r'head.fc.\1'),
    ),
    r'shufflenetv2': (
        *_STEM,
        (r'layer(\d)\.(\d)\.(conv|bn)(\d)\.(.+)', _shufflenetv2_layer),
        (r'(conv|bn)2\.(.+)', r'final.\1.\2'),
        (r'linear\.(.+)', r'head.fc.\1'),
    ),
}


def convert_state_dict(state_dict: Mapping[str, Any], model_name: str) -> dict[str, Tensor]:
    """Rename a RepDistiller or MDistiller state dict to the parameters of the same network here.

    Both projects save a dict with the weights under 'model'; names may carry the 'module.' prefix of data parallelism.
    The result is checked against the network: same names, same shapes (any number of classes).

    Args:
        state_dict: Contents of a checkpoint, or the state dict in it.
        model_name: Registered name of the network, such as 'cifar_resnet56'.

    Returns:
        State dict that `timm.create_model(model_name, num_classes=...)` loads strictly; the tensors are not copied.

    Raises:
        ValueError: If the model is not one of the CIFAR networks, or the weights are not those of this network.
    """
    rules = _find_rules(model_name)
    weights = state_dict.get('model', state_dict)
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(
            'state_dict holds no weights: pass a dict of tensors, or a checkpoint dict with such a dict under "model".'
        )
    converted = {_rename(name.removeprefix('module.'), rules, model_name): value for name, value in weights.items()}
    _check_structure(converted, model_name)
    return converted


def _find_rules(model_name: str) -> tuple[_Rule, ...]:
    if model_name.startswith(_PREFIX) and timm.is_model(model_name):
        for pattern, rules in _RULES.items():
            if re.fullmatch(pattern, model_name.removeprefix(_PREFIX)):
                return rules
    known = ', '.join(timm.list_models(f'{_PREFIX}*'))
    raise ValueError(f'model_name={model_name!r} has no community checkpoints to convert; choose one of {known}.')


def _rename(name: str, rules: tuple[_Rule, ...], model_name: str) -> str:
    for pattern, target in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(target) if isinstance(target, str) else target(match)
    raise ValueError(
        f'{name!r} is not a parameter of {model_name} in RepDistiller or MDistiller; check model_name, and pass the '
        "weights of one network (MDistiller's 'student_best' or 'student_latest', not 'best' or 'latest')."
    )


def _check_structure(converted: Mapping[str, Tensor], model_name: str) -> None:
    classifier = converted.get(f'{timm.models.get_pretrained_cfg_value(model_name, "classifier")}.bias')
    num_classes = 0 if classifier is None else len(classifier)
    model = timm.create_model(model_name, num_classes=num_classes, device=torch.device('meta'))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in converted.items()}
    if num_classes == 0 or found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))
        raise ValueError(
            f'The weights do not fit {model_name} (classifier of {num_classes} classes); '
            f'first differences after renaming: {wrong[:6]}. Check model_name.'
        )
