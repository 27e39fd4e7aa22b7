"""Convert a public CIFAR checkpoint of RepDistiller or MDistiller to a model folder that timm loads.

    python train/convert_checkpoint.py ckpt_epoch_240.pth --model cifar_resnet56 --output teachers/resnet56

The folder is what `timm_dfpt.save_student` writes; after `import timm_dfpt`, load it with
`timm.create_model('local-dir:teachers/resnet56', pretrained=True)`.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from timm_dfpt import save_student
from timm_dfpt.models import convert_state_dict


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a PyTorch checkpoint without running code from it.

    Args:
        path: Checkpoint file.

    Returns:
        Its contents, tensors on the CPU.

    Raises:
        ValueError: If the file is not a PyTorch checkpoint of a dict, or holds more than tensors and plain values.
    """
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f'{path} is not a checkpoint of tensors and plain values. '
            "Of RepDistiller's files take ckpt_epoch_*.pth or *_best.pth: *_last.pth also pickles its options."
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path} holds a {type(checkpoint).__name__}; a checkpoint or state dict is needed.')
    return checkpoint


def convert(checkpoint: Path, model_name: str, output: Path) -> None:
    """Write the checkpoint's network in timm's layout.

    Args:
        checkpoint: RepDistiller or MDistiller checkpoint.
        model_name: Registered name of the network, such as 'cifar_resnet56'.
        output: Folder to write to; it is created.

    Raises:
        ValueError: If `output` already holds a model, or the checkpoint is not one of this network.
    """
    weights_path = output / 'model.safetensors'
    if weights_path.exists():
        raise ValueError(f'output={str(output)!r} already holds {weights_path.name}; name another folder.')
    state_dict = convert_state_dict(load_checkpoint(checkpoint), model_name)
    model = timm.create_model(model_name)
    num_classes = len(state_dict[f'{model.pretrained_cfg["classifier"]}.bias'])
    if num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    model.load_state_dict(state_dict)
    save_student(model, output)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description='Convert a RepDistiller or MDistiller CIFAR checkpoint for timm.')
    parser.add_argument('checkpoint', type=Path, help='checkpoint file (.pth)')
    parser.add_argument('--model', required=True, help='registered name, such as cifar_resnet56')
    parser.add_argument('--output', required=True, type=Path, help='folder to write')
    args = parser.parse_args(argv)
    if not args.checkpoint.is_file():
        parser.error(f'checkpoint {args.checkpoint} does not exist')
    try:
        convert(args.checkpoint, args.model, args.output)
    except ValueError as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
