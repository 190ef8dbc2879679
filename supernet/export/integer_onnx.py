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
from supernet.export.graph import Grid
from supernet.export.integer import RESIDUAL_BITS, IntegerNetwork
from supernet.export.integer_operators import (
    WIDE,
    Entrance,
    IntegerAdd,
    IntegerConcat,
    IntegerLayer,
    IntegerMean,
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

SHORT = 22
"""Largest shift of an int16 that an int32 has room for, with a zero-point in front."""


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
        codes = self.cast(name, "int32", f"{name}.answer")
        return self.node("Sub", [codes, self.constant(f"{name}.answer.off", grid.zero, np.int32)], self.output_name)

    # -- parts ---------------------------------------------------------------------------------------------------------
    def code(self, name: str) -> Grid:
        """The grid of a tensor."""
        grid = self.deployed.grids[name]
        assert grid is not None
        return grid

    def cast(self, value: str, dtype: str, output: str) -> str:
        """A tensor in another integer type."""
        return self.node("Cast", [value], output, to=int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))))

    def add(self, name: str, value: str, off: Any) -> str:
        """An int32 tensor and a constant; the tensor itself where that is 0."""
        if not np.any(off):
            return value
        return self.node("Add", [value, self.constant(f"{name}.off", off, np.int32)], name)

    def rescale(self, name: str, total: str, factor: Dyadic | None, most: int, off: Any = 0) -> str:
        """The tensor `name` from int32 totals, at most `most`, that lack `off`; without a factor it is the totals."""
        if factor is None:
            return self.node("Identity", [self.add(f"{name}.total", total, off)], name)
        grid, factor = self.code(name), factor.reduced()
        if grid.bits == WIDE:
            return self.broad(name, self.add(f"{name}.total", total, off), factor)
        span = limits(factor, grid, most)
        if span is None:
            return self.clamped(name, self.add(f"{name}.total", total, off), factor, grid)
        first, last = (end.numpy() for end in span)
        raised = self.add(f"{name}.raised", total, off - first)
        inside = self.node("Max", [raised, self.constant("nought", 0, np.int32)], f"{name}.positive")
        inside = self.node("Min", [inside, self.constant(f"{name}.width", last - first, np.int32)], f"{name}.inside")
        return self.shift(name, inside, factor, span[0] * factor.b + (grid.zero << factor.c), "uint8")

    def rescale_codes(self, name: str, source: str, factor: Dyadic, grid: Grid) -> str:
        """The tensor `name` on a grid, from codes of another one."""
        zero, factor = self.code(source).zero, factor.reduced()
        span = limits(factor, grid, 255)
        if grid.bits == WIDE or span is None:
            total = self.add(f"{name}.total", self.cast(source, "int32", f"{name}.codes"), -zero)
            wide = grid.bits == WIDE
            return self.broad(name, total, factor) if wide else self.clamped(name, total, factor, grid)
        first, last = (min(max(int(end) + zero, 0), 255) for end in span)
        if (first, last) != (0, 255):
            ends = [self.constant(f"{name}.{at}", end, np.uint8) for at, end in (("first", first), ("last", last))]
            source = self.node("Clip", [source, *ends], f"{name}.inside")
        return self.shift(name, source, factor, (grid.zero << factor.c) - zero * factor.b, "uint8")

    def rescale_sum(self, name: str, total: str, factor: Dyadic) -> str:
        """The tensor `name` from sums of int16; where the factor is a power of two, one shift of an int32."""
        grid, factor = self.code(name), factor.reduced()
        total, c = self.cast(total, "int32", f"{name}.total"), int(factor.c)
        if int(factor.b) != 1 or c > SHORT:
            return self.rescale(name, total, factor, 1 << RESIDUAL_BITS)
        raised = self.add(f"{name}.raised", total, int(factor.half) + (grid.zero << c))
        ends = {"first": grid.low << c, "last": ((grid.high + 1) << c) - 1}
        bounds = [self.constant(f"{name}.{at}", end, np.int32) for at, end in ends.items()]
        unsigned = self.cast(self.node("Clip", [raised, *bounds], f"{name}.inside"), "uint32", f"{name}.unsigned")
        amount = self.constant(f"{name}.c", c, np.uint32)
        return self.cast(self.node("BitShift", [unsigned, amount], f"{name}.shifted", direction="RIGHT"), "uint8", name)

    def shift(self, name: str, value: str, factor: Dyadic, constant: Tensor, dtype: str) -> str:
        """The tensor `name`: (value b + half + constant) >> c; the constant may be below 0 and wrap, the sum is not."""
        value = self.cast(value, "uint64", f"{name}.unsigned")
        if not bool((factor.b == 1).all()):
            value = self.node("Mul", [value, self.constant(f"{name}.b", factor.b, np.uint64)], f"{name}.product")
        added = (factor.half + constant).numpy().astype(np.uint64)
        value = self.node("Add", [value, self.constant(f"{name}.constant", added, np.uint64)], f"{name}.rounded")
        amount = self.constant(f"{name}.c", factor.c, np.uint64)
        return self.cast(self.node("BitShift", [value, amount], f"{name}.shifted", direction="RIGHT"), dtype, name)

    def product(self, name: str, total: str, factor: Dyadic, constant: Any) -> str:
        """total b + half + constant, in int64."""
        long = self.cast(total, "int64", f"{name}.long")
        long = self.node("Mul", [long, self.constant(f"{name}.b", factor.b, np.int64)], f"{name}.product")
        constant = self.constant(f"{name}.constant", factor.half + constant, np.int64)
        return self.node("Add", [long, constant], f"{name}.rounded")

    def clamped(self, name: str, total: str, factor: Dyadic, grid: Grid) -> str:
        """The tensor `name` from totals of int32, clamped behind the shift."""
        long = self.product(name, total, factor, grid.zero << factor.c)
        long = self.node("Max", [long, self.constant("long nought", 0, np.int64)], f"{name}.positive")
        amount = self.constant(f"{name}.c", factor.c, np.uint64)
        unsigned = self.cast(long, "uint64", f"{name}.unsigned")
        shifted = self.node("BitShift", [unsigned, amount], f"{name}.shifted", direction="RIGHT")
        bounds = [self.constant(f"{name}.{at}", getattr(grid, at), np.uint64) for at in ("low", "high")]
        return self.cast(self.node("Clip", [shifted, *bounds], f"{name}.inside"), "uint8", name)

    def broad(self, name: str, total: str, factor: Dyadic) -> str:
        """The tensor `name`: int32 of either sign from totals of int32."""
        unsigned = self.cast(self.product(name, total, factor, 1 << LIFT), "uint64", f"{name}.unsigned")
        amount = self.constant(f"{name}.c", factor.c, np.uint64)
        shifted = self.node("BitShift", [unsigned, amount], f"{name}.shifted", direction="RIGHT")
        lift = self.constant(f"{name}.lift", (1 << LIFT) >> factor.c, np.int64)
        signed = self.node("Sub", [self.cast(shifted, "int64", f"{name}.lifted"), lift], f"{name}.signed")
        return self.cast(signed, "int32", name)


def limits(factor: Dyadic, grid: Grid, most: int) -> tuple[Tensor, Tensor] | None:
    """The smallest and the largest total whose code lies within the grid's bounds, by factor, within +-`most`.

    None where clamping totals to them is not clamping codes: a factor over 1, a zero-point out of bounds, or totals
    that an int32 does not hold once they are raised by the first.
    """
    if not grid.low <= grid.zero <= grid.high or 2 * most >= 1 << 31 or bool((factor.b > 1 << factor.c).any()):
        return None
    b = factor.b.clamp(min=1)
    first = -((factor.half + ((grid.zero - grid.low) << factor.c)) // b)
    last = (((grid.high + 1 - grid.zero) << factor.c) - factor.half - 1) // b
    return first.clamp(-most, most), last.clamp(-most, most)


def weights(op: IntegerLayer) -> list[tuple[Array, int]]:
    """Weights in uint8 with one zero-point; two tensors, to be added, where 256 values do not hold them."""
    weight = op.weight.numpy().astype(np.int64)
    low, high = int(weight.min()), int(weight.max())
    if low >= -128 and high <= 127:
        return [(weight + 128, 128)]
    if high - low <= 255 and low <= 0 <= high:
        return [(weight - low, -low)]
    near = np.clip(weight, -128, 127)
    return [(near + 128, 128), (weight - near + 128, 128)]


# -- one function for each operator ------------------------------------------------------------------------------------
@emit.register
def _(op: Entrance, to: _Writer) -> None:
    to.quantize(op, op.inputs[0])


@emit.register
def _(op: Rescale, to: _Writer) -> None:
    assert op.factor is not None
    to.rescale_codes(op.name, op.inputs[0], op.factor, to.code(op.name))


@emit.register
def _(op: IntegerLayer, to: _Writer) -> None:
    name, layer = op.inputs[0], op.layer
    about: dict[str, Any] = {}
    if isinstance(layer, Conv):
        about = {"strides": layer.stride, "pads": layer.padding, "dilations": layer.dilation, "group": layer.groups}
    zero = to.constant(f"{name}.zero", to.code(name).zero, np.uint8)
    sums = []
    for i, (weight, offset) in enumerate(weights(op)):
        at = f"{op.name}.weight{i}"
        kernel = to.constant(at, weight if about else np.ascontiguousarray(weight.T), np.uint8)
        inputs = [name, kernel, zero, to.constant(f"{at}.zero", offset, np.uint8)]
        sums.append(to.node("ConvInteger" if about else "MatMulInteger", inputs, f"{op.name}.sum{i}", **about))
    total = sums[0] if len(sums) == 1 else to.node("Add", sums, f"{op.name}.sum")
    bias = 0 if op.bias is None else op.bias.numpy().reshape(-1, *[1] * (op.weight.dim() - 2))
    to.rescale(op.name, total, op.factor, layer.largest, bias)


@emit.register
def _(op: IntegerAdd, to: _Writer) -> None:
    sides = []
    for i, (name, factor) in enumerate(zip(op.inputs, op.branches, strict=True)):
        # The lift by 2^16 steps is the 17th bit, which the cast to int16 drops.
        lift = (1 << RESIDUAL_BITS << factor.c) - to.code(name).zero * factor.b
        sides.append(to.shift(f"{op.name}.side{i}", name, factor, lift, "int16"))
    if op.factor is None:
        to.cast(to.node("Add", sides, f"{op.name}.sum"), "int32", op.name)
    else:
        to.rescale_sum(op.name, to.node("Add", sides, f"{op.name}.sum"), op.factor)


@emit.register
def _(op: IntegerConcat, to: _Writer) -> None:
    grid, sides = to.code(op.name), enumerate(zip(op.inputs, op.branches, strict=True))
    parts = [to.rescale_codes(f"{op.name}.part{i}", name, factor, grid) for i, (name, factor) in sides]
    to.node("Concat", parts, op.name, axis=op.axis)


@emit.register
def _(op: IntegerProduct, to: _Writer) -> None:
    sides = []
    for i, name in enumerate(op.inputs):
        codes = to.cast(name, "int32", f"{op.name}.codes{i}")
        sides.append(to.add(f"{op.name}.side{i}", codes, -to.code(name).zero))
    to.rescale(op.name, to.node("Mul", sides, f"{op.name}.sum"), op.factor, 255 * 255)


@emit.register
def _(op: IntegerMean, to: _Writer) -> None:
    codes = to.cast(op.inputs[0], "int32", f"{op.name}.codes")
    axes = to.constant("height and width", [2, 3], np.int64)
    total = to.node("ReduceSum", [codes, axes], f"{op.name}.sum", keepdims=1)
    to.rescale(op.name, total, op.factor, 255 * op.pixels, -op.pixels * to.code(op.inputs[0]).zero)


@emit.register
def _(op: IntegerPool, to: _Writer) -> None:
    name = op.inputs[0]
    ones = to.constant(f"{op.name}.ones", np.ones((op.channels, 1, *op.kernel)), np.uint8)
    zero = to.constant(f"{name}.zero", to.code(name).zero, np.uint8)
    about = {"strides": op.stride, "pads": op.padding, "group": op.channels}
    total = to.node("ConvInteger", [name, ones, zero], f"{op.name}.sum", **about)
    to.rescale(op.name, total, op.factor, 255 * op.kernel[0] * op.kernel[1])


@emit.register
def _(op: Table, to: _Writer) -> None:
    table = to.constant(f"{op.name}.table", op.table.numpy(), np.uint8)
    to.node("Gather", [table, to.cast(op.inputs[0], "int32", f"{op.name}.index")], op.name)
