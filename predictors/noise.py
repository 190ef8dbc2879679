"""The error that a subnet's choices make, as a sum whose terms are weighed anew from what was measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

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
    """

    def __init__(self, space: SearchSpace, factors: Factors | None, encoding: Encoding) -> None:
        self.space, self.of_genes = space, factors is None
        if factors is None:
            self._of_genes(encoding)
        else:
            self._of_factors([(dims, table) for dims, table in factors.terms if dims])

    def _of_genes(self, encoding: Encoding) -> None:
        kinds = Kinds(self.space)
        values, traits = [], []
        for d in self.space.dimensions:
            sizes = np.array([magnitude(c) for c in d.choices], dtype=float)
            values += [4.0**-sizes if d.quantizes else 4.0**-3 * (1 - sizes / sizes.max()), np.zeros(1)]
            traits += [kinds.of(d), np.zeros((1, kinds.width))]
        owner = np.repeat(np.arange(len(self.space)), [len(d.choices) + 1 for d in self.space.dimensions])
        self._keep(np.concatenate(values), owner, np.concatenate(traits))

    def _of_factors(self, terms: Sequence[tuple[tuple[int, ...], NDArray[np.float64]]]) -> None:
        kinds = Kinds(self.space)
        arity = max((len(dims) for dims, _ in terms), default=1)
        self.positions = np.zeros((arity, len(terms)), dtype=np.int64)
        self.strides = np.zeros((arity, len(terms)), dtype=np.int64)
        values, traits = [np.zeros(0)], [np.zeros((0, kinds.width))]
        for t, (dims, table) in enumerate(terms):
            self.positions[: len(dims), t] = dims
            self.strides[: len(dims), t] = [int(np.prod(table.shape[k + 1 :])) for k in range(len(dims))]
            values.append(table.ravel())
            grid = np.zeros((*table.shape, kinds.width))
            for axis, i in enumerate(dims):
                if self.space.dimensions[i].quantizes:
                    shape = [1] * table.ndim + [kinds.width]
                    shape[axis] = table.shape[axis]
                    grid = grid + kinds.of(self.space.dimensions[i]).reshape(shape)
            traits.append(grid.reshape(-1, kinds.width))
        sizes = np.array([table.size for _, table in terms], dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)[: len(terms)]
        self._keep(np.concatenate(values), np.repeat(np.arange(len(terms)), sizes), np.concatenate(traits))

    def _keep(self, values: NDArray[np.float64], owner: NDArray[np.int64], traits: NDArray[np.float64]) -> None:
        self.values = torch.from_numpy(np.maximum(values, 0.0).astype(np.float32))
        self.owner = torch.from_numpy(owner)
        self.traits = torch.from_numpy(traits.astype(np.float32))

    @property
    def count(self) -> int:
        """Number of terms."""
        return int(self.owner[-1]) + 1 if len(self.owner) else 0

    def codes(self, rows: Indices, genes: Int[Tensor, "n d"]) -> Int[Tensor, "n t"]:
        """Which entries canonical rows [n, d] look up; `genes`: their codes in the encoding."""
        if self.of_genes:
            return genes
        codes = self.offsets + sum(rows[:, p] * s for p, s in zip(self.positions, self.strides, strict=True))
        return torch.from_numpy(codes)


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


def looked_sum(codes: Int[Tensor, "n t"], entries: Float[Tensor, "rows m"]) -> Float[Tensor, "m n"]:
    """Logarithm of the sum of the entries that each row looks up, for every member."""
    return logarithm(torch.nn.functional.embedding_bag(codes, entries, mode="sum"))


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
