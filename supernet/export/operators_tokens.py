"""The operators of transformers: products of two activations in integers, what surrounds them in float."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from supernet.config import QuantConfig
from supernet.export.graph import Grid, Move, Op
from supernet.export.operators import EXACT_IN_FLOAT32

INT32 = 2**31 - 1


class Product(Op):
    """factor * left @ right, both on grids: value = factor scale_l scale_r sum (l - zero_l) (r - zero_r).

    Args:
        choice: how the right operand, which stands in the place of a weight, is quantized.
        factor: goes into the left operand's scale.
        depth: terms of each sum.
        grids: of both operands.

    Raises:
        ValueError: sums beyond int32.
    """

    def __init__(
        self, name: str, inputs: Sequence[str], choice: QuantConfig, factor: float, depth: int, grids: Sequence[Grid]
    ) -> None:
        super().__init__(name, inputs)
        self.choice, self.factor, self.depth = choice, factor, depth
        self.largest = depth * grids[0].reach * grids[1].reach
        if self.largest > INT32:
            raise ValueError(
                f"{name} sums {depth} products, up to {self.largest:.3g}, more than an int32 holds; give its operands "
                "fewer bits"
            )

    def left_scale(self, grid: Grid) -> Tensor:
        """Scale of the left operand with the factor in it, in float32."""
        return torch.tensor(grid.scale) * torch.tensor(self.factor)

    def forward(self, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
        """Exact sums, then one multiplication, as kernels do."""
        left, right = grids
        assert left is not None and right is not None
        exact = self.largest < EXACT_IN_FLOAT32 and inputs[0].device.type == "cpu"
        dtype = torch.float32 if exact else torch.float64
        total = ((inputs[0] - left.zero).to(dtype) @ (inputs[1] - right.zero).to(dtype)).float()
        unit = self.left_scale(left) * torch.tensor(right.scale)
        if self.grid is None:
            return total * unit.to(total.device)
        ratio = unit / torch.tensor(self.grid.scale)
        return self.grid.clamp(torch.round(total * ratio.to(total.device)) + self.grid.zero)


class LayerNorm(Op):
    """(x - mean) / sqrt(var + eps) * gain + offset over the last axes."""

    gain: Tensor
    offset: Tensor

    def __init__(self, name: str, inputs: Sequence[str], gain: Tensor, offset: Tensor, eps: float) -> None:
        super().__init__(name, inputs)
        self.register_buffer("gain", gain.detach().float())
        self.register_buffer("offset", offset.detach().float())
        self.eps = eps

    def compute(self, *values: Tensor) -> Tensor:
        """[..., c] -> [..., c]."""
        return F.layer_norm(values[0], self.gain.shape, self.gain, self.offset, self.eps)


class Softmax(Op):
    """Softmax along one axis."""

    def __init__(self, name: str, inputs: Sequence[str], axis: int) -> None:
        super().__init__(name, inputs)
        self.axis = axis

    def compute(self, *values: Tensor) -> Tensor:
        """Shares that sum to 1."""
        return torch.softmax(values[0], self.axis)


class _WithConstant(Op):
    """An operator on one tensor and a constant that broadcasts against it."""

    constant: Tensor

    def __init__(self, name: str, inputs: Sequence[str], constant: Tensor) -> None:
        super().__init__(name, inputs)
        self.register_buffer("constant", constant.detach().float())


class Shift(_WithConstant):
    """A constant (a position embedding) added to a tensor."""

    def compute(self, *values: Tensor) -> Tensor:
        """x + constant."""
        return values[0] + self.constant


class Scale(_WithConstant):
    """A tensor multiplied by a constant (a layer scale)."""

    def compute(self, *values: Tensor) -> Tensor:
        """x * constant."""
        return values[0] * self.constant


class Mean(Op):
    """Mean over some axes."""

    def __init__(self, name: str, inputs: Sequence[str], axes: Sequence[int], keep: bool) -> None:
        super().__init__(name, inputs)
        self.axes, self.keep = tuple(axes), keep

    def compute(self, *values: Float[Tensor, "n ..."]) -> Tensor:
        """Summed in float64, so that no order of summation shows."""
        return values[0].double().mean(self.axes, self.keep).float()


class Transpose(Move):
    """Axes in another order; the batch stays first."""

    def __init__(self, name: str, inputs: Sequence[str], order: Sequence[int]) -> None:
        super().__init__(name, inputs)
        self.order = tuple(order)

    def move(self, x: Tensor, zero: int) -> Tensor:
        """The same elements along other axes."""
        return x.permute(self.order)
