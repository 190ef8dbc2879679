"""ONNX forms of the operators of transformers; `supernet.export.onnx` takes them up.

A linear layer on tokens is a Gemm between two Reshapes: Reshape is free, and onnxruntime's integer Gemm takes the bias
and keeps its weight packed, which its integer MatMul does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from supernet.export.operators import Linear
from supernet.export.operators_tokens import LayerNorm, Mean, Product, Scale, Shift, Softmax, Transpose

if TYPE_CHECKING:
    from supernet.export.onnx import Writer


def linear(op: Linear, to: Writer) -> None:
    """On tokens [n, *lead, c]: all tokens of all images as the rows of one matrix."""
    rows, inputs = copy.copy(op), op.codes.shape[1]
    rows.name = f"{op.name}.rows"
    flat = to.constant(f"{op.name}.flat", [-1, inputs], np.int64)
    source = to.node("Reshape", [op.inputs[0], flat], f"{op.name}.tokens")
    to.finish(rows, "Gemm", to.layer(op, source), transB=1)
    shape = to.constant(f"{op.name}.shape", [-1, *op.lead, len(op.codes)], np.int64)
    to.node("Reshape", [rows.name, shape], op.name)


def _product(op: Product, to: Writer) -> None:
    if not to.quantized:
        if op.factor == 1.0:
            to.finish(op, "MatMul", op.inputs)
        else:
            product = to.node("MatMul", op.inputs, f"{op.name}.product")
            to.finish(op, "Mul", [product, to.constant(f"{op.name}.factor", op.factor, np.float32)])
        return
    left = to.deployed.grids[op.inputs[0]]
    assert left is not None
    scale = to.constant(f"{op.name}.scale.left", op.left_scale(left).numpy(), np.float32)
    zero = to.constant(f"{op.inputs[0]}.zero", left.zero, np.uint8)
    value = to.node("DequantizeLinear", [op.inputs[0], scale, zero], f"{op.name}.left")
    to.finish(op, "MatMul", [value, to.read(op.inputs[1])])


def _layer_norm(op: LayerNorm, to: Writer) -> None:
    parts = {"gain": op.gain, "offset": op.offset}
    constants = [to.constant(f"{op.name}.{name}", value.cpu().numpy(), np.float32) for name, value in parts.items()]
    to.finish(op, "LayerNormalization", [to.read(op.inputs[0]), *constants], axis=-op.gain.dim(), epsilon=float(op.eps))


def _constant(kind: str) -> Callable[[Any, Writer], None]:
    def write(op: Shift | Scale, to: Writer) -> None:
        constant = to.constant(f"{op.name}.constant", op.constant.cpu().numpy(), np.float32)
        to.finish(op, kind, [to.read(op.inputs[0]), constant])

    return write


def _mean(op: Mean, to: Writer) -> None:
    axes = to.constant(f"{op.name}.axes", op.axes, np.int64)
    to.finish(op, "ReduceMean", [to.read(op.inputs[0]), axes], keepdims=int(op.keep))


FORMS: dict[type[Any], Callable[[Any, Writer], Any]] = {
    Product: _product,
    LayerNorm: _layer_norm,
    Softmax: lambda op, to: to.finish(op, "Softmax", [to.read(op.inputs[0])], axis=op.axis),
    Shift: _constant("Add"),
    Scale: _constant("Mul"),
    Mean: _mean,
    Transpose: lambda op, to: to.move(op, "Transpose", perm=op.order),
}
