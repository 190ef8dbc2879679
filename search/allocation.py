"""The best subnet of an additive score under hard budgets, exactly: an integer program over joint choices.

Mixed-precision allocation as an integer program goes back to HAWQ-V3 (Yao et al., ICML 2021, arXiv:2011.10680); over
(weight, input) pairs LIMPQ (Tang et al., ECCV 2022, arXiv:2203.08368). Here architecture genes, ties and any
conjunction of budgets take part.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from supernet.config import si
from supernet.cost import UNITS, Cost, Factors, over
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]
ROW_SCALE = 1e4
"""Budget rows are multiplied by this: the solver's feasibility tolerance (1e-6, absolute) is 1e-10 of the limit."""
TINY = 1e-300
OBJECTIVE_SCALE = 1e5
"""Largest coefficient of the objective: the solver stops within 1e-6, absolute, of the optimum."""


@dataclass(frozen=True)
class Block:
    """Joint choices of some genes, of which exactly one is taken.

    Attributes:
        genes: representatives of the genes (of tied ones, the first).
        choices: [k, len(genes)] the joint choices left after what is dominated was dropped.
        values: [k, 1 + parts] objective and each part of the costs.
    """

    genes: tuple[int, ...]
    choices: NDArray[np.int64]
    values: Table


class Program:
    """An integer program over one space, for one objective and some kinds of cost, to be solved at many limits.

    Each term of the objective and of the costs is a table over a few genes; terms over the same genes are added up,
    and each such *block* has a binary variable for each joint choice, exactly one of which is 1. Blocks that share a
    gene (the depth of a stage, tied bits) must agree on it. A joint choice that costs as much or more than another in
    every part of every kind and scores no better, while the shared genes are equal, is dropped first; that leaves
    about ten of the 392 pairs of a layer. All of this is done once; a limit makes rows of what is there.

    Args:
        space: what may be chosen; ties and admissible choices of a view are honoured.
        objective: minimised; lookups as `Factors.value` of canonical rows makes them.
        kinds: the costs that limits may be put on.
    """

    def __init__(self, space: SearchSpace, objective: Factors, kinds: Mapping[str, Cost]) -> None:
        self.space, self.kinds = space, dict(kinds)
        self._first = {i: min(group) for group in space.ties for i in group}
        functions, self._columns = [objective], dict[str, slice]()
        for kind, cost in self.kinds.items():
            self._columns[kind] = slice(len(functions), len(functions) + len(cost.parts))
            functions += cost.parts
        self.blocks = self._blocks(functions)
        self._values = np.concatenate([np.zeros((0, len(functions))), *(b.values for b in self.blocks)])
        self._offsets = np.cumsum([0, *(len(b.choices) for b in self.blocks)])
        self._equal, self._right = self._equalities(self._offsets)

    def _blocks(self, functions: Sequence[Factors]) -> list[Block]:
        terms = [(k, self._genes(dims), dims, table) for k, f in enumerate(functions) for dims, table in f.terms]
        sets = sorted({frozenset(genes) for _, genes, _, _ in terms}, key=lambda s: (-len(s), sorted(s)))
        hosts: list[frozenset[int]] = []
        for genes in sets:
            if not any(genes <= host for host in hosts):
                hosts.append(genes)
        home = {genes: next(host for host in hosts if genes <= host) for genes in sets}
        shared = {g for g in set().union(*hosts) if sum(g in host for host in hosts) > 1} if hosts else set()
        blocks = []
        for host in hosts:
            own = [(k, dims, table) for k, genes, dims, table in terms if home[frozenset(genes)] == host]
            blocks.append(self._block(tuple(sorted(host)), own, len(functions), shared))
        return blocks

    def _genes(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Representatives of the genes that decide a lookup: its own and those that decide whether these are active."""
        todo, found = list(dims), set()
        while todo:
            i = todo.pop()
            if i not in found:
                found.add(i)
                todo += [self.space.position[name] for name, _ in self.space.dimensions[i].active_if]
        return tuple(sorted({self._first.get(i, i) for i in found}))

    def _block(
        self, genes: tuple[int, ...], terms: Sequence[tuple[int, tuple[int, ...], Table]], width: int, shared: set[int]
    ) -> Block:
        choices = np.array(list(itertools.product(*(np.flatnonzero(self.space.admissible[g]) for g in genes))))
        choices = choices.reshape(-1, len(genes)).astype(np.int64)
        rows = self._rows(genes, choices)
        values = np.zeros((len(choices), width))
        for k, dims, table in terms:
            values[:, k] += table[tuple(rows[:, i] for i in dims)]
        kept = []
        outside = choices[:, [j for j, g in enumerate(genes) if g in shared]]
        for state in np.unique(outside, axis=0):
            group = np.flatnonzero((outside == state).all(1))
            kept.append(group[undominated(values[group])])
        at = np.concatenate(kept)
        return Block(genes, choices[at], values[at])

    def _rows(self, genes: Sequence[int], choices: NDArray[np.int64]) -> Indices:
        """[k, d] rows with these genes and what is tied to them; inactive ones are 0, as in canonical rows."""
        rows = np.zeros((len(choices), len(self.space)), dtype=np.int64)
        members = {min(group): group for group in self.space.ties}
        for column, gene in enumerate(genes):
            rows[:, list(members.get(gene, (gene,)))] = choices[:, column, None]
        return np.where(self.space.active(rows), rows, 0)

    # -- solving ------------------------------------------------------------------------------------------------------
    def solve(self, limits: Mapping[str, float]) -> Indices:
        """[d] the canonical row of smallest objective within all limits.

        Raises:
            ValueError: an unknown kind, or no subnet is within all limits (names the nearest).
        """
        self._known(limits)
        row = self._within(limits, self._values[:, 0])
        if row is None:
            raise ValueError(self._impossible(limits))
        return row

    def least(self, kind: str, limits: Mapping[str, float]) -> Indices:
        """[d] the canonical row within all limits that costs least of one kind; errors as in `solve`."""
        self._known({kind: 1.0})
        return self._lowest({kind: 1.0}, limits, self.solve(limits))

    def nearest(self, limits: Mapping[str, float]) -> Indices:
        """[d] the canonical row whose largest cost, relative to its limit, is smallest; of such rows, one of the
        smallest sum.
        """
        self._known(limits)
        row = self._lowest(limits, {}, np.array(self.space.smallest().row, dtype=np.int64))
        share = 1 + float(over(limits, self.kinds, row[None])[0])
        if share <= 0:  # it costs nothing
            return row
        reached = {kind: limit * share for kind, limit in limits.items()}
        found = self._within(reached, self._sums(reached).sum(0))
        return row if found is None else found

    def _lowest(self, limits: Mapping[str, float], within: Mapping[str, float], row: Indices) -> Indices:
        """[d] the row, within other limits, whose largest cost relative to `limits` is smallest, from `row` on.

        Where the sums of a cost depend on its limit, the limits are brought down step by step to what the last row
        costs (Dinkelbach, Management Science 1967).
        """
        share = 1 + float(over(limits, self.kinds, row[None])[0])
        while share > 0:
            sums = self._sums({kind: limit * share for kind, limit in limits.items()})
            found = self._within(within, None, sums)
            less = share if found is None else 1 + float(over(limits, self.kinds, found[None])[0])
            if found is None or less >= share * (1 - 1e-9):
                break
            row, share = found, less
        return row

    def _known(self, limits: Mapping[str, float]) -> None:
        unknown = [kind for kind in limits if kind not in self.kinds]
        if unknown:
            raise ValueError(f"no cost {unknown[0]!r} in this program, which has {', '.join(self.kinds)}")

    def _sums(self, limits: Mapping[str, float]) -> Table:
        """[r, n] what each variable adds to each limited sum, in units of its bound."""
        rows = [np.zeros((0, len(self._values)))]
        for kind, limit in limits.items():
            weights, bounds = self.kinds[kind].linear(limit)
            rows.append((self._values[:, self._columns[kind]] @ weights.T / bounds).T)
        return np.concatenate(rows)

    def _within(
        self, limits: Mapping[str, float], objective: Table | None, lowered: Table | None = None
    ) -> Indices | None:
        """[d] the row within all limits that minimises an objective [n], or else the largest of the sums `lowered`
        [r, n]; None where there is none."""
        slack = 1.0
        for _ in range(20):
            row = self._solution(self._sums(limits), slack, objective, lowered)
            if row is None or not limits or over(limits, self.kinds, row[None])[0] <= 1e-12:
                return row
            slack -= 1e-9  # rounding in the solver let it slip over the limit
        return None

    def _solution(self, sums: Table, bound: float, objective: Table | None, lowered: Table | None) -> Indices | None:
        n, columns = len(self._values), len(self._values)
        if n == 0:  # nothing depends on any gene
            return self._decode(np.zeros(0))
        target = np.zeros(n) if objective is None else self._scaled(objective)
        upper, high = np.full(len(sums), bound * ROW_SCALE), np.ones(n)
        if lowered is not None:  # one more variable, which none of these sums exceeds
            columns, target, high = n + 1, np.append(target, 1.0), np.append(high, np.inf)
            sums = np.column_stack([sums, np.zeros(len(sums))])
            sums = np.concatenate([sums, np.column_stack([lowered, np.full(len(lowered), -1 / ROW_SCALE)])])
            upper = np.append(upper, np.zeros(len(lowered)))
        equal = self._equal.copy()
        equal.resize((len(self._right), columns))
        constraints = [LinearConstraint(equal, self._right, self._right)]
        if len(sums):
            constraints.append(LinearConstraint(sums * ROW_SCALE, -np.inf, upper))
        found = milp(
            target,
            constraints=constraints,
            integrality=np.arange(columns) < n,
            bounds=Bounds(np.zeros(columns), high),
            options={"mip_rel_gap": 1e-9},
        )
        return None if found.x is None else self._decode(found.x)

    def _scaled(self, objective: Table) -> Table:
        """[n] the objective of each variable, above the least of its block, in the solver's units."""
        least = np.minimum.reduceat(objective, self._offsets[:-1]) if len(objective) else objective
        excess = objective - np.repeat(least, np.diff(self._offsets))
        return excess * (OBJECTIVE_SCALE / max(float(excess.max(initial=0.0)), TINY))

    def _equalities(self, offsets: NDArray[np.int64]) -> tuple[sparse.csr_array, Table]:
        """One choice for each block, and equal marginals wherever a block shares a gene with an earlier one."""
        rows: list[tuple[NDArray[np.int64], Table]] = []
        right: list[float] = []
        owner: dict[int, int] = {}
        for b, block in enumerate(self.blocks):
            rows.append((np.arange(offsets[b], offsets[b + 1]), np.ones(len(block.choices))))
            right.append(1.0)
            for column, gene in enumerate(block.genes):
                first = owner.setdefault(gene, b)
                if first == b:
                    continue
                other = self.blocks[first]
                theirs = other.choices[:, other.genes.index(gene)]
                for choice in np.flatnonzero(self.space.admissible[gene])[1:]:
                    mine = np.flatnonzero(block.choices[:, column] == choice) + offsets[b]
                    its = np.flatnonzero(theirs == choice) + offsets[first]
                    rows.append((np.concatenate([mine, its]), np.repeat([1.0, -1.0], [len(mine), len(its)])))
                    right.append(0.0)
        at = np.repeat(np.arange(len(rows)), [len(columns) for columns, _ in rows])
        columns = np.concatenate([c for c, _ in rows]) if rows else np.zeros(0, dtype=np.int64)
        data = np.concatenate([v for _, v in rows]) if rows else np.zeros(0)
        return sparse.csr_array((data, (at, columns)), shape=(len(rows), int(offsets[-1]))), np.array(right)

    def _decode(self, solution: Table) -> Indices:
        row = np.array([np.flatnonzero(mask)[-1] for mask in self.space.admissible], dtype=np.int64)
        members = {min(group): group for group in self.space.ties}
        for b, block in enumerate(self.blocks):
            taken = block.choices[int(np.argmax(solution[self._offsets[b] : self._offsets[b + 1]]))]
            for gene, choice in zip(block.genes, taken, strict=True):
                row[list(members.get(gene, (gene,)))] = choice
        return self.space.canonical(row[None])[0]

    def _impossible(self, limits: Mapping[str, float]) -> str:
        row = self.nearest(limits)[None]
        asked, nearest = [], []
        for kind, limit in limits.items():
            unit, value = UNITS.get(kind, ""), float(self.kinds[kind].value(row)[0])
            asked.append(f"{kind} <= {si(limit, unit)}")
            times = f" ({value / limit:.3g} times the limit)" if value > limit * (1 + 1e-12) else ""
            nearest.append(f"{kind} {si(_up(value), unit)}{times}")
        return f"no subnet has {' and '.join(asked)}; the nearest has {' and '.join(nearest)}: raise the budget to that"


def _up(value: float, digits: int = 4) -> float:
    """A value rounded up, so that it can be written down as a limit and kept."""
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1) if value > 0 else 1.0
    return math.ceil(value / unit * (1 - 1e-12)) * unit


def reach(space: SearchSpace, cost: Cost) -> tuple[float, float]:
    """The smallest and the largest value of a cost in a space, exactly."""
    low = Program(space, Factors(), {"": cost}).least("", {})
    row = np.array(space.largest().row, dtype=np.int64)
    before, high = -1.0, float(cost.value(row[None])[0])
    while high > max(before, 0.0) * (1 + 1e-9):
        before = high
        weights, bounds = cost.linear(high)
        for weight, bound in zip(weights, bounds, strict=True):
            summed = sum((p * float(w) for p, w in zip(cost.parts, weight, strict=True) if w), Factors())
            if sum(float(table.max()) for _, table in summed.terms) > bound * (1 + 1e-9):
                dearest = Program(space, summed * -1.0, {}).solve({})
                high = max(high, float(cost.value(dearest[None])[0]))
    return float(cost.value(low[None])[0]), high


def allocate(
    space: SearchSpace, objective: Factors, budgets: Mapping[str, float], kinds: Mapping[str, Cost]
) -> Indices:
    """[d] the canonical row that minimises `objective` within all `budgets` (kind -> limit, in the kind's unit).

    Raises:
        ValueError: an unknown kind, or no subnet is within all budgets.
    """
    unknown = [kind for kind in budgets if kind not in kinds]
    if unknown:
        raise ValueError(f"a budget names its kind, one of {', '.join(kinds)}; got {unknown[0]!r}")
    return Program(space, objective, {kind: kinds[kind] for kind in budgets}).solve(budgets)


def undominated(values: Table) -> NDArray[np.int64]:
    """Positions of the rows of [n, m] that no other row undercuts or equals in every column (of equals, one)."""
    order = np.lexsort(values.T[::-1])
    kept: list[int] = []
    for i in order:
        if not kept or not (values[kept] <= values[i]).all(1).any():
            kept.append(int(i))
    return np.array(kept, dtype=np.int64)
