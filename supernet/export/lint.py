"""What a written file costs beyond what it must: bytes over the ideal ones; nodes that compute in float, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import onnx
import onnxruntime

from supernet.export.graph import Deployed, Op
from supernet.export.operators import Layer, Pointwise
from supernet.export.runtime import INTEGER, NEUTRAL

Kernels = Iterable[tuple[str, str]]


def ideal_bytes(layers: Iterable[Layer], stored: Mapping[str, int]) -> int:
    """Bytes that no file with these containers can go below: weight codes, scales, zero-points, biases, nothing else.

    Scales take 4 bytes, biases 4, zero-points as many bits as the weights. Grids of activations and the graph itself
    do not count.

    Args:
        layers: of the deployed network.
        stored: bits of the container of each layer's weight, by name.
    """
    total = 0
    for layer in layers:
        bits, scales = stored[layer.name], len(layer.scale)
        total += math.ceil(layer.codes.numel() * bits / 8) + math.ceil(scales * bits / 8) + 4 * scales
        total += 0 if layer.bias is None else 4 * len(layer.bias)
    return total


def without_metadata(model: onnx.ModelProto) -> int:
    """Bytes of a model less its metadata, which a user may strip."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    bare.ClearField("metadata_props")
    return bare.ByteSize()


def floating(kernels: Kernels, deployed: Deployed, stored: Mapping[str, int]) -> list[dict[str, str]]:
    """`node`, `kernel` and `why` of each node that computes in float.

    Args:
        kernels: (kind, name) of the nodes that run, see `runtime.session`.
        deployed: the network that the file holds.
        stored: bits of the container of each layer's weight, by name.
    """
    operators = {op.name: op for op in deployed.operators()}
    rows = []
    for kind, name in kernels:
        if kind not in INTEGER and kind not in NEUTRAL:
            op = _operator(name, operators)
            rows.append({"node": op.name if op else name, "kernel": kind, "why": _why(kind, op, deployed, stored)})
    return rows


def _operator(node: str, operators: Mapping[str, Op]) -> Op | None:
    """The operator that a node was written for: runtimes add to names, but keep their beginnings."""
    name = node
    while name not in operators:
        cut = max(name.rfind("."), name.rfind("_"), name.rfind("/"))
        if cut < 1:
            return None
        name = name[:cut]
    return operators[name]


def _why(kind: str, op: Op | None, deployed: Deployed, stored: Mapping[str, int]) -> str:
    if op is None:
        return "a node of the runtime's own"
    real = [name for name in op.inputs if deployed.grids[name] is None]
    if isinstance(op, Layer) and stored[op.name] < 8:
        return f"its weights, in {stored[op.name]} bits for size, are dequantized for a float kernel"
    if isinstance(op, Pointwise):
        return f"{op.function} is computed on real numbers, by the reference too"
    if real:
        return f"its input {real[0]} holds real numbers: no site quantizes it"
    if op.grid is None:
        return "its output holds real numbers: no site quantizes it"
    return f"onnxruntime {onnxruntime.__version__} has no integer kernel for it in this place"
