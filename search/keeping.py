"""What a search remembers: the best rows within each budget, and which rows it has met."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.variation import Limits
from supernet.space import Indices

Table = NDArray[np.float64]


class Best:
    """The best rows within each budget, best first; of equal scores, the cheaper.

    Args:
        limits: the budgets.
        keep: rows kept for each.

    Attributes:
        rows, values: for each budget [at most keep, d] rows and their objectives [., 1 + kinds].
    """

    def __init__(self, limits: Limits, keep: int = 1) -> None:
        self.limits, self.keep = limits, keep
        self.rows = [np.zeros((0, len(limits.space)), dtype=np.int64) for _ in limits.budgets]
        self.values = [np.zeros((0, 1 + len(limits.kinds))) for _ in limits.budgets]

    def add(self, rows: Indices, values: Table) -> None:
        """Rows [n, d] with objectives [n, 1 + kinds], to be minimised; each counts under every budget that it keeps."""
        for b, budget in enumerate(self.limits.budgets):
            inside = (values[:, 1:] <= self.limits.bounds[b]).all(1)
            if len(self.rows[b]) == self.keep:
                inside &= values[:, 0] <= self.values[b][-1, 0]
            every = np.concatenate([self.rows[b], rows[inside]])
            theirs = np.concatenate([self.values[b], values[inside]])
            cost = theirs[:, 1 + self.limits.kinds.index(next(iter(budget)))]
            order = np.lexsort((cost, theirs[:, 0]))
            order = order[firsts(every[order])][: self.keep]
            self.rows[b], self.values[b] = every[order], theirs[order]

    def front(self) -> tuple[Indices, Table]:
        """Non-dominated rows of all that are kept, and their objectives; by falling score."""
        return front_of(np.concatenate(self.rows), np.concatenate(self.values))

    def state_dict(self) -> dict[str, Any]:
        """Rows and objectives of each budget, as lists."""
        return {"rows": [r.tolist() for r in self.rows], "values": [v.tolist() for v in self.values]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; ValueError if that was of another number of budgets."""
        if len(state["rows"]) != len(self.limits):
            raise ValueError(f"state is of {len(state['rows'])} budgets, this search has {len(self.limits)}")
        for b, (rows, values) in enumerate(zip(state["rows"], state["values"], strict=True)):
            self.rows[b], self.values[b] = arrays(self.limits, rows, values)


class Seen:
    """Which rows were met, so that none is asked for twice."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()

    def fresh(self, rows: Indices) -> NDArray[np.bool_]:
        """[n] whether each row was never met, and stands here for the first time."""
        found = keys(rows)
        return np.array([key not in self.keys for key in found], dtype=bool) & firsts(rows)

    def add(self, rows: Indices) -> None:
        """These were met."""
        self.keys.update(keys(rows))

    def state_dict(self) -> list[str]:
        """The rows, as text."""
        return sorted(key.hex() for key in self.keys)

    def load_state_dict(self, state: list[str]) -> None:
        """The counterpart of `state_dict`."""
        self.keys = {bytes.fromhex(key) for key in state}


def keys(rows: Indices) -> list[bytes]:
    """What tells rows [n, d] apart, two bytes for each gene."""
    packed = np.ascontiguousarray(rows, dtype=np.uint16)
    return [row.tobytes() for row in packed]


def firsts(rows: Indices) -> NDArray[np.bool_]:
    """[n] whether no earlier row is equal."""
    _, first = np.unique(rows, axis=0, return_index=True)
    mask = np.zeros(len(rows), dtype=bool)
    mask[first] = True
    return mask


def arrays(limits: Limits, rows: list[list[int]], values: list[list[float]]) -> tuple[Indices, Table]:
    """Rows [n, d] and objectives [n, 1 + kinds] of lists, which may be empty."""
    shaped = np.array(rows, dtype=np.int64).reshape(-1, len(limits.space))
    return shaped, np.array(values, dtype=float).reshape(-1, 1 + len(limits.kinds))


def dominates(a: Table, b: Table) -> NDArray[np.bool_]:
    """[n] whether each a is nowhere worse than its b and somewhere better (minimising; broadcasts)."""
    return np.all(a <= b, axis=1) & np.any(a < b, axis=1)


def front_of(rows: Indices, values: Table) -> tuple[Indices, Table]:
    """The non-dominated of rows [n, d] with objectives [n, m], none twice; by falling score."""
    first = firsts(rows)
    rows, values = rows[first], values[first]
    free = np.array([not dominates(values, v[None]).any() for v in values], dtype=bool)
    order = np.flatnonzero(free)[np.argsort(values[free, 0], kind="stable")]
    return rows[order], values[order]
