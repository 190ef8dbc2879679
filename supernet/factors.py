"""Functions of a subnet that can be evaluated in bulk and limited exactly: sums of lookups, and what is made of them.

The one form of a sum of lookups is tilted by the cost-first sampler and solved by the integer program; a cost that is
no such sum (a maximum, an average) says by which sums it is limited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from supernet.config import Choice
from supernet.space import Indices, SearchSpace, magnitude

Table = NDArray[np.float64]
Term = tuple[tuple[int, ...], Table]
Condition = tuple[tuple[str, tuple[Choice, ...]], ...]


class Cost(Protocol):
    """A kind of cost: it is evaluated in bulk, and a limit on it is a conjunction of limits on sums.

    Attributes:
        parts: sums of lookups, from which the limited sums are put together.
    """

    @property
    def parts(self) -> tuple[Factors, ...]: ...

    def value(self, indices: Indices) -> Table:
        """[n] values of canonical rows [n, d], none below 0."""
        ...

    def linear(self, limit: float) -> tuple[Table, Table]:
        """Weights [r, parts], none below 0, and bounds [r], all above 0: exactly those subnets are within `limit` (> 0)
        whose weighted sums of the parts are each at most its bound."""
        ...


@dataclass(frozen=True)
class Factors:
    """A function of a subnet that is a sum of tables, each looked up by a few genes.

    Attributes:
        terms: (positions of the dimensions, table whose axes are their choices). No positions: a constant.
    """

    terms: tuple[Term, ...] = field(default_factory=tuple)

    def value(self, indices: Indices) -> Table:
        """[n] values of canonical rows [n, d]."""
        indices = np.asarray(indices)
        total = np.zeros(len(indices))
        for dimensions, table in self.terms:
            total += table[tuple(indices[:, i] for i in dimensions)]
        return total

    @property
    def parts(self) -> tuple[Factors, ...]:
        """Itself: the one sum that a limit is put on."""
        return (self,)

    def linear(self, limit: float) -> tuple[Table, Table]:
        """Once itself, at most the limit."""
        return np.ones((1, 1)), np.array([limit])

    def __add__(self, other: Factors) -> Factors:
        return Factors(self.terms + other.terms)

    def __mul__(self, factor: float) -> Factors:
        return Factors(tuple((dims, table * factor) for dims, table in self.terms))


class Conditional(Protocol):
    """What runs in some architectures only, e.g. a Layer."""

    @property
    def active_if(self) -> Condition: ...


def gated(space: SearchSpace, layer: Conditional, genes: Sequence[str], table: Table) -> Term:
    """One term: `table` over `genes` where the layer runs, 0 where it does not."""
    dims = [space.position[g] for g in genes]
    for name, allowed in layer.active_if:
        other = space.position[name]
        on = np.array([c in allowed for c in space.dimensions[other].choices], dtype=float)
        if not on.all():
            dims, table = [*dims, other], table[..., None] * on
    return tuple(dims), table


def bits_of(space: SearchSpace, name: str) -> Table:
    """Bits of each choice of a dimension."""
    return np.array([magnitude(c) for c in space.dimensions[space.position[name]].choices], dtype=float)
