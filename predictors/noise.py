"""The error that a subnet's choices make, as a sum whose terms are weighed anew from what was measured."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from predictors.encoding import Encoding, columns
from supernet.cost import Factors
from supernet.space import Dimension, Indices, SearchSpace, magnitude

TINY = 1e-12
LARGEST = 10**8
"""Elements of a matrix of counts."""


class Terms:
    """A sensitivity, flat: one number for each entry of each of its tables, and where a row finds its own.

    First come the entries of single genes, laid out as the encoding's tables are (an inactive gene has an entry of its
    own, 0), so that the encoding's codes find them; a term that also looks at what its gene depends on is one of these.
    The tables over several genes follow, each with codes of its own.

    Args:
        space: of the rows.
        factors: the sensitivity; None: the variance of rounding, 4^-bits of every quantized tensor, and for every other
            dimension the share that is missing of its largest choice, in units of a 3-bit tensor.
        encoding: of the same space.

    Attributes:
        values: [entries] of all tables, one after the other; what is below 0 counts as 0.
        owner: [entries] which term each belongs to.
        traits: [entries, p] what a term's entries have in common with those of other terms: bits, granularity, ... of
            weights, and of inputs. 0 where no quantized gene looks the entry up.
        single: number of entries of single genes.
    """

    def __init__(self, space: SearchSpace, factors: Factors | None, encoding: Encoding) -> None:
        self.space, kinds = space, Kinds(space)
        alone, joint = (rounding(space), []) if factors is None else separated(space, factors)
        values = [np.append(table, 0.0) for table in alone]
        traits = [np.pad(kinds.of(d), ((0, 1), (0, 0))) for d in space.dimensions]
        self.single = sum(map(len, values))
        arity = max((len(dims) for dims, _ in joint), default=1)
        self.positions = np.zeros((arity, len(joint)), dtype=np.int64)
        self.strides = np.zeros((arity, len(joint)), dtype=np.int64)
        for t, (dims, table) in enumerate(joint):
            self.positions[: len(dims), t] = dims
            self.strides[: len(dims), t] = [int(np.prod(table.shape[k + 1 :])) for k in range(len(dims))]
            values.append(table.ravel())
            traits.append(_joint_traits(space, dims, table, kinds))
        sizes = np.array([len(v) for v in values], dtype=np.int64)
        self.offsets = (np.cumsum(sizes) - sizes)[len(alone) :]
        self.values = torch.from_numpy(np.maximum(np.concatenate(values), 0.0).astype(np.float32))
        self.owner = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
        self.traits = torch.from_numpy(np.concatenate(traits).astype(np.float32))

    @property
    def count(self) -> int:
        """Number of terms, one for each gene and one for each table over several."""
        return int(self.owner[-1]) + 1

    def codes(self, rows: Indices) -> Int[Tensor, "n t"]:
        """Which entries canonical rows [n, d] look up besides those of their single genes."""
        codes = np.tile(self.offsets, (len(rows), 1))
        for position, stride in zip(self.positions, self.strides, strict=True):
            codes += rows[:, position] * stride
        return torch.from_numpy(codes)


def rounding(space: SearchSpace) -> list[NDArray[np.float64]]:
    """What each choice of each dimension is presumed to cost where nothing was measured."""
    sizes = [np.array([magnitude(c) for c in d.choices], dtype=float) for d in space.dimensions]
    return [
        4.0**-s if d.quantizes else 4.0**-3 * (1 - s / s.max()) for s, d in zip(sizes, space.dimensions, strict=True)
    ]


def separated(
    space: SearchSpace, factors: Factors
) -> tuple[list[NDArray[np.float64]], list[tuple[tuple[int, ...], NDArray[np.float64]]]]:
    """For each dimension the sum of the terms over it alone, and the terms over several."""
    alone, joint = [np.zeros(len(d.choices)) for d in space.dimensions], []
    for dims, table in factors.terms:
        found = _of_one_gene(space, dims, table)
        if found is not None:
            alone[found[0]] = alone[found[0]] + found[1]
        elif dims:  # a constant moves the curve and orders nothing
            joint.append((dims, table))
    return alone, joint


def _of_one_gene(
    space: SearchSpace, dims: tuple[int, ...], table: NDArray[np.float64]
) -> tuple[int, NDArray[np.float64]] | None:
    """(dimension, its table) of a term that looks at one gene, and else only at whether that is active."""
    for axis, i in enumerate(dims):
        gates = {space.position[name]: allowed for name, allowed in space.dimensions[i].active_if}
        if set(dims) - {i} <= gates.keys() and not any(space.dimensions[g].active_if for g in gates):
            on = np.ones(table.shape, dtype=bool)
            for k, g in enumerate(dims):
                if g != i:
                    allowed = np.array([c in gates[g] for c in space.dimensions[g].choices])
                    on &= allowed.reshape([-1 if j == k else 1 for j in range(table.ndim)])
            at = np.moveaxis(on, axis, 0)[0].ravel()
            flat = np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1)
            if at.any() and (flat[:, ~at] == 0).all() and (flat[:, at] == flat[:, at][:, :1]).all():
                return i, flat[:, at][:, 0]
    return None


def _joint_traits(
    space: SearchSpace, dims: tuple[int, ...], table: NDArray[np.float64], kinds: Kinds
) -> NDArray[np.float64]:
    """[entries, p] sum of the traits of the quantized choices that look an entry up."""
    grid = np.zeros((*table.shape, kinds.width))
    for axis, i in enumerate(dims):
        shape = [table.shape[k] if k == axis else 1 for k in range(table.ndim)]
        grid = grid + kinds.of(space.dimensions[i]).reshape([*shape, kinds.width])
    return grid.reshape(-1, kinds.width)


class Kinds:
    """Columns for the traits of quantized choices: those of weights, of inputs, ... beside each other.

    Args:
        space: whose dimensions end in the kind's name.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.choices: dict[str, dict[object, int]] = {}
        for d in space.dimensions:
            if d.quantizes:
                known = self.choices.setdefault(kind(d), {})
                for c in d.choices:
                    known.setdefault(c, len(known))
        self.tables = {name: columns(list(known)) for name, known in self.choices.items()}  # type: ignore[arg-type]
        ends = np.cumsum([0, *(t.shape[1] for t in self.tables.values())])
        self.starts, self.width = dict(zip(self.tables, ends.tolist(), strict=False)), int(ends[-1])

    def of(self, dimension: Dimension) -> NDArray[np.float64]:
        """[choices, p] traits of each choice; zeros for an architecture dimension."""
        found = np.zeros((len(dimension.choices), self.width))
        if dimension.quantizes:
            name = kind(dimension)
            table = self.tables[name][[self.choices[name][c] for c in dimension.choices]]
            found[:, self.starts[name] : self.starts[name] + table.shape[1]] = table
        return found


def kind(dimension: Dimension) -> str:
    """`weight` of `layer1.0.conv1.weight`."""
    return dimension.name.rpartition(".")[2]


def sums(codes: Int[Tensor, "n t"], rows: int) -> Callable[[Float[Tensor, "rows m"]], Float[Tensor, "n m"]]:
    """A function that sums the entries that each row looks up, made to be used often and backwards.

    As a product with a matrix of counts, which is several times faster backwards, unless that were too large.
    """
    if codes.shape[0] * rows > LARGEST:
        return functools.partial(torch.nn.functional.embedding_bag, codes, mode="sum")
    counts = torch.zeros(len(codes), rows).scatter_add_(1, codes, torch.ones(codes.shape))
    return functools.partial(torch.matmul, counts)


def logarithm(sums: Float[Tensor, "n m"]) -> Float[Tensor, "m n"]:
    """Of sums that may be 0."""
    return sums.clamp_min(TINY).log().T
