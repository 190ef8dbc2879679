"""What a file of integer weights must hold, and what it holds beside that."""

from __future__ import annotations

import math

import onnx
from onnx import TensorProto

BITS = {TensorProto.INT8: 8, TensorProto.UINT8: 8, TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT32: 32}
BITS |= {getattr(TensorProto, name): 2 for name in ("INT2", "UINT2") if hasattr(TensorProto, name)}


def ideal(model: onnx.ModelProto) -> int:
    """Bytes of all integer weights and biases in their containers, packed, and of their scales (4 bytes each)."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    held: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            codes, scale = (constants[name] for name in node.input[:2])
            held[codes.name] = math.ceil(math.prod(codes.dims) * BITS[codes.data_type] / 8)
            held[scale.name] = 4 * math.prod(scale.dims)
    return sum(held.values())


def bare(model: onnx.ModelProto) -> int:
    """Bytes of the file without its metadata."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.metadata_props[:]
    return int(copy.ByteSize())
