"""Weights of an ONNX graph stored in fewer bytes. The graph widens them again: it computes in float32."""

import math

import numpy as np

STORED_AS = ("float32", "float16", "int8")
# Smaller ones (biases, norms) cost little and count most.
LEAST_ELEMENTS = 1024
# Of each operator: which inputs are weights, and the axis of a weight's output channels.
_WEIGHTS = {
    "Conv": ((1,), 0),
    "ConvTranspose": ((1,), 1),
    "MatMul": ((1,), -1),
    "LSTM": ((1, 2), 1),
}


def store_as(model, weights: str) -> None:
    """Store the large weights of an ONNX model in another type, in place.

    Codebook and whitening stay as they are: other vectors would be other codes.

    Args:
        model: onnx.ModelProto.
        weights: "float32" leaves them alone; "float16" rounds each weight; "int8" rounds each to one of the 255
            multiples, from -127 to 127, of a step of its output channel.

    Raises:
        ValueError: if the type is another.
    """
    if weights not in STORED_AS:
        raise ValueError(f"weights must be one of {', '.join(STORED_AS)}, got {weights!r}")
    if weights == "float32":
        return
    from onnx import helper, numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    widening = []
    for name, axis in _large_weights(model.graph, stored).items():
        values = numpy_helper.to_array(stored[name])
        if weights == "float16":
            parts = {f"{name}.float16": values.astype(np.float16)}
            node = helper.make_node("Cast", list(parts), [name], to=1)  # 1: float32
        else:
            parts = dict(
                zip((f"{name}.int8", f"{name}.steps"), _rounded(values, axis), strict=True)
            )
            node = helper.make_node("DequantizeLinear", list(parts), [name], axis=axis)
        widening.append(node)
        model.graph.initializer.remove(stored[name])
        model.graph.initializer.extend(
            numpy_helper.from_array(part, part_name) for part_name, part in parts.items()
        )
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(widening + nodes)


def _large_weights(graph, stored: dict) -> dict[str, int]:
    """Return the names of the weights that are worth it, with the axis of their channels."""
    found = {}
    for node in graph.node:
        inputs, axis = _WEIGHTS.get(node.op_type, ((), 0))
        where = {entry.key: entry.value for entry in node.metadata_props}.get("namespace", "")
        if "quantizer" in where or "whitening" in where:
            continue
        for name in (node.input[i] for i in inputs):
            tensor = stored.get(name)
            if tensor is not None and math.prod(tensor.dims) >= LEAST_ELEMENTS:
                found[name] = axis % len(tensor.dims)
    return found


def _rounded(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return whole numbers from -127 to 127, and the step (channels,) of each channel."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    steps = np.abs(values).max(axis=others) / 127
    steps = np.where(steps > 0, steps, 1).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    return np.rint(values / steps.reshape(shape)).astype(np.int8), steps
