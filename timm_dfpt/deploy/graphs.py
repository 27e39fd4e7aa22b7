"""ONNX graphs for pipelines that know RGB images in float32 only."""
from __future__ import annotations

import json
from typing import Any

import numpy as np

from .programs import INPUT

__all__ = ['takes_rgb']

# Shares of red, green and blue in a grey image (ITU-R 601-2) in parts of 65536, as Pillow computes it.
_LUMINANCE = (19595, 38470, 7471)


def takes_rgb(model: Any) -> Any:
    """Return a model whose input is RGB in float32, `[B, 3, H, W]`, as transformers.js prepares images.

    One that takes normalised RGB stays as it is. One of grey images gets their luminance, to the bit as Pillow computes
    it, and one that takes pixels gets pixels; both from values in 0..1, which are not normalised yet.

    Args:
        model: `onnx.ModelProto` of `timm_dfpt.deploy.onnx_files`.
    """
    from onnx import TensorProto, helper, numpy_helper  # of the extra `onnx`

    facts = {entry.key: entry.value for entry in model.metadata_props}
    channels, height, width = json.loads(facts['input_size'])
    pixels = facts['preprocessing'] == 'included'
    if channels == 3 and not pixels:
        return model
    adapted = type(model)()
    adapted.CopyFrom(model)
    graph, inner = adapted.graph, f'{INPUT}_of_student'
    for node in graph.node:
        node.input[:] = [inner if name == INPUT else name for name in node.input]
    nodes: list[Any] = []
    tensors: dict[str, np.ndarray] = {}
    name = INPUT

    def add(kind: str, *constants: np.ndarray, **attributes: Any) -> None:
        nonlocal name
        names = [f'front_{len(nodes)}_{i}' for i in range(len(constants))]
        tensors.update(zip(names, constants, strict=True))
        output = f'front_{len(nodes)}'
        nodes.append(helper.make_node(kind, [name, *names], [output], name=output, **attributes))
        name = output

    add('Mul', np.array(255, np.float32))
    add('Round')
    if channels == 1:
        # Whole numbers below 2**24, which float32 has exactly.
        add('Mul', np.array(_LUMINANCE, np.float32).reshape(1, 3, 1, 1))
        add('ReduceSum', np.array([1], np.int64), keepdims=1)
        add('Add', np.array(2**15, np.float32))
        add('Mul', np.array(2**-16, np.float32))
        add('Floor')
    if pixels:
        add('Cast', to=TensorProto.UINT8)
    else:
        add('Div', np.array(255, np.float32))
        add('Sub', np.array(json.loads(facts['mean']), np.float32).reshape(1, -1, 1, 1))
        add('Div', np.array(json.loads(facts['std']), np.float32).reshape(1, -1, 1, 1))
    nodes[-1].output[0] = inner
    kept = list(graph.node)
    del graph.node[:], graph.input[:]
    graph.node.extend([*nodes, *kept])
    graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in tensors.items())
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ['batch', 3, height, width]))
    return adapted
