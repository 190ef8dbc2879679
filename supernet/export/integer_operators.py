"""Operators that take integers, compute in integers and give integers.

Each sums in int32 and ends in one rescaling (`supernet.export.dyadic`) onto the grid of its output. The only real
numbers are those that `Entrance` reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from supernet.export.dyadic import Dyadic
from supernet.export.graph import Grid, Op
from supernet.export.operators import AveragePool, Conv, Layer

WIDE = 32
"""Bits of totals that are given as they are, without a zero-point."""

INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def kept_as(grid: Grid) -> torch.dtype:
    """The type in which integers of a grid are kept between operators."""
    return torch.int32 if grid.bits == WIDE else torch.uint8


def wide(scale: float) -> Grid:
    """The grid of 32-bit totals with a scale."""
    most = 2 ** (WIDE - 1) - 1
    return Grid(scale, 0, -most, most, WIDE)


class IntegerOp(Op):
    """An operator on integers.

    Args:
        source: the operator that it stands for.
        grid: of the output.
        factor: from totals to the grid; None: the totals are what is given.
    """

    grid: Grid

    def __init__(self, source: Op, grid: Grid, factor: Dyadic | None) -> None:
        super().__init__(source.name, source.inputs)
        self.grid, self.factor = grid, factor
        self.activation, self.site, self.stands_for = source.activation, source.site, source.kind

    @property
    def kind(self) -> str:
        """The kind of the operator that this one stands for."""
        return self.stands_for

    def forward(self, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
        """Integers to integers: total, rescale, add the zero-point, clamp."""
        total = self.total([x.to(torch.int32) for x in inputs], [_zero(grid) for grid in grids])
        codes = total.to(torch.int32) if self.factor is None else self.factor(total) + self.grid.zero
        return codes.clamp(self.grid.low, self.grid.high).to(kept_as(self.grid))

    def total(self, inputs: Sequence[Int[Tensor, "..."]], zeros: Sequence[int]) -> Int[Tensor, "..."]:
        """What the operator sums up, in int32."""
        raise TypeError(f"{self.kind} has no integer form")


def _zero(grid: Grid | None) -> int:
    assert grid is not None
    return grid.zero


class Entrance(IntegerOp):
    """From the real input to codes: the interface, and the one place that sees real numbers. Rounds ties to even."""

    def forward(self, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
        """Values to codes."""
        return self.grid.encode(inputs[0]).to(kept_as(self.grid))


class Rescale(IntegerOp):
    """From one grid onto another."""

    def total(self, inputs: Sequence[Tensor], zeros: Sequence[int]) -> Tensor:
        """code - zero."""
        return inputs[0] - zeros[0]


class IntegerLayer(IntegerOp):
    """A convolution or linear layer: sum (x - zero) w + bias, in int32.

    Args:
        layer: what it stands for.
        grid, factor: see `IntegerOp`; one factor for each channel, or for all.

    Attributes:
        weight: int32 [k, ...], the centred codes times `layer.fine`.
        bias: int32 [k], in units of the sums; or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Layer, grid: Grid, factor: Dyadic | None) -> None:
        super().__init__(layer, grid, factor)
        self.layer = layer
        self.register_buffer("weight", (layer.centred.int() * layer.fine).cpu())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.int().cpu())

    def total(self, inputs: Sequence[Tensor], zeros: Sequence[int]) -> Tensor:
        """[n, c, ...] -> [n, k, ...]; `fold` has checked that no input leads beyond an int32."""
        # torch has no dilated convolution of int32.
        dilated = isinstance(self.layer, Conv) and self.layer.dilation != (1, 1)
        x, w = inputs[0] - zeros[0], self.weight
        sums = self.layer.accumulate(*((x.long(), w.long()) if dilated else (x, w))).to(torch.int32)
        return sums if self.bias is None else sums + self.bias.view(-1, *[1] * (w.dim() - 2))


class IntegerAdd(IntegerOp):
    """Sum of two tensors, both first rescaled to one grid of int16.

    HAWQ-V3, section 3: the sum stays in 16 bits; the site behind it, 8 bits in our networks, comes last.

    Args:
        source, grid, factor: see `IntegerOp`.
        branches: from each input's steps to those of the sum.
    """

    def __init__(self, source: Op, grid: Grid, factor: Dyadic | None, branches: Sequence[Dyadic]) -> None:
        super().__init__(source, grid, factor)
        self.branches = tuple(branches)

    def total(self, inputs: Sequence[Tensor], zeros: Sequence[int]) -> Tensor:
        """The sum of the branches, in int16."""
        first, second = (f(x - z).to(torch.int16) for f, x, z in zip(self.branches, inputs, zeros, strict=True))
        return first + second


class IntegerConcat(IntegerOp):
    """Tensors joined along an axis, each first rescaled to the output's grid."""

    def __init__(self, source: Op, grid: Grid, branches: Sequence[Dyadic], axis: int) -> None:
        super().__init__(source, grid, None)
        self.branches, self.axis = tuple(branches), axis

    def total(self, inputs: Sequence[Tensor], zeros: Sequence[int]) -> Tensor:
        """The rescaled tensors in a row, with the output's zero-point."""
        parts = [f(x - z) + self.grid.zero for f, x, z in zip(self.branches, inputs, zeros, strict=True)]
        return torch.cat(parts, self.axis)


class IntegerProduct(IntegerOp):
    """Product of two tensors."""

    def total(self, inputs: Sequence[Tensor], zeros: Sequence[int]) -> Tensor:
        """(a - zero_a) (b - zero_b)."""
        return (inputs[0] - zeros[0]) * (inputs[1] - zeros[1])


class IntegerMean(IntegerOp):
    """Mean over height and width: the sum, with the number of `pixels` in the factor, so that it is rounded once."""

    def __init__(self, source: Op, grid: Grid, factor: Dyadic | None, pixels: int) -> None:
        super().__init__(source, grid, factor)
        self.pixels = pixels

    def total(self, inputs: Sequence[Tensor], zeros: Sequence[int]) -> Tensor:
        """[n, c, h, w] -> [n, c, 1, 1]."""
        return (inputs[0] - zeros[0]).sum((2, 3), keepdim=True, dtype=torch.int32)


class IntegerPool(IntegerOp):
    """Mean of each window: sums, with the number of pixels that count in the factor.

    Args:
        pool: what it stands for.
        grid, factor: see `IntegerOp`; one factor for all windows, or [h', w'].
        padding: top, left, bottom, right, with the rows and columns that `ceil` adds.
        channels: of the input.
    """

    def __init__(
        self,
        pool: AveragePool,
        grid: Grid,
        factor: Dyadic | None,
        padding: tuple[int, int, int, int],
        channels: int,
    ) -> None:
        super().__init__(pool, grid, factor)
        self.kernel, self.stride, self.padding, self.channels = pool.kernel, pool.stride, padding, channels

    def total(self, inputs: Sequence[Tensor], zeros: Sequence[int]) -> Tensor:
        """[n, c, h, w] -> [n, c, h', w']."""
        x = inputs[0] - zeros[0]
        top, left, bottom, right = self.padding
        ones = x.new_ones(x.shape[1], 1, *self.kernel)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), ones, None, self.stride, groups=x.shape[1])


class Table(IntegerOp):
    """Any function of one uint8 code: its 256 results.

    Args:
        source: the operator.
        grid: of the output, in uint8.
        table: uint8 [256].
    """

    table: Tensor

    def __init__(self, source: Op, grid: Grid, table: Int[Tensor, " 256"]) -> None:
        super().__init__(source, grid, None)
        self.register_buffer("table", table.to(kept_as(grid)))

    def forward(self, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
        """Codes to codes."""
        return self.table[inputs[0].long()]
