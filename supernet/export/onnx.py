"""Writes a deployed network as an ONNX file of quantize/dequantize (QDQ) pairs, placed so that onnxruntime fuses them.

Between operators there are uint8 codes; each operator reads through DequantizeLinear nodes of its own and ends in
QuantizeLinear, with a Clip *on the integers* where the codes have fewer values than a uint8 (a float Clip would keep
the runtime from fusing). Operators that only move values work on the codes. Weights are integer initialisers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from supernet.export import onnx_tokens
from supernet.export.graph import Deployed, Grid, Op
from supernet.export.kernels import pixels, shift, spare, tiled, widen
from supernet.export.operators import (
    Add,
    AveragePool,
    Concat,
    Conv,
    GlobalAverage,
    Layer,
    Linear,
    MaxPool,
    Pad,
    Pointwise,
    Quantize,
    Reshape,
    Slice,
)

Array = NDArray[Any]

OPSET = 21
OPSET_INT2 = 25
INTEGERS = {32: np.int32, 8: np.int8}
PACKED = {4: TensorProto.INT4, 2: TensorProto.INT2}
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Clip")
FAR = np.iinfo(np.int64).max


def write(
    deployed: Deployed,
    containers: Sequence[int] = (8,),
    metadata: Mapping[str, str] | None = None,
    tiles: bool = False,
) -> onnx.ModelProto:
    """The QDQ model of a deployed network.

    Args:
        deployed: the network.
        containers: bits of the integers that weights may be stored in, of 2, 4, 8; each layer takes the smallest that
            holds its codes. Layers in 8 bits run as integer kernels; smaller ones are made for size, and run in float
            on the same activations.
        metadata: texts for the file's metadata.
        tiles: for a processor that multiplies tiles of integers, see `supernet.export.kernels`.
    """
    return Writer(deployed, containers, tiles).model(metadata or {})


def write_float(deployed: Deployed) -> onnx.ModelProto:
    """The float twin: the same network with folded float weights and nothing quantized, to compare size and speed."""
    return Writer(deployed, ()).model({})


def container(layer: Layer, containers: Sequence[int]) -> int:
    """Bits of the integers in which a layer's weight is stored.

    Raises:
        ValueError: no container is wide enough.
    """
    wide = [c for c in sorted(containers) if c >= layer.width]
    if not wide:
        raise ValueError(
            f"{layer.name} has {layer.width}-bit weights, the containers are {sorted(containers)}; allow one of 8 bits"
        )
    return wide[0]


def stored(layer: Layer) -> tuple[Array, Array, int]:
    """Codes and zero-points of a layer in an int8 container, and by how much both are multiplied.

    | centred codes q - z of all channels | stored                                                   |
    |-------------------------------------|----------------------------------------------------------|
    | within +-64                         | fine (q - z), zero-point 0; the scale is divided by fine |
    | within -128 .. 127                  | q - z, zero-point 0                                      |
    | spread of at most 255               | shifted to -128 .. 127, one zero-point                   |
    | else                                | q, and a zero-point for each channel                     |

    One zero-point for all channels, 0 at best, is what most runtimes ask for. The last row (8-bit asymmetric weights,
    lopsided both ways) needs a runtime that takes one for each channel, as later releases of onnxruntime do.
    """
    codes, zero, centred = (t.cpu().numpy().astype(np.int64) for t in (layer.codes, layer.zero, layer.centred))
    low, high = int(centred.min()), int(centred.max())
    if low >= -128 and high <= 127:
        return centred * layer.fine, np.zeros_like(zero), layer.fine
    if high - low <= 255:
        shift = -128 - low
        return centred + shift, np.full_like(zero, shift), 1
    return codes, zero, 1


class Writer:
    """Collects nodes and initialisers; `containers` empty writes the float twin.

    Attributes:
        answer: element type of the file's output.
    """

    answer = TensorProto.FLOAT

    def __init__(self, deployed: Deployed, containers: Sequence[int], tiles: bool = False) -> None:
        self.deployed, self.containers, self.quantized = deployed, tuple(containers), bool(containers)
        self.pixels = pixels(deployed) if tiles else {}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.opset = OPSET
        self._reads: dict[str, int] = {}

    # -- parts ---------------------------------------------------------------------------------------------------------
    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node with one output; returns the output. What computes is named after it, the rest needs no name."""
        name = "" if kind in CONVERSIONS else output
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, name: str, value: Any, dtype: Any) -> str:
        """Add an initialiser; returns its name."""
        self.initializers[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def integers(self, name: str, value: Array, bits: int) -> str:
        """Add an initialiser of signed `bits`-bit integers; returns its name."""
        if bits in INTEGERS:
            return self.constant(name, value, INTEGERS[bits])
        self.opset = OPSET_INT2 if bits == 2 else self.opset
        content = packed(value, bits)
        self.initializers[name] = TensorProto(name=name, data_type=PACKED[bits], dims=np.shape(value), raw_data=content)
        return name

    def read(self, name: str, moved: str = "") -> str:
        """Real values of a tensor, for one reader: a DequantizeLinear of its own where the tensor is kept as codes.

        Args:
            name: of the tensor.
            moved: what is read in its place: the same numbers in another shape.
        """
        grid = self.deployed.grids[name]
        if grid is None or not self.quantized:
            return moved or name
        count = self._reads[name] = self._reads.get(name, 0) + 1
        return self.node("DequantizeLinear", [moved or name, *self.grid(name, grid)], f"{name}.dq{count}")

    def grid(self, name: str, grid: Grid) -> tuple[str, str]:
        """Names of scale and zero-point of a tensor."""
        scale = self.constant(f"{name}.scale", grid.scale, np.float32)
        return scale, self.constant(f"{name}.zero", grid.zero, np.uint8)

    def finish(self, op: Op, kind: str, inputs: Sequence[str], **attributes: Any) -> None:
        """Add the node of an operator and what puts its output in the form in which it is kept."""
        if not self.quantized:
            self._activate(op, kind, inputs, attributes)
        elif op.grid is None:
            self.node(kind, inputs, op.name, **attributes)
        else:
            self.quantize(op, self.node(kind, inputs, f"{op.name}.value", **attributes))

    def quantize(self, op: Op, value: str) -> None:
        """QuantizeLinear, and Clip on the integers where the container holds more than the grid."""
        assert op.grid is not None
        scale, zero = self.grid(op.name, op.grid)
        clipped = op.grid.clipped
        codes = self.node("QuantizeLinear", [value, scale, zero], f"{op.name}.codes" if clipped else op.name)
        if clipped:
            low = self.constant(f"{op.name}.low", op.grid.low, np.uint8)
            high = self.constant(f"{op.name}.high", op.grid.high, np.uint8)
            self.node("Clip", [codes, low, high], op.name)

    def _activate(self, op: Op, kind: str, inputs: Sequence[str], attributes: Mapping[str, Any]) -> None:
        value = self.node(kind, inputs, f"{op.name}.value" if op.activation else op.name, **attributes)
        if op.activation == "relu":
            self.node("Relu", [value], op.name)
        elif op.activation == "relu6":
            self.node("Clip", [value, *self.to_six()], op.name)

    def to_six(self) -> tuple[str, str]:
        """Bounds of ReLU6."""
        return self.constant("relu6.low", 0, np.float32), self.constant("relu6.high", 6, np.float32)

    def layer(self, op: Layer, moved: str = "") -> list[str]:
        """Real values of input (see `read`), weight and bias of a layer, as its node reads them."""
        if not self.quantized:
            parts = {f"{op.name}.weight": op.weight, f"{op.name}.bias": op.shift}
            real = {name: value.cpu().numpy() for name, value in parts.items() if value is not None}
            return [moved or op.inputs[0], *(self.constant(name, value, np.float32) for name, value in real.items())]
        grid = self.deployed.grids[op.inputs[0]]
        assert grid is not None
        names = [self.read(op.inputs[0], moved or self.wide(op)), self.weight(op)]
        if op.bias is not None:
            unit = op.scale.cpu() * grid.scale / op.fine
            names.append(self.dequantize(f"{op.name}.bias", op.bias.cpu().numpy(), unit, None, 32))
        return names

    def spare(self, op: Layer) -> int:
        """How many channels of zeros are added to what a layer reads."""
        return spare(op) if container(op, self.containers) == 8 else 0

    def wide(self, op: Layer) -> str:
        """Name of the input's codes, with the channels that the kernel wants."""
        (name,), more, grid = op.inputs, self.spare(op), self.deployed.grids[op.inputs[0]]
        if not more:
            return name
        assert grid is not None
        widths = self.constant(f"{op.name}.widths", [0, 0, 0, 0, 0, more, 0, 0], np.int64)
        nothing = self.constant(f"{op.name}.nothing", grid.zero, np.uint8)
        return self.node("Pad", [name, widths, nothing], f"{op.name}.wide")

    def weight(self, op: Layer) -> str:
        """Real values of a layer's weight, out of the smallest container that holds its codes."""
        bits, more = container(op, self.containers), self.spare(op)
        codes, zero, factor = stored(op) if bits == 8 else (op.codes.cpu().numpy(), op.zero.cpu().numpy(), 1)
        if bits == 8 and tiled(op, self.pixels.get(op.name, 0)):
            codes, zero = shift(codes, zero)
        codes = widen(codes, zero, more) if more else codes
        return self.dequantize(f"{op.name}.weight", codes, op.scale.cpu() / factor, zero, bits)

    def move(self, op: Op, kind: str, more: Sequence[str] = (), **attributes: Any) -> None:
        """Add the node of an operator that only moves values: on codes where there are codes."""
        self.node(kind, [op.inputs[0], *more], op.name, **attributes)

    def nought(self, op: Op) -> tuple[int | float, Any]:
        """What stands for 0.0 in the tensor that an operator moves, and its type."""
        grid = self.deployed.grids[op.inputs[0]] if self.quantized else None
        return (0.0, np.float32) if grid is None else (grid.zero, np.uint8)

    def dequantize(self, name: str, codes: Array, scale: Tensor, zero: Array | None, bits: int) -> str:
        """Real values of integer initialisers, with one scale or along axis 0.

        Weights need their zero-points, even if they are 0: without them onnxruntime does not fuse Gemm.
        """
        shared = len(scale) == 1
        shape = () if shared else (-1,)
        parts = [self.integers(name, codes, bits)]
        parts.append(self.constant(f"{name}.scale", scale.numpy().reshape(shape), np.float32))
        if zero is not None:
            parts.append(self.integers(f"{name}.zero", zero.reshape(shape), bits))
        return self.node("DequantizeLinear", parts, f"{name}.value", **({} if shared else {"axis": 0}))

    # -- the whole -----------------------------------------------------------------------------------------------------
    def model(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """Every operator in order, then input, output and metadata."""
        deployed = self.deployed
        for op in deployed.operators():
            emit(op, self)
        output = self.output()
        image = helper.make_tensor_value_info(deployed.source, TensorProto.FLOAT, ["n", *deployed.example.shape[1:]])
        logits = helper.make_tensor_value_info(output, self.answer, ["n", *deployed.shape])
        graph = helper.make_graph(self.nodes, "elastibit", [image], [logits], list(self.initializers.values()))
        opsets = [helper.make_opsetid("", self.opset)]
        made = helper.make_model(
            graph, producer_name="elastibit", opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets)
        )
        helper.set_model_props(made, dict(metadata))
        onnx.checker.check_model(made, full_check=True)
        return made

    def output(self) -> str:
        """The last tensor as the file gives it: real values."""
        return self.node("Identity", [self.read(self.deployed.result)], self.output_name)

    @property
    def output_name(self) -> str:
        """`logits`, if no operator has that name."""
        return "logits" if "logits" not in self.deployed.grids else f"{self.deployed.result}.real"


def packed(values: Array, bits: int) -> bytes:
    """Integers of 2 or 4 bits, two's complement, first element in the lowest bits of each byte."""
    per_byte = 8 // bits
    flat = np.asarray(values).astype(np.int64).reshape(-1) & ((1 << bits) - 1)
    flat = np.concatenate([flat, np.zeros(-len(flat) % per_byte, np.int64)]).reshape(-1, per_byte)
    return (flat << (np.arange(per_byte) * bits)).sum(1).astype(np.uint8).tobytes()


# -- one function for each operator ------------------------------------------------------------------------------------
@singledispatch
def emit(op: Op, to: Writer) -> None:
    """Add an operator's nodes to the writer."""
    raise TypeError(f"{op.name}: {op.kind} has no ONNX form")


@emit.register
def _(op: Quantize, to: Writer) -> None:
    if to.quantized:
        to.quantize(op, to.read(op.inputs[0]))
    else:
        to.node("Identity", op.inputs, op.name)


@emit.register
def _(op: Conv, to: Writer) -> None:
    to.finish(op, "Conv", to.layer(op), strides=op.stride, pads=op.padding, dilations=op.dilation, group=op.groups)


@emit.register
def _(op: Linear, to: Writer) -> None:
    if op.lead:
        onnx_tokens.linear(op, to)
    else:
        to.finish(op, "Gemm", to.layer(op), transB=1)


@emit.register
def _(op: Add, to: Writer) -> None:
    to.finish(op, "Add", [to.read(n) for n in op.inputs])


@emit.register
def _(op: Concat, to: Writer) -> None:
    to.finish(op, "Concat", [to.read(n) for n in op.inputs], axis=op.axis)


@emit.register
def _(op: GlobalAverage, to: Writer) -> None:
    to.finish(op, "GlobalAveragePool", [to.read(op.inputs[0])])


@emit.register
def _(op: AveragePool, to: Writer) -> None:
    options = {"ceil_mode": int(op.ceil), "count_include_pad": int(op.count_padding)}
    window = {"kernel_shape": op.kernel, "strides": op.stride, "pads": [*op.padding, *op.padding]}
    to.finish(op, "AveragePool", [to.read(op.inputs[0])], **window, **options)


ONNX_NAMES = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "hardswish": "HardSwish",
    "gelu": "Gelu",
    "mul": "Mul",
}


@emit.register
def _(op: Pointwise, to: Writer) -> None:
    inputs = [to.read(n) for n in op.inputs]
    if op.function == "silu":
        to.finish(op, "Mul", [inputs[0], to.node("Sigmoid", inputs, f"{op.name}.sigmoid")])
    elif op.function == "relu6":
        to.finish(op, "Clip", [*inputs, *to.to_six()])
    elif op.function == "hardsigmoid":
        to.finish(op, "HardSigmoid", inputs, alpha=1 / 6, beta=0.5)
    else:
        to.finish(op, ONNX_NAMES[op.function], inputs)


@emit.register
def _(op: MaxPool, to: Writer) -> None:
    window: dict[str, Any] = {"kernel_shape": op.kernel, "strides": op.stride, "pads": [*op.padding, *op.padding]}
    to.move(op, "MaxPool", **window, dilations=op.dilation, ceil_mode=int(op.ceil))


@emit.register
def _(op: Slice, to: Writer) -> None:
    axes, starts, stops, steps = zip(*op.slices, strict=True)
    columns = {"starts": starts, "ends": [FAR if s is None else s for s in stops], "axes": axes, "steps": steps}
    to.move(op, "Slice", [to.constant(f"{op.name}.{what}", v, np.int64) for what, v in columns.items()])


@emit.register
def _(op: Pad, to: Writer) -> None:
    pairs = [op.padding[i : i + 2] for i in range(0, len(op.padding), 2)][::-1]
    # Every axis is named by its position: onnxruntime moves transposes through Pad without looking at its `axes` input.
    widths = to.constant(f"{op.name}.widths", [p[0] for p in pairs] + [p[1] for p in pairs], np.int64)
    to.move(op, "Pad", [widths, to.constant(f"{op.name}.value", *to.nought(op))])


@emit.register
def _(op: Reshape, to: Writer) -> None:
    if len(op.shape) == 1:
        to.move(op, "Flatten", axis=1)
    else:
        to.move(op, "Reshape", [to.constant(f"{op.name}.shape", [-1, *op.shape], np.int64)])


for _kind, _form in onnx_tokens.FORMS.items():
    emit.register(_kind, _form)
