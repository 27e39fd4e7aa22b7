"""Students as ONNX files: float32 from torch's own exporter, float16 and int8 with onnxruntime's tools."""
from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..hub.files import atomic
from .inputs import describe_input, to_pixels
from .programs import INPUT, prepared, resolved_config

__all__ = [
    'EXTRA', 'OUTPUT', 'Precision', 'export_onnx', 'missing_packages', 'open_session', 'to_float16', 'to_int8',
    'to_onnx', 'write_onnx',
]  # fmt: skip

Precision = Literal['float32', 'float16', 'int8']

EXTRA = "pip install 'timm_dfpt[onnx]'"
"""What installs everything that exports to ONNX need."""
OUTPUT = 'logits'
_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
# What is quantized, the more the faster; the best on images that were not calibrated with is taken.
_HEAVY = ('Conv', 'Gemm', 'MatMul')


def export_onnx(
    student: nn.Module,
    path: str | os.PathLike[str],
    *,
    precision: Precision = 'float32',
    calibration: torch.Tensor | None = None,
    data_config: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    include_preprocessing: bool = False,
) -> Path:
    """Write a student as an ONNX file of any number of images: input `pixel_values`, output `logits` `[B, K]`.

    It is exported in the form that is deployed (`timm.utils.reparameterize_model`). How images are prepared and the
    names of the classes are in its metadata.

    Args:
        student: Classifier made by `timm.create_model`.
        path: The file, `.onnx`.
        precision: `'float32'`, `'float16'` (input and output stay float32) or `'int8'` (weights per channel, and
            activations with static ranges).
        calibration: For int8, some hundred training images `[N, C, H, W]`, prepared as for evaluation.
        data_config: How images are prepared, as `timm.data.resolve_data_config` returns it. Default: the model's.
        class_names: Names of the classes. Default: those of the model's `pretrained_cfg`.
        include_preprocessing: Normalise in the graph: the input is then pixels, uint8 RGB (or grey) `[B, C, H, W]`,
            resized and cropped.

    Returns:
        The file.

    Raises:
        ImportError: If packages of the extra `onnx` are missing.
        ValueError: If `precision` is unknown, or int8 lacks images to calibrate with.

    Example:
        >>> timm_dfpt.export_onnx(student, 'student.onnx')
    """
    if precision not in ('float32', 'float16', 'int8'):
        raise ValueError(f"precision must be 'float32', 'float16' or 'int8', got {precision!r}.")
    if precision == 'int8' and (calibration is None or not len(calibration)):
        raise ValueError('precision=int8 needs calibration=: a few hundred training images [N, C, H, W], normalized.')
    missing = missing_packages()
    if missing:
        raise ImportError(f'Exporting to ONNX needs {", ".join(missing)}: {EXTRA}')
    config = resolved_config(student, data_config)
    if class_names is None:
        class_names = getattr(student, 'pretrained_cfg', {}).get('label_names')
    model = to_onnx(student, config, class_names, include_preprocessing)
    if precision == 'float16':
        model = to_float16(model)
    elif calibration is not None and precision == 'int8':
        images = to_pixels(calibration, config) if include_preprocessing else calibration.float().numpy()
        model = to_int8(model, images)
    write_onnx(model, Path(path))
    return Path(path)


def missing_packages() -> list[str]:
    """Return the packages of the extra `onnx` that are not installed."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def to_onnx(
    student: nn.Module, data_config: Mapping[str, Any], class_names: Sequence[str] | None, include_preprocessing: bool
) -> Any:
    """Return a student as an `onnx.ModelProto` in float32, of any number of images.

    Args:
        student: See `export_onnx`.
        data_config: See `export_onnx`.
        class_names: See `export_onnx`.
        include_preprocessing: See `export_onnx`.
    """
    module, example, dynamic = prepared(student, data_config, include_preprocessing)
    with _quietly():
        program = torch.onnx.export(
            module, example, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=dynamic,
            verbose=False,
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    # Source lines of the exporting machine.
    for node in model.graph.node:
        del node.metadata_props[:]
    model.producer_name, model.doc_string = 'timm_dfpt', ''
    _describe(model, describe_input(data_config, class_names, include_preprocessing))
    return model


def _describe(model: Any, facts: Mapping[str, str]) -> None:
    for key, value in facts.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value


def to_float16(model: Any) -> Any:
    """Return a model with weights and arithmetic in float16; its input and output stay as they are."""
    from onnxruntime.transformers.float16 import convert_float_to_float16  # of the extra `onnx`
    from onnxruntime.transformers.onnx_model import OnnxModel

    copied = type(model)()
    copied.CopyFrom(model)
    with _quietly():
        converted = convert_float_to_float16(copied, keep_io_types=True)
        # It appends the casts of the input, and ONNX wants nodes in the order in which they run.
        OnnxModel.graph_topological_sort(converted.graph)
    return converted


def to_int8(model: Any, images: np.ndarray) -> Any:
    """Return a model in int8: weights per channel, activations in ranges seen on images.

    Half of the images set the ranges. Of several choices of what is quantized the one is taken that agrees best with
    float32 on the other half; the metadata (`quantized`) names it. Weights have 7 bits, which processors without
    8-bit dot products (VNNI) multiply without overflow, too.

    Args:
        model: The model in float32.
        images: Its input, `[N, C, H, W]`.
    """
    ranges, held_out = images[::2], images[1::2] if len(images) > 1 else images
    expected = _run(model.SerializeToString(), held_out)
    best: tuple[tuple[float, float], Any, str] | None = None
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, 'prepared.onnx')
        # A path: what is given a model keeps its weights elsewhere, and changes the model.
        source.write_bytes(model.SerializeToString())
        _fold(source)
        for name, options in _choices(source).items():
            target = Path(temporary, 'quantized.onnx')
            _quantize(source, target, ranges, options)
            logits = _run(target.read_bytes(), held_out)
            agreement = float((logits.argmax(1) == expected.argmax(1)).mean())
            score = (agreement, -float(np.square(logits - expected).mean()))
            if best is None or score > best[0]:
                best = score, target.read_bytes(), name
    assert best is not None
    quantized = type(model)()
    quantized.ParseFromString(best[1])
    quantized.producer_name = model.producer_name
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(model.metadata_props)
    _describe(quantized, {'quantized': best[2], 'calibration_images': str(len(images))})
    return quantized


def _fold(path: Path) -> None:
    """Make the shapes in a file known, and fold BatchNorm into convolutions, both of which quantization needs."""
    import onnx  # of the extra `onnx`
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with _quietly():
        quant_pre_process(str(path), str(path), skip_symbolic_shape=True)
    model = onnx.load(path)
    for i, node in enumerate(model.graph.node):
        # Quantization excludes nodes by name, and those that were folded have none.
        node.name = node.name or f'{node.op_type}_{i}'
    path.write_bytes(model.SerializeToString())


def _choices(path: Path) -> dict[str, dict[str, Any]]:
    """Return options of quantization by what they quantize."""
    import onnx  # of the extra `onnx`

    nodes = onnx.load(path).graph.node
    heavy = [node for node in nodes if node.op_type in _HEAVY]
    names = ', '.join(sorted({node.op_type for node in heavy}))
    choices: dict[str, dict[str, Any]] = {
        'all operators': {},
        f'{names} only': {'op_types_to_quantize': list(_HEAVY)},
    }
    if len(heavy) > 2:
        ends = [heavy[0].name, heavy[-1].name]
        choices[f'{names} only, but not the first and last'] = {
            'op_types_to_quantize': list(_HEAVY), 'nodes_to_exclude': ends
        }  # fmt: skip
    return choices


def _quantize(source: Path, target: Path, images: np.ndarray, options: Mapping[str, Any]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static  # of the extra `onnx`

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(np.array_split(images, -(-len(images) // 16)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    with _quietly():
        quantize_static(
            source, target, Images(), per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, **options,
        )  # fmt: skip


def open_session(model: bytes | str, threads: int | None = None) -> Any:
    """Open a model in onnxruntime, on the CPU.

    Args:
        model: The model, or the path of its file.
        threads: Threads of an operator; by default as many as torch uses.
    """
    import onnxruntime  # of the extra `onnx`

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])


def _run(model: bytes, images: np.ndarray) -> np.ndarray:
    session = open_session(model)
    batches = np.array_split(images, -(-len(images) // 16))
    return np.concatenate([session.run([OUTPUT], {INPUT: batch})[0] for batch in batches])


def write_onnx(model: Any, path: Path) -> None:
    """Write a model to one file, whole or not at all.

    Raises:
        OSError: If it cannot be written.
        ValueError: If it is not valid, or larger than the 2 GB that a file can have.
    """
    import onnx  # of the extra `onnx`

    if model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise ValueError(
            f'{path.name} would have {model.ByteSize():,} bytes, and one ONNX file can have at most 2 GB: choose a '
            'smaller student, or export to pt2.'
        )
    onnx.checker.check_model(model)
    with atomic(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what the exporters print of their progress, and warn of within themselves, from the user."""
    loggers = [logging.getLogger(name) for name in ('', 'onnxscript', 'onnx_ir', 'torch.onnx')]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
