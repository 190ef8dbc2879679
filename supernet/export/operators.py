"""The operators of a deployed network, with the arithmetic of integer kernels.

Where a runtime computes several operators in one kernel (convolution, bias, requantization), the reference rounds where
that kernel rounds: once, after one multiplication of the integer sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from supernet.config import QuantConfig
from supernet.export.graph import Grid, Move, Op
from supernet.formats.integer import Integer

EXACT_IN_FLOAT32 = 1 << 24


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

    def forward(self, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
        """On codes a r_a + (b r_b + c), r = scale / scale_out, all constants in c, in float32 with fused multiply-add.

        This is the order of onnxruntime's integer kernel. Dequantizing, adding and dividing gives another code where
        the sum lies next to a tie, which changed 8 of 5,000 predictions of an 8-bit ResNet-20.
        """
        a, b = grids
        if self.grid is None or a is None or b is None:
            return super().forward(inputs, grids)
        ratios = torch.tensor([a.scale, b.scale]) / torch.tensor(self.grid.scale)
        zeros = ratios * torch.tensor([float(a.zero), float(b.zero)])
        constant = float(torch.tensor(float(self.grid.zero)) - (zeros[0] + zeros[1]))
        # In float64 code x ratio is exact, so that each step rounds once, as a fused multiply-add does.
        right = inputs[1].double().mul_(float(ratios[1])).add_(constant).float()
        total = inputs[0].double().mul_(float(ratios[0])).add_(right).float()
        return self.grid.clamp(total.round_())


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


class AveragePool(Op):
    """Mean of each window; padding counts as zeros where `count_padding`."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        ceil: bool,
        count_padding: bool,
    ) -> None:
        super().__init__(name, inputs)
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.ceil, self.count_padding = ceil, count_padding

    def compute(self, *values: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, c, h', w'], summed in float64 so that no order of summation shows."""
        x = values[0].double()
        return F.avg_pool2d(x, self.kernel, self.stride, self.padding, self.ceil, self.count_padding).float()


class GlobalAverage(Op):
    """Mean over height and width."""

    def compute(self, *values: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, c, 1, 1], summed in float64."""
        return values[0].double().mean((2, 3), keepdim=True).float()

    def forward(self, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
        """On codes the integer sum times scale / (scale_out pixels)."""
        (x,), (grid,) = inputs, grids
        if self.grid is None or grid is None:
            return super().forward(inputs, grids)
        unit = torch.tensor(grid.scale) / (torch.tensor(self.grid.scale) * float(x.shape[2] * x.shape[3]))
        total = (x - grid.zero).double().sum((2, 3), keepdim=True).float()
        return self.grid.clamp(torch.round(total * unit.to(x.device)) + self.grid.zero)


class Layer(Op):
    """A convolution or linear layer: value = scale_x scale_w (sum (x - zero_x) (w - zero_w) + bias / fine).

    Args:
        choice: how the weight is quantized.
        factor: what its grid is multiplied by to consist of integers (1 for integer grids).
        reach: the largest |x - zero_x|.

    Attributes:
        codes: [k, ...] integer weight codes, two's complement, in `width` bits.
        zero, scale: [k], or [1] where all channels share them.
        bias: [k] int32 values (kept as int64) in units of scale_x scale_w / fine, or None.
        fine: a power of two by which an 8-bit container may multiply the codes, so that it holds the bias that finely.
        weight, shift: the same layer in float, normalisation folded: for the float twin.
        constant: how many output channels no input can change.
        largest: what |fine sum + bias| cannot exceed.
    """

    codes: Tensor
    zero: Tensor
    scale: Tensor
    bias: Tensor | None
    weight: Tensor
    shift: Tensor | None

    def __init__(self, name: str, inputs: Sequence[str], choice: QuantConfig, factor: int, reach: int) -> None:
        super().__init__(name, inputs)
        self.choice, self.factor, self.reach = choice, factor, reach
        self.constant, self.fine = 0, 1

    @property
    def width(self) -> int:
        """Bits that hold every code: those of the format, or 8 where another grid is embedded in the integers."""
        return self.choice.bits if isinstance(self.choice.format, Integer) else 8

    def hold(self, **tensors: Tensor | None) -> None:
        """Take the tensors; see the attributes. `fine` must be set."""
        for name in ("codes", "zero", "scale", "bias", "weight", "shift"):
            self.register_buffer(name, tensors[name])
        bias = 0 if self.bias is None else int(self.bias.abs().max())
        self.largest = int(self.centred.abs().flatten(1).sum(1).max()) * self.reach * self.fine + bias

    @property
    def centred(self) -> Int[Tensor, "k ..."]:
        """Weight codes less their zero-points."""
        return self.codes - self.zero.view(-1, *[1] * (self.codes.dim() - 1))

    def forward(self, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
        """Exact sums (in float32 where they stay below 2^24, on a CPU, else in float64), then one multiplication."""
        (x,), (grid,) = inputs, grids
        assert grid is not None
        exact = self.largest < EXACT_IN_FLOAT32 and x.device.type == "cpu"
        dtype = torch.float32 if exact else torch.float64
        total = self.accumulate((x - grid.zero).to(dtype), self.centred.to(dtype))
        shape = (-1, *[1] * (self.codes.dim() - 2))
        if self.bias is not None:
            total = total + (self.bias.to(dtype) / self.fine).view(shape)
        unit = (self.scale * grid.scale).view(shape)
        if self.grid is None:
            return total.float() * unit
        ratio = unit / torch.tensor(self.grid.scale, device=x.device)
        return self.grid.clamp(torch.round(total.float() * ratio) + self.grid.zero)

    def accumulate(self, x: Float[Tensor, "n ..."], w: Float[Tensor, "k ..."]) -> Float[Tensor, "n k ..."]:
        """Sums of products of centred codes."""
        raise TypeError(f"{self.kind} is not a layer by itself")


class Conv(Layer):
    """A convolution in two dimensions, padded with zeros; `padding` is top, left, bottom, right."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        choice: QuantConfig,
        factor: int,
        reach: int,
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> None:
        super().__init__(name, inputs, choice, factor, reach)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def accumulate(self, x: Tensor, w: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, k, h', w']."""
        top, left, bottom, right = self.padding
        if (top, left) != (bottom, right):
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        return F.conv2d(x, w, None, self.stride, (top, left), self.dilation, self.groups)


class Linear(Layer):
    """A linear layer on [n, *lead, c]; `lead`: sizes of the axes of tokens, none for one vector an image."""

    lead: tuple[int, ...] = ()

    def accumulate(self, x: Tensor, w: Tensor) -> Tensor:
        """[n, *lead, c] -> [n, *lead, k]."""
        return F.linear(x, w)


class MaxPool(Move):
    """Largest of each window; codes are ordered as their values are."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        ceil: bool,
    ) -> None:
        super().__init__(name, inputs)
        self.kernel, self.stride, self.padding, self.dilation, self.ceil = kernel, stride, padding, dilation, ceil

    def move(self, x: Tensor, zero: int) -> Tensor:
        """[n, c, h, w] -> [n, c, h', w']."""
        return F.max_pool2d(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil)


class Slice(Move):
    """x[..., start:stop:step, ...]; `slices` are (axis, start, stop, step)."""

    def __init__(
        self, name: str, inputs: Sequence[str], slices: Sequence[tuple[int, int | None, int | None, int]]
    ) -> None:
        super().__init__(name, inputs)
        self.slices = tuple(slices)

    def move(self, x: Tensor, zero: int) -> Tensor:
        """A part of the tensor."""
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
