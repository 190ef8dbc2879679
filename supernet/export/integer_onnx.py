"""Writes an integer network as an ONNX file of integer operators only, which onnxruntime runs to the same integers.

The input is the real image; the one node that reads it is QuantizeLinear. The output is int32. A rescaling is

| node     | type            | what                                                                               |
|----------|-----------------|------------------------------------------------------------------------------------|
| Cast     | int32 -> int64  | total                                                                              |
| Mul      | int64           | total b; left out where b is 1                                                     |
| Add      | int64           | + half + (zero << c): rounding and the output's zero-point in one constant         |
| Max      | int64           | 0: what is below code 0 comes out as the lowest code in any case                   |
| Cast     | int64 -> uint64 | ONNX shifts unsigned integers only                                                 |
| BitShift | uint64          | >> c                                                                               |
| Clip     | uint64          | the grid's bounds                                                                  |
| Cast     | -> uint8        |                                                                                    |

Where the result may be negative (a side of a sum, logits) a multiple of 2^c is added before the shift, and its quotient
taken off behind it. Weights are kept in uint8 with a zero-point: onnxruntime's kernel for signed weights is many times
slower, and adds pairs of products in an int16 on processors without VNNI instructions, which may saturate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from supernet.export.dyadic import Dyadic
from supernet.export.graph import Grid, Op
from supernet.export.integer import IntegerNetwork
from supernet.export.integer_operators import (
    WIDE,
    Entrance,
    IntegerAdd,
    IntegerConcat,
    IntegerLayer,
    IntegerMean,
    IntegerOp,
    IntegerPool,
    IntegerProduct,
    Rescale,
    Table,
)
from supernet.export.onnx import Writer, emit
from supernet.export.operators import Conv

Array = NDArray[Any]

LIFT = 62
"""2^62 lifts every product of a 32-bit total and b above zero, and leaves it within a uint64."""

WRAP = 16
"""A side of a sum is lifted by 2^16 steps: the cast to int16 drops the 17th bit, and the lift with it."""


def write_integer(network: IntegerNetwork, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """The model of an integer network; `elastibit.logit_scale` in its metadata turns its logits into real numbers."""
    return _Writer(network).model({"elastibit.logit_scale": repr(network.scale)} | dict(metadata or {}))


def real_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that read or write real numbers."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in graph.initializer}
    real = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    return [
        f"{node.name or node.output[0]} ({node.op_type})"
        for node in graph.node
        if any(types.get(name, TensorProto.FLOAT) in real for name in (*node.input, *node.output) if name)
    ]


class _Writer(Writer):
    """The writer of QDQ files with other operators."""

    answer = TensorProto.INT32

    def __init__(self, network: IntegerNetwork) -> None:
        super().__init__(network, (8,))

    def output(self) -> str:
        """The last tensor in int32, without zero-point."""
        name = self.deployed.result
        grid = self.code(name)
        if grid.bits == WIDE:
            return self.node("Identity", [name], self.output_name)
        codes = self.cast(name, "int32", f"{name}.total")
        return self.node("Sub", [codes, self.constant(f"{name}.off", grid.zero, np.int32)], self.output_name)

    # -- parts ---------------------------------------------------------------------------------------------------------
    def code(self, name: str) -> Grid:
        """The grid of a tensor."""
        grid = self.deployed.grids[name]
        assert grid is not None
        return grid

    def cast(self, name: str, dtype: str, output: str) -> str:
        """A tensor in another integer type."""
        return self.node("Cast", [name], output, to=int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))))

    def rescale(self, name: str, total: str, factor: Dyadic, grid: Grid, zero: int = 0) -> str:
        """The tensor `name`: totals, which are `zero` too large, put onto a grid."""
        long = self.cast(total, "int64", f"{name}.long")
        if grid.bits == WIDE:
            return self.wide(name, long, factor, zero)
        factor = factor.reduced()
        constant = factor.half + (grid.zero << factor.c) - zero * factor.b
        shifted = self.shift(name, long, factor, constant)
        bounds = [self.constant(f"{name}.{at}", getattr(grid, at), np.uint64) for at in ("low", "high")]
        return self.cast(self.node("Clip", [shifted, *bounds], f"{name}.clipped"), "uint8", name)

    def shift(self, at: str, long: str, factor: Dyadic, constant: Tensor, positive: bool = False) -> str:
        """max(long b + constant, 0) >> c, in uint64; `positive`: it cannot be below 0."""
        if not bool((factor.b == 1).all()):
            long = self.node("Mul", [long, self.constant(f"{at}.b", factor.b, np.int64)], f"{at}.product")
        raised = self.node("Add", [long, self.constant(f"{at}.constant", constant, np.int64)], f"{at}.raised")
        if not positive:
            raised = self.node("Max", [raised, self.constant("nought", 0, np.int64)], f"{at}.positive")
        unsigned = self.cast(raised, "uint64", f"{at}.unsigned")
        amount = self.constant(f"{at}.c", factor.c, np.uint64)
        return self.node("BitShift", [unsigned, amount], f"{at}.shifted", direction="RIGHT")

    def wide(self, name: str, long: str, factor: Dyadic, zero: int) -> str:
        """The tensor `name`: totals rescaled to int32 of either sign."""
        constant = factor.half - zero * factor.b + (1 << LIFT)
        shifted = self.cast(self.shift(name, long, factor, constant, positive=True), "int64", f"{name}.lifted")
        lift = self.constant(f"{name}.lift", (1 << LIFT) >> factor.c, np.int64)
        return self.cast(self.node("Sub", [shifted, lift], f"{name}.signed"), "int32", name)

    def side(self, op: Op, position: int, factor: Dyadic) -> str:
        """One input of a sum in int16."""
        name, at = op.inputs[position], f"{op.name}.side{position}"
        constant = factor.half - self.code(name).zero * factor.b + (1 << WRAP << factor.c)
        long = self.cast(name, "int64", f"{at}.long")
        return self.cast(self.shift(at, long, factor, constant, positive=True), "int16", at)

    def give(self, op: IntegerOp, total: str, zero: int = 0) -> str:
        """The operator's output: totals rescaled, or in int32 as they are."""
        if op.factor is not None:
            return self.rescale(op.name, total, op.factor, self.code(op.name), zero)
        if zero:
            total = self.node("Sub", [total, self.constant(f"{op.name}.off", zero, np.int32)], f"{op.name}.centred")
        return self.node("Identity", [total], op.name)

    def weights(self, op: IntegerLayer) -> list[tuple[Array, int]]:
        """Weights in uint8 with one zero-point; two tensors, to be added, where 256 values do not hold them."""
        weight = op.weight.numpy().astype(np.int64)
        low, high = int(weight.min()), int(weight.max())
        if low >= -128 and high <= 127:
            return [(weight + 128, 128)]
        if high - low <= 255 and low <= 0:
            return [(weight - low, -low)]
        near = np.clip(weight, -128, 127)
        return [(near + 128, 128), (weight - near + 128, 128)]


# -- one function for each operator ------------------------------------------------------------------------------------
@emit.register
def _(op: Entrance, to: _Writer) -> None:
    to.quantize(op, op.inputs[0])


@emit.register
def _(op: Rescale, to: _Writer) -> None:
    to.give(op, op.inputs[0], to.code(op.inputs[0]).zero)


@emit.register
def _(op: IntegerLayer, to: _Writer) -> None:
    name, layer = op.inputs[0], op.layer
    zero = to.constant(f"{name}.zero", to.code(name).zero, np.uint8)
    sums = []
    for i, (weight, offset) in enumerate(to.weights(op)):
        kernel = weight if isinstance(layer, Conv) else weight.T
        parts = [
            to.constant(f"{op.name}.weight{i}", np.ascontiguousarray(kernel), np.uint8),
            zero,
            to.constant(f"{op.name}.weight{i}.zero", offset, np.uint8),
        ]
        if isinstance(layer, Conv):
            shape = {"strides": layer.stride, "pads": layer.padding, "dilations": layer.dilation, "group": layer.groups}
            sums.append(to.node("ConvInteger", [name, *parts], f"{op.name}.sum{i}", **shape))
        else:
            sums.append(to.node("MatMulInteger", [name, *parts], f"{op.name}.sum{i}"))
    total = sums[0] if len(sums) == 1 else to.node("Add", sums, f"{op.name}.sum")
    if op.bias is not None:
        bias = op.bias.numpy().reshape(-1, *[1] * (op.weight.dim() - 2))
        total = to.node("Add", [total, to.constant(f"{op.name}.bias", bias, np.int32)], f"{op.name}.total")
    to.give(op, total)


@emit.register
def _(op: IntegerAdd, to: _Writer) -> None:
    sides = [to.side(op, i, factor) for i, factor in enumerate(op.branches)]
    total = to.node("Add", sides, f"{op.name}.sum")
    to.give(op, total if op.factor is not None else to.cast(total, "int32", f"{op.name}.total"))


@emit.register
def _(op: IntegerConcat, to: _Writer) -> None:
    grid, parts = to.code(op.name), []
    for i, (name, factor) in enumerate(zip(op.inputs, op.branches, strict=True)):
        parts.append(to.rescale(f"{op.name}.part{i}", name, factor, grid, to.code(name).zero))
    to.node("Concat", parts, op.name, axis=op.axis)


@emit.register
def _(op: IntegerProduct, to: _Writer) -> None:
    sides = []
    for i, name in enumerate(op.inputs):
        codes = to.cast(name, "int32", f"{op.name}.side{i}")
        off = to.constant(f"{op.name}.side{i}.off", to.code(name).zero, np.int32)
        sides.append(to.node("Sub", [codes, off], f"{op.name}.side{i}.centred"))
    to.give(op, to.node("Mul", sides, f"{op.name}.total"))


@emit.register
def _(op: IntegerMean, to: _Writer) -> None:
    name = op.inputs[0]
    axes = to.constant("height and width", [2, 3], np.int64)
    total = to.node("ReduceSum", [to.cast(name, "int32", f"{op.name}.codes"), axes], f"{op.name}.total", keepdims=1)
    to.give(op, total, to.code(name).zero * op.pixels)


@emit.register
def _(op: IntegerPool, to: _Writer) -> None:
    name = op.inputs[0]
    channels = op.channels
    ones = to.constant(f"{op.name}.ones", np.ones((channels, 1, *op.kernel)), np.uint8)
    zero = to.constant(f"{name}.zero", to.code(name).zero, np.uint8)
    about = {"strides": op.stride, "pads": op.padding, "group": channels}
    to.give(op, to.node("ConvInteger", [name, ones, zero], f"{op.name}.total", **about))


@emit.register
def _(op: Table, to: _Writer) -> None:
    table = to.constant(f"{op.name}.table", op.table.numpy(), np.uint8)
    to.node("Gather", [table, to.cast(op.inputs[0], "int32", f"{op.name}.index")], op.name)
