"""From a deployed network to one of integers only: every ratio of scales a dyadic factor, no real number inside.

The arithmetic is that of HAWQ-V3 (Yao et al., ICML 2021, arXiv:2011.10680); docs/export-integer.md has it as a table.
What a deployed network does in float between integer sums (one multiplication, one rounding) is done in integers here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import singledispatch

import torch
from jaxtyping import Float, Int
from torch import Tensor

from supernet.export.dyadic import Dyadic
from supernet.export.graph import Deployed, Grid, Move, Op
from supernet.export.integer_operators import (
    INTEGERS,
    Entrance,
    IntegerAdd,
    IntegerConcat,
    IntegerLayer,
    IntegerMean,
    IntegerPool,
    IntegerProduct,
    Rescale,
    Table,
    wide,
)
from supernet.export.operators import (
    Add,
    AveragePool,
    Concat,
    Conv,
    GlobalAverage,
    Layer,
    MaxPool,
    Pad,
    Pointwise,
    Quantize,
)

RESIDUAL_BITS = 16
SIDE = 46
"""Largest shift of a side of a sum: a lift by 2^16 steps then fits an int64 before the shift."""

ROOM = 29
"""Bits of the largest total that is possible, where totals have to be brought to one scale."""


class IntegerNetwork(Deployed):
    """A deployed network that computes in integers, on the CPU."""

    @property
    def scale(self) -> float:
        """What a logit is to be multiplied by; all classes share it, so that logits compare as integers."""
        return self._answer.scale

    @property
    def _answer(self) -> Grid:
        grid = self.grids[self.result]
        assert grid is not None
        return grid

    def forward(self, x: Float[Tensor, "n ..."]) -> Int[Tensor, "n k"]:
        """Logits in int32, without zero-point."""
        return self.outcome(x).to(torch.int32) - self._answer.zero

    def _steps(self, kept: dict[str, Tensor]) -> Iterator[tuple[Op, Tensor]]:
        for op, made in super()._steps(kept):
            read = [] if isinstance(op, Entrance) else [kept[name] for name in op.inputs]
            assert all(t.dtype in INTEGERS for t in (made, *read)), f"{op.name} sees real numbers"
            yield op, made


@dataclass(frozen=True)
class Place:
    """Where an operator stands.

    Attributes:
        grids: of its inputs.
        before, after: shapes of its first input and its output, one image.
        residual_bits: of the grid on which the sides of a sum meet.
    """

    grids: tuple[Grid, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    residual_bits: int


def integer(deployed: Deployed, residual_bits: int = RESIDUAL_BITS) -> IntegerNetwork:
    """The integer network of a deployed one.

    Args:
        deployed: the network.
        residual_bits: of the grid on which the two sides of a sum meet, 4..16; fewer than 16 cost accuracy.

    Raises:
        ValueError: operators without an integer form, real numbers between operators, scales too far apart.
    """
    if not 4 <= residual_bits <= RESIDUAL_BITS:
        raise ValueError(f"the sides of a sum meet in 4..{RESIDUAL_BITS} bits, got residual_bits={residual_bits}")
    check(deployed)
    sizes = {name: tuple(t.shape) for name, t in deployed.tensors(deployed.example).items()}
    grids: dict[str, Grid] = {}
    ops: list[Op] = []
    for op in deployed.operators():
        read = tuple(grids[name] for name in op.inputs if name in grids)
        try:
            made = lowered(op, Place(read, sizes[op.inputs[0]], sizes[op.name], residual_bits))
        except ValueError as error:
            raise ValueError(f"{op.name} has no integer form: {error}") from error
        grid = read[0] if isinstance(op, Move) else made.grid
        assert grid is not None
        grids[op.name] = grid
        ops.append(made)
    network = IntegerNetwork(ops, deployed.source, deployed.result, deployed.example, deployed.folded, deployed.shape)
    return network.eval()


def check(deployed: Deployed) -> None:
    """Raise ValueError if the network has operators without an integer form; names all of them."""
    found = [(op, _objection(op, deployed)) for op in deployed.operators()]
    found = [(op, reason) for op, reason in found if reason]
    if found:
        listed = "; ".join(f"{op.name} ({op.kind}) {reason}" for op, reason in found)
        raise ValueError(f"an integer network is not possible: {listed}; choose profile=int8 for this network")


def _objection(op: Op, deployed: Deployed) -> str:
    """Why an operator has no integer form; empty: it has one."""
    real = [name for name in op.inputs if deployed.grids[name] is None]
    image = op.inputs == (deployed.source,)
    if isinstance(op, Quantize) and image:
        return ""
    if real and (image or not isinstance(op, Move) or isinstance(op, MaxPool | Pad)):
        return f"reads real numbers ({', '.join(real)})"
    if lowered.dispatch(type(op)) is lowered.dispatch(Op):
        return "has no integer form"
    if isinstance(op, Pointwise) and op.grid is None and len(op.inputs) == 1:
        return "gives real numbers"
    return ""


# -- one function for each operator ------------------------------------------------------------------------------------
@singledispatch
def lowered(op: Op, at: Place) -> Op:
    """The integer form of an operator."""
    raise TypeError(f"{op.name}: {op.kind} is not in integers")


@lowered.register
def _(op: Move, at: Place) -> Op:
    return op


@lowered.register
def _(op: Quantize, at: Place) -> Op:
    grid = _given(op)
    if not at.grids:
        return Entrance(op, grid, None)
    return Rescale(op, grid, Dyadic.of(at.grids[0].scale / grid.scale))


@lowered.register
def _(op: Layer, at: Place) -> Op:
    unit = op.scale.double().cpu() * at.grids[0].scale / op.fine
    if op.grid is None:
        grid, factor = _common(unit, op.largest)
    else:
        grid, factor = op.grid, Dyadic.of(unit / op.grid.scale)
    if factor is not None and isinstance(op, Conv):
        factor = Dyadic(factor.b.view(-1, 1, 1), factor.c.view(-1, 1, 1))
    return IntegerLayer(op, grid, factor)


@lowered.register
def _(op: Add, at: Place) -> Op:
    scale = meeting(at.grids, op.grid, at.residual_bits)
    branches = [Dyadic.of(grid.scale / scale, most=SIDE) for grid in at.grids]
    if op.grid is None:
        return IntegerAdd(op, wide(scale), None, branches)
    return IntegerAdd(op, op.grid, Dyadic.of(scale / op.grid.scale), branches)


@lowered.register
def _(op: Concat, at: Place) -> Op:
    grid = op.grid or wide(max(g.reach * g.scale for g in at.grids) / 2**ROOM)
    return IntegerConcat(op, grid, [Dyadic.of(g.scale / grid.scale) for g in at.grids], op.axis)


@lowered.register
def _(op: GlobalAverage, at: Place) -> Op:
    pixels = at.before[2] * at.before[3]
    unit = at.grids[0].scale / pixels
    if op.grid is None:
        return IntegerMean(op, wide(unit), None, pixels)
    return IntegerMean(op, op.grid, Dyadic.of(unit / op.grid.scale), pixels)


@lowered.register
def _(op: AveragePool, at: Place) -> Op:
    (top, left), last = op.padding, []
    for side, kernel, stride, size, before in zip(
        at.before[2:], op.kernel, op.stride, at.after[2:], op.padding, strict=True
    ):
        last.append(max(before, (size - 1) * stride + kernel - side - before))
    padding = (top, left, last[0], last[1])
    unit = at.grids[0].scale / _counts(op, at, padding)
    if op.grid is None:
        grid, factor = _common(unit, at.grids[0].reach * math.prod(op.kernel))
    else:
        grid, factor = op.grid, Dyadic.of(unit / op.grid.scale)
    return IntegerPool(op, grid, factor, padding, at.before[1])


def _counts(op: AveragePool, at: Place, padding: tuple[int, int, int, int]) -> Float[Tensor, "..."]:
    """By how many pixels each window is divided, [h', w']; [1, 1] where that is always the same.

    torch counts padding, if it is asked to, but not what `ceil` adds behind it.
    """
    height, width = at.before[2:]
    (rows, columns) = op.padding if op.count_padding else (0, 0)
    counting = torch.zeros(1, 1, height + padding[0] + padding[2], width + padding[1] + padding[3])
    top, left = padding[0] - rows, padding[1] - columns
    counting[..., top : top + height + 2 * rows, left : left + width + 2 * columns] = 1
    counts = torch.nn.functional.conv2d(counting, torch.ones(1, 1, *op.kernel), None, op.stride)[0, 0].double()
    return counts[:1, :1] if bool((counts == counts[0, 0]).all()) else counts


@lowered.register
def _(op: Pointwise, at: Place) -> Op:
    if op.function == "mul":
        unit = at.grids[0].scale * at.grids[1].scale
        if op.grid is None:
            return IntegerProduct(op, wide(unit), None)
        return IntegerProduct(op, op.grid, Dyadic.of(unit / op.grid.scale))
    return Table(op, _given(op), op([torch.arange(256.0)], at.grids))


def _given(op: Op) -> Grid:
    assert op.grid is not None
    return op.grid


def _common(unit: Float[Tensor, " k"], largest: int) -> tuple[Grid, Dyadic | None]:
    """One 32-bit grid for totals that have units of their own, at most `largest` each."""
    if bool((unit == unit.flatten()[0]).all()):
        return wide(float(unit.flatten()[0])), None
    scale = float(unit.max()) * max(largest, 1) / 2**ROOM
    return wide(scale), Dyadic.of(unit / scale)


def meeting(sides: tuple[Grid, ...], out: Grid | None, bits: int) -> float:
    """The step of the grid on which the sides of a sum meet: the finest with room for all they can add up to.

    It is the output's step times a power of two, so that the last rescaling is a shift alone. Each side may be rounded
    up by half a step.
    """
    finest = sum(grid.reach * grid.scale for grid in sides) / (2 ** (bits - 1) - 2)
    return finest if out is None else out.scale * 2.0 ** math.ceil(math.log2(finest / out.scale))
