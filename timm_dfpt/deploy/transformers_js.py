"""A repository that transformers.js loads: ONNX files, and the two configs that it reads."""
from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..hub.export_table import exports_table
from ..hub.files import write_json
from ..hub.licenses import License
from ..hub.privacy import public
from ..version import __version__
from .graphs import takes_rgb
from .onnx_files import EXTRA, missing_packages, write_onnx

__all__ = ['FILES', 'preprocessor_config', 'write_onnx_repo']

FILES = ('model.onnx', 'model_fp16.onnx', 'model_quantized.onnx')
"""The names that transformers.js knows: of float32, float16 and int8."""
_TEMPLATE = Path(__file__).parent / 'templates' / 'onnx_card.md'
_RESAMPLE = {'nearest': 0, 'lanczos': 1, 'bilinear': 2, 'bicubic': 3, 'box': 4, 'hamming': 5}
# From this side on ConvNextImageProcessor resizes without a crop.
_NO_CROP_FROM = 384


def preprocessor_config(data_config: Mapping[str, Any], normalize: bool = True) -> dict[str, Any]:
    """Return `preprocessor_config.json` that does what timm's evaluation transform does.

    Args:
        data_config: How images are prepared, as `timm.data.resolve_data_config` returns it.
        normalize: Whether the model takes normalised images, or values in 0..1.

    Raises:
        ValueError: If transformers.js has nothing that does the same.
    """
    channels, height, width = data_config['input_size']
    crop_pct, mode = data_config.get('crop_pct') or 0.875, data_config.get('crop_mode') or 'center'
    config: dict[str, Any] = {
        'do_resize': True,
        'do_convert_rgb': True,
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': normalize,
        'image_mean': list(data_config['mean']) * (3 // channels),
        'image_std': list(data_config['std']) * (3 // channels),
        'resample': _RESAMPLE[data_config.get('interpolation') or 'bicubic'],
    }
    scaled = [math.floor(side / crop_pct) for side in (height, width)]
    cropped = {'do_center_crop': True, 'crop_size': {'height': height, 'width': width}}
    if mode == 'center' and height == width < _NO_CROP_FROM:
        size = {'shortest_edge': height}
        own = {'image_processor_type': 'ConvNextImageProcessor', 'size': size, 'crop_pct': crop_pct}
    elif mode == 'center' and height == width:
        own = {'image_processor_type': 'CLIPImageProcessor', 'size': {'shortest_edge': scaled[0]}, **cropped}
    elif mode == 'squash':
        size = {'height': scaled[0], 'width': scaled[1]}
        own = {'image_processor_type': 'CLIPImageProcessor', 'size': size, **cropped}
    else:
        raise ValueError(
            f'crop_mode={mode} at {height} x {width} pixels is not supported by transformers.js, which crops the '
            'center of square images: leave --push-onnx out, and use the ONNX files with your own preprocessing.'
        )
    return {**own, **config}


def write_onnx_repo(
    exported: Path,
    folder: Path,
    repo_id: str,
    base_model: str,
    *,
    label_names: Sequence[str],
    rows: Sequence[Mapping[str, Any]] = (),
    license: License | None = None,
    architecture: str = '',
) -> None:
    """Write the repository of a student for transformers.js and onnxruntime.

    Args:
        exported: Folder with the files of an export.
        folder: Where to write; empty.
        repo_id: Repository that the card is for.
        base_model: The student's repository.
        label_names: Names of the classes.
        rows: What was measured of the files, for the card.
        license: License of the weights.
        architecture: The student's architecture, for the card.

    Raises:
        FileNotFoundError: If a file of the export is missing.
        ValueError: If packages are missing, or transformers.js has nothing that prepares images as timm does.
    """
    if missing_packages():
        raise ValueError(f'push_onnx needs {", ".join(missing_packages())}: {EXTRA}')
    missing = [name for name in FILES if not (exported / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f'{str(exported)!r} has no {missing[0]}: run the same command again with --resume --export onnx.'
        )
    import onnx  # of the extra `onnx`

    (folder / 'onnx').mkdir(parents=True)
    facts: dict[str, str] = {}
    for name in FILES:
        model = onnx.load(exported / name)
        facts = {entry.key: entry.value for entry in model.metadata_props}
        write_onnx(takes_rgb(model), folder / 'onnx' / name)
    keys = ('input_size', 'mean', 'std', 'crop_pct')
    data_config = {key: json.loads(facts[key]) for key in keys}
    data_config |= {key: facts[key] for key in ('interpolation', 'crop_mode')}
    normalised = facts['preprocessing'] == 'described' and data_config['input_size'][0] == 3
    prepared = preprocessor_config(data_config, normalize=normalised)
    write_json(folder / 'preprocessor_config.json', prepared)
    write_json(
        folder / 'config.json',
        {
            # transformers.js has one code for all classifiers of images, and a list of names; timm's are not in it.
            'model_type': 'resnet',
            'architectures': ['ResNetForImageClassification'],
            'timm_architecture': architecture,
            'id2label': {str(i): name for i, name in enumerate(label_names)},
            'label2id': {name: i for i, name in enumerate(label_names)},
        },
    )
    data = ModelCardData(
        **(license or License()).metadata(),
        library_name='transformers.js',
        pipeline_tag='image-classification',
        tags=['onnx', 'image-classification', 'timm', 'timm_dfpt'],
        base_model=base_model,
        base_model_relation='quantized',
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        title=repo_id.split('/')[-1],
        repo_id=repo_id,
        base_model=base_model,
        architecture=public(architecture),
        table=exports_table(rows) if rows else '',
        grey=data_config['input_size'][0] == 1,
        side=' x '.join(map(str, data_config['input_size'][1:])),
        version=__version__,
    )
    card.save(folder / 'README.md')
