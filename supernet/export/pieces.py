"""What a written network is made of, cut apart: each operator a model of its own, named by what decides its speed.

The key of a piece is the piece itself without its values: kinds of nodes, attributes, types and shapes, and whether
zero-points of 8-bit weights are 0, which is a faster kernel. So it needs no
list of operators; two layers of one shape have one key, and another container of the weights has another. The clamp of
codes that have fewer than 8 bits is a piece for itself: it runs as a kernel for itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from supernet.export.graph import Deployed
from supernet.export.operators import Layer
from supernet.export.runtime import Parts


@dataclass(frozen=True)
class Piece:
    """One operator of a network, or the clamp behind it.

    Attributes:
        key: what decides its speed, as text.
        name: of the operator.
        owner: what it belongs to in every subnet that has it: the path of a layer or of a quantizer, "" for others.
        clamp: whether it is the clamp behind the operator.
        model: the piece as a model of its own.
    """

    key: str
    name: str
    owner: str
    clamp: bool
    model: onnx.ModelProto = field(repr=False, compare=False)


def pieces(deployed: Deployed, model: onnx.ModelProto) -> list[Piece]:
    """The pieces of a written network, in order of execution.

    Args:
        deployed: the network.
        model: its file.
    """
    parts, made = Parts(model), {name for node in model.graph.node for name in node.output}
    found = []

    def cut(name: str, owner: str, inputs: list[str], output: str, clamp: bool = False) -> None:
        part = parts.cut(inputs, output)
        found.append(Piece(key(part), name, owner, clamp, part))

    for op in deployed.operators():
        owner = op.name if isinstance(op, Layer) else op.site or ""
        if f"{op.name}.codes" in made:
            cut(op.name, owner, list(op.inputs), f"{op.name}.codes")
            cut(op.name, op.site or "", [f"{op.name}.codes"], op.name, clamp=True)
        else:
            cut(op.name, owner, list(op.inputs), op.name)
    cut("output", "", [deployed.result], model.graph.output[0].name)
    return found


def key(model: onnx.ModelProto) -> str:
    """`uint8[16,32,32] -> DequantizeLinear(...), ...`; of values only shapes (int64) and zero-points that are 0."""
    constants = {t.name: _constant(t) for t in model.graph.initializer}
    read = ", ".join(
        _typed(v.type.tensor_type.elem_type, [d.dim_value for d in v.type.tensor_type.shape.dim][1:])
        for v in model.graph.input
    )
    nodes = []
    for node in model.graph.node:
        options = [f"{a.name}={_plain(helper.get_attribute_value(a))}" for a in node.attribute]
        inputs = [constants[name] for name in node.input if name in constants]
        nodes.append(f"{node.op_type}({', '.join([*inputs, *sorted(options)])})")
    return f"{read} -> {', '.join(nodes)}"


def _constant(tensor: onnx.TensorProto) -> str:
    if tensor.data_type == TensorProto.INT64:
        return str(numpy_helper.to_array(tensor).tolist()).replace(" ", "")
    typed = _typed(tensor.data_type, list(tensor.dims))
    if tensor.data_type == TensorProto.INT8 and len(tensor.dims) < 2:
        return typed if any(tensor.raw_data) else f"{typed}=0"
    return typed


def _typed(kind: int, dims: list[int]) -> str:
    return f"{TensorProto.DataType.Name(kind).lower()}[{','.join(map(str, dims))}]"


def _plain(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode()
    return str(np.asarray(value).tolist()).replace(" ", "")
