"""The deployed network: integer codes between operators, and exact integer arithmetic inside layers.

A `Deployed` is a list of operators over named tensors. A tensor either sits on a `Grid` (then its codes are kept) or holds real
numbers. Run in torch it is the reference that every written file is compared with, and whose accuracy is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from supernet.quant.quantizer import Quantizer

SHIFT = 128
"""Signed codes are kept as unsigned ones: +128 on code and zero-point leaves every value as it is."""

EXACT_IN_FLOAT32 = 1 << 24


@dataclass(frozen=True, slots=True)
class Grid:
    """The uint8 codes of one tensor: value = (code - zero) * scale, low <= code <= high.

    | activation | codes of the quantizer    | low, high here            |
    |------------|---------------------------|---------------------------|
    | unsigned   | 0 .. 2^b - 1              | 0, 2^b - 1                |
    | signed     | -2^(b-1) .. 2^(b-1) - 1   | 128 - 2^(b-1), 127 + 2^(b-1) |

    Attributes:
        scale: representable in float32, positive.
        zero: the code of 0.0.
        low, high: bounds of the codes; narrower than the bits where a ReLU or ReLU6 has been absorbed.
        bits: of the choice in the search space.
    """

    scale: float
    zero: int
    low: int
    high: int
    bits: int

    @classmethod
    def of(cls, quantizer: Quantizer) -> Grid:
        """The grid of an activation quantizer with one integer choice."""
        scale, zero, low, high = (float(t) for t in quantizer.parameters_of(torch.zeros(1)))
        shift = 0 if quantizer.unsigned else SHIFT
        return cls(scale, *(int(v) + shift for v in (zero, low, high)), quantizer.choices[0].bits)

    def encode(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Codes, as floats."""
        return torch.clamp(torch.round(value / torch.tensor(self.scale, device=value.device)) + self.zero, self.low, self.high)

    def decode(self, codes: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Values of codes."""
        return (codes - self.zero) * self.scale

    def after(self, activation: str | None) -> Grid:
        """The grid with a ReLU or ReLU6 before it moved into its bounds.

        Rounding and clamping are monotone, so clamp(round(relu(v) / s) + z, lo, hi) = clamp(round(v / s) + z, max(lo, z), hi) exactly, and
        with ReLU6 the upper bound becomes min(hi, round(6 / s) + z).
        """
        if activation is None:
            return self
        bounds = {"relu": (0.0, torch.inf), "relu6": (0.0, 6.0)}[activation]
        low, high = (int(self.encode(torch.tensor(v))) for v in bounds)
        return dataclasses.replace(self, low=low, high=high)

    @property
    def clipped(self) -> bool:
        """Whether the codes need a clamp beyond that of their uint8 container."""
        return (self.low, self.high) != (0, 255)


class Op(nn.Module):
    """One operator. It reads tensors by name and writes the tensor of its own name.

    Args:
        name: of the operator and of its output, unique.
        inputs: names of what it reads.

    Attributes:
        grid: of the output; None: real numbers.
        activation: `relu` or `relu6` that was absorbed in the grid's bounds; the float twin still needs to know.
        site: path of the quantizer in the subnet whose grid this is.
    """

    def __init__(self, name: str, inputs: Sequence[str]) -> None:
        super().__init__()
        self.name, self.inputs = name, tuple(inputs)
        self.grid: Grid | None = None
        self.activation: str | None = None
        self.site: str | None = None

    @property
    def kind(self) -> str:
        """What the operator is, in one word."""
        return type(self).__name__

    def forward(self, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
        """What is kept of the output: codes (as floats) where it has a grid, else values. `inputs` are kept tensors too."""
        values = [x if grid is None else grid.decode(x) for x, grid in zip(inputs, grids, strict=True)]
        return self.kept(self.compute(*values))

    def kept(self, value: Tensor) -> Tensor:
        """Codes of `value` on the output's grid, or `value` itself."""
        return value if self.grid is None else self.grid.encode(value)

    def compute(self, *values: Tensor) -> Tensor:
        """The operator on values."""
        raise TypeError(f"{self.kind} computes on codes")


class Quantize(Op):
    """Puts a tensor on a grid, or from one grid onto a coarser one."""

    def compute(self, *values: Tensor) -> Tensor:
        """The value itself; encoding is what every operator with a grid does last."""
        return values[0]


class Add(Op):
    """Sum of two tensors."""

    def compute(self, *values: Tensor) -> Tensor:
        """a + b."""
        return values[0] + values[1]


class Concat(Op):
    """Tensors joined along one axis."""

    def __init__(self, name: str, inputs: Sequence[str], axis: int) -> None:
        super().__init__(name, inputs)
        self.axis = axis

    def compute(self, *values: Tensor) -> Tensor:
        """The values in a row."""
        return torch.cat(values, self.axis)


POINTWISE: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "mul": torch.mul,
}


class Pointwise(Op):
    """A function of each element, computed in float between dequantization and quantization."""

    def __init__(self, name: str, inputs: Sequence[str], function: str) -> None:
        super().__init__(name, inputs)
        self.function = function

    def compute(self, *values: Tensor) -> Tensor:
        """The function, see POINTWISE."""
        return POINTWISE[self.function](*values)


class Average(Op):
    """Average pooling over the whole image (kernel None) or over windows; padding counts as zeros where `count_padding`."""

    def __init__(
        self, name: str, inputs: Sequence[str], kernel: tuple[int, int] | None, stride: tuple[int, int], padding: tuple[int, int], ceil: bool, count_padding: bool
    ) -> None:
        super().__init__(name, inputs)
        self.kernel, self.stride, self.padding, self.ceil, self.count_padding = kernel, stride, padding, ceil, count_padding

    def compute(self, *values: Tensor) -> Tensor:
        """The mean, summed in float64 so that no order of summation shows."""
        x = values[0].double()
        if self.kernel is None:
            return x.mean((2, 3), keepdim=True).float()
        return F.avg_pool2d(x, self.kernel, self.stride, self.padding, self.ceil, self.count_padding).float()


class Layer(Op):
    """A convolution or linear layer with integer weights: value = scale_x scale_w / fine (fine sum (x - zero_x)(w - zero_w) + bias).

    Attributes:
        codes: [k, ...] weight codes of `bits` bits, two's complement.
        zero: [k] or [1] weight zero-points.
        scale: [k] or [1] weight scales.
        bias: [k] int32 values (kept as int64) in units of scale_x scale_w / fine, or None.
        fine: a power of two by which an int8 container may multiply the codes, so that the bias is held as finely.
        weight, shift: the same layer in float, normalisation folded: for the float twin.
        constant: output channels that no input can change.
    """

    codes: Tensor
    zero: Tensor
    scale: Tensor
    bias: Tensor | None
    weight: Tensor
    shift: Tensor | None

    def __init__(self, name: str, inputs: Sequence[str], bits: int, reach: int) -> None:
        super().__init__(name, inputs)
        self.bits, self.reach, self.constant, self.fine = bits, reach, 0, 1

    def hold(self, codes: Tensor, zero: Tensor, scale: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor | None) -> None:
        """Take the tensors; see the attributes."""
        for name, value in {"codes": codes, "zero": zero, "scale": scale, "bias": bias, "weight": weight, "shift": shift}.items():
            self.register_buffer(name, value)

    @property
    def centred(self) -> Int[Tensor, "k ..."]:
        """[k, ...] weight codes less their zero-points."""
        return self.codes - self.zero.view(-1, *[1] * (self.codes.dim() - 1))

    @property
    def bound(self) -> int:
        """The largest sum of products that an input can reach (`reach` = the largest |x - zero_x|), the bias left out."""
        return int(self.centred.abs().flatten(1).sum(1).max()) * self.reach

    def forward(self, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
        """Exact integer sums; float32 where they stay below 2^24 (on a CPU), else float64."""
        (x,), (grid,) = inputs, grids
        assert grid is not None
        dtype = torch.float32 if self.bound < EXACT_IN_FLOAT32 and x.device.type == "cpu" else torch.float64
        sums = self.accumulate((x - grid.zero).to(dtype), self.centred.to(dtype)).double()
        shape = (-1, *[1] * (self.codes.dim() - 2))
        if self.bias is not None:
            sums = sums + self.bias.view(shape) / self.fine
        return self.kept(sums.float() * (self.scale * grid.scale).view(shape))

    def accumulate(self, x: Tensor, w: Tensor) -> Tensor:
        """Sums of products of centred codes."""
        raise TypeError(f"{self.kind} is not a layer by itself")


class Conv(Layer):
    """A convolution in two dimensions, padded with zeros."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        bits: int,
        reach: int,
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> None:
        super().__init__(name, inputs, bits, reach)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def accumulate(self, x: Tensor, w: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, k, h', w']; `padding` is top, left, bottom, right."""
        top, left, bottom, right = self.padding
        if (top, left) != (bottom, right):
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        return F.conv2d(x, w, None, self.stride, (top, left), self.dilation, self.groups)


class Linear(Layer):
    """A linear layer on [n, c]."""

    def accumulate(self, x: Tensor, w: Tensor) -> Tensor:
        """[n, c] -> [n, k]."""
        return F.linear(x, w)


class Move(Op):
    """An operator that only moves values: it works on codes as they are, and its output has the grid of its input."""

    def forward(self, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
        """Codes to codes, or values to values."""
        return self.move(inputs[0], 0 if grids[0] is None else grids[0].zero)

    def move(self, x: Tensor, zero: int) -> Tensor:
        """The moved tensor; `zero` is what stands for 0.0."""
        raise TypeError(f"{self.kind} is not an operator by itself")


class MaxPool(Move):
    """Largest of each window; codes are ordered as their values are."""

    def __init__(
        self, name: str, inputs: Sequence[str], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], ceil: bool
    ) -> None:
        super().__init__(name, inputs)
        self.kernel, self.stride, self.padding, self.dilation, self.ceil = kernel, stride, padding, dilation, ceil

    def move(self, x: Tensor, zero: int) -> Tensor:
        """[n, c, h, w] -> [n, c, h', w']."""
        return F.max_pool2d(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil)


class Slice(Move):
    """x[..., start:stop:step, ...] along some axes."""

    def __init__(self, name: str, inputs: Sequence[str], slices: Sequence[tuple[int, int | None, int | None, int]]) -> None:
        super().__init__(name, inputs)
        self.slices = tuple(slices)

    def move(self, x: Tensor, zero: int) -> Tensor:
        """`slices` are (axis, start, stop, step)."""
        index = [slice(None)] * x.dim()
        for axis, start, stop, step in self.slices:
            index[axis] = slice(start, stop, step)
        return x[tuple(index)]


class Pad(Move):
    """Zeros around a tensor; `padding` in torch's order, last axis first, for every axis."""

    def __init__(self, name: str, inputs: Sequence[str], padding: Sequence[int]) -> None:
        super().__init__(name, inputs)
        self.padding = tuple(padding)

    def move(self, x: Tensor, zero: int) -> Tensor:
        """The code of 0.0 around the codes."""
        return F.pad(x, self.padding, value=zero)


class Reshape(Move):
    """[n, ...] -> [n, *shape]."""

    def __init__(self, name: str, inputs: Sequence[str], shape: Sequence[int]) -> None:
        super().__init__(name, inputs)
        self.shape = tuple(shape)

    def move(self, x: Tensor, zero: int) -> Tensor:
        """The same elements in another shape."""
        return x.reshape(x.shape[0], *self.shape)


class Deployed(nn.Module):
    """A network of operators over named tensors; see the head of this file.

    Args:
        ops: in order of execution; each sets the grid of the tensor of its name.
        source: name of the input tensor (real numbers).
        result: name of the output tensor.
        example: one input [1, ...].
        folded: how many BatchNorms went into layers.
        classes: size of the last axis of the output.
    """

    def __init__(self, ops: Sequence[Op], source: str, result: str, example: Tensor, folded: int, classes: int) -> None:
        super().__init__()
        self.ops = nn.ModuleList(ops)
        self.source, self.result, self.example, self.folded, self.classes = source, result, example, folded, classes
        self.grids: dict[str, Grid | None] = {source: None}
        for op in ops:
            if isinstance(op, Move):
                op.grid = self.grids[op.inputs[0]]
            self.grids[op.name] = op.grid
        last = {name: op.name for op in ops for name in op.inputs}
        self._done = {op.name: [n for n in op.inputs if last[n] == op.name and n != result] for op in ops}

    @property
    def layers(self) -> list[Layer]:
        """Convolutions and linear layers in order of execution."""
        return [op for op in self.ops if isinstance(op, Layer)]

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n k"]:
        """Logits."""
        kept = {self.source: x}
        for op in self.operators():
            kept[op.name] = op([kept[n] for n in op.inputs], [self.grids[n] for n in op.inputs])
            for name in self._done[op.name]:
                kept.pop(name, None)
        return self.values(self.result, kept[self.result])

    @torch.no_grad()
    def tensors(self, x: Float[Tensor, "n ..."]) -> dict[str, Tensor]:
        """Every tensor by name: codes (as floats) where it has a grid, else values."""
        kept = {self.source: x}
        for op in self.operators():
            kept[op.name] = op([kept[n] for n in op.inputs], [self.grids[n] for n in op.inputs])
        return kept

    def operators(self) -> list[Op]:
        """The operators in order of execution."""
        return [op for op in self.ops if isinstance(op, Op)]

    def values(self, name: str, kept: Tensor) -> Tensor:
        """Values of a tensor as it is kept."""
        grid = self.grids[name]
        return kept if grid is None else grid.decode(kept)
