"""The deployed network: integer codes between operators, and exact integer arithmetic inside layers.

A `Deployed` is a list of operators over named tensors. A tensor either sits on a `Grid` (then its codes are kept) or
holds real numbers. Run in torch it is the reference that every written file is compared with, and whose accuracy is
reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from supernet.quant.quantizer import Quantizer

LAST_BIT = 2.0**-23
SHIFT = 128
"""Signed codes are kept as unsigned ones: +128 on code and zero-point leaves every value as it is."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The uint8 codes of one tensor: value = (code - zero) * scale, low <= code <= high.

    | activation | codes of the quantizer  | low .. high here              |
    |------------|-------------------------|-------------------------------|
    | unsigned   | 0 .. 2^b - 1            | 0 .. 2^b - 1                  |
    | signed     | -2^(b-1) .. 2^(b-1) - 1 | 128 - 2^(b-1) .. 127 + 2^(b-1) |

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
        with torch.no_grad():
            scale, zero, low, high = (float(t) for t in quantizer.parameters_of(torch.zeros(1)))
        shift = 0 if quantizer.unsigned else SHIFT
        return cls(scale, int(zero) + shift, int(low) + shift, int(high) + shift, quantizer.choices[0].bits)

    def encode(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Codes, as floats."""
        return self.clamp(torch.round(value / torch.tensor(self.scale, device=value.device)) + self.zero)

    def decode(self, codes: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Values of codes."""
        return (codes - self.zero) * self.scale

    def clamp(self, codes: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Codes within their bounds."""
        return torch.clamp(codes, self.low, self.high)

    def after(self, activation: str | None) -> Grid:
        """The grid with a `relu` or `relu6` before it moved into its bounds.

        Rounding and clamping are monotone, so clamp(round(relu(v) / s) + z, lo, hi) is exactly
        clamp(round(v / s) + z, max(lo, z), hi); with ReLU6 the upper bound becomes min(hi, round(6 / s) + z).
        """
        if activation is None:
            return self
        bounds = {"relu": (0.0, torch.inf), "relu6": (0.0, 6.0)}[activation]
        low, high = (int(self.encode(torch.tensor(v))) for v in bounds)
        return dataclasses.replace(self, low=low, high=high)

    @property
    def reach(self) -> int:
        """The largest |code - zero|."""
        return max(self.high - self.zero, self.zero - self.low)

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
        """What is kept of the output: codes (as floats) where it has a grid, else values; `inputs` are kept tensors."""
        values = [x if grid is None else grid.decode(x) for x, grid in zip(inputs, grids, strict=True)]
        value = self.compute(*values)
        return value if self.grid is None else self.grid.encode(value)

    def compute(self, *values: Tensor) -> Tensor:
        """The operator on values."""
        raise TypeError(f"{self.kind} computes on codes")


class Move(Op):
    """An operator that only moves values: it works on codes as they are; its output has the grid of its input."""

    def forward(self, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
        """Codes to codes, or values to values."""
        return self.move(inputs[0], 0 if grids[0] is None else grids[0].zero)

    def move(self, x: Tensor, zero: int) -> Tensor:
        """The moved tensor; `zero` is what stands for 0.0."""
        raise TypeError(f"{self.kind} is not an operator by itself")


class Deployed(nn.Module):
    """A network of operators over named tensors; see the head of this file.

    Args:
        ops: in order of execution.
        source: name of the input tensor (real numbers).
        result: name of the output tensor.
        example: one input [1, ...].
        folded: how many BatchNorms went into layers.
        shape: of the output, without the batch.
    """

    def __init__(
        self, ops: Sequence[Op], source: str, result: str, example: Tensor, folded: int, shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.ops = nn.ModuleList(ops)
        self.source, self.result, self.example = source, result, example
        self.folded, self.shape = folded, shape
        self.grids: dict[str, Grid | None] = {source: None}
        for op in ops:
            if isinstance(op, Move):
                op.grid = self.grids[op.inputs[0]]
            self.grids[op.name] = op.grid
        self._last = {name: op.name for op in ops for name in op.inputs} | {result: ""}

    def operators(self) -> list[Op]:
        """The operators in order of execution."""
        return [op for op in self.ops if isinstance(op, Op)]

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n k"]:
        """Logits."""
        grid, made = self.grids[self.result], self.outcome(x)
        return made if grid is None else grid.decode(made)

    @torch.no_grad()
    def outcome(self, x: Float[Tensor, "n ..."]) -> Tensor:
        """The last tensor as it is kept; what nobody reads any more is dropped on the way."""
        kept = {self.source: x}
        for op, made in self._steps(kept):
            kept[op.name] = made
            for name in op.inputs:
                if self._last[name] == op.name:
                    kept.pop(name, None)
        return kept[self.result]

    @property
    def coupled(self) -> bool:
        """Whether codes depend on real numbers between operators, which two right evaluations round differently."""
        return any(op.grid is None and op.name != self.result for op in self.operators())

    @torch.no_grad()
    def jittered(self, x: Float[Tensor, "n ..."], rng: torch.Generator) -> Float[Tensor, "n k"]:
        """Logits where every real number between operators is off by about its last bit, at random: another right
        evaluation. How far it is from `forward` says how far a file may be."""
        kept = {self.source: x}
        for op, made in self._steps(kept):
            off = 0 if op.grid is not None else LAST_BIT * torch.randn(made.shape, generator=rng).to(made.device)
            kept[op.name] = made * (1 + off)
        grid = self.grids[self.result]
        return kept[self.result] if grid is None else grid.decode(kept[self.result])

    @torch.no_grad()
    def tensors(self, x: Float[Tensor, "n ..."]) -> dict[str, Tensor]:
        """Every tensor by name: codes (as floats) where it has a grid, else values."""
        kept = {self.source: x}
        for op, made in self._steps(kept):
            kept[op.name] = made
        return kept

    def _steps(self, kept: dict[str, Tensor]) -> Iterator[tuple[Op, Tensor]]:
        for op in self.operators():
            yield op, op([kept[n] for n in op.inputs], [self.grids[n] for n in op.inputs])
