"""Variation of index rows, and their way back into the budgets: what every search algorithm does with subnets.

Vectorised over [n, d] index matrices, with the caller's generator. Views, ties and inactive genes are honoured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from supernet.cost import Costs
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]
SPAN = 0.5
"""Half of a first generation may cost between this share of its budget and all of it."""
LAPS = 3
"""How often genes go up in one random order before single steps look for what is left."""
TRIES = 8
"""Steps looked at before one is taken."""


class Limits:
    """The hard budgets of one search: what rows cost, whether they fit, how they come to fit.

    Args:
        space: what to choose from; a view is honoured.
        costs: its costs.
        budgets: limits, kind -> limit in the kind's unit; each reachable.

    Attributes:
        kinds: the limited kinds, in order of first mention.
        bounds: [budgets, kinds], inf where a budget says nothing of a kind.
    """

    def __init__(self, space: SearchSpace, costs: Costs, budgets: Sequence[Mapping[str, float]]) -> None:
        self.space, self.costs, self.budgets = space, costs, [dict(b) for b in budgets]
        self.kinds = list(dict.fromkeys(kind for b in self.budgets for kind in b))
        # A sum of floats may round up by an ulp or two.
        self.bounds = np.array([[b.get(kind, np.inf) for kind in self.kinds] for b in self.budgets]) * (1 + 1e-12)
        self._first = np.array([int(np.argmax(mask)) for mask in space.admissible], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.budgets)

    def inside(self, rows: Indices) -> NDArray[np.bool_]:
        """[n, budgets] whether each row is within each budget."""
        return np.all(self.spent(rows)[:, None] <= self.bounds, axis=2)

    def spent(self, rows: Indices) -> Table:
        """[n, kinds] costs."""
        return np.stack([self.costs.kinds[kind].value(rows) for kind in self.kinds], axis=1)

    def initial(self, budget: NDArray[np.int64], rng: np.random.Generator) -> Indices:
        """Drawn rows brought within the given budgets: half of them to a share above SPAN, half to any share."""
        n = len(budget)
        shares = np.where(np.arange(n) % 2 == 0, rng.uniform(SPAN, 1.0, n), rng.random(n))[:, None]
        rows = self.space.sample_indices(n, rng)
        return self.fitted(self.fitted(rows, self.bounds[budget] * shares, rng), self.bounds[budget], rng, filling=0.0)

    def first(self, seeds: Indices, n: int, met: int, rng: np.random.Generator, filling: float = 1.0) -> Indices:
        """[at most n, d] rows of a first generation of which `met` are known: seeds first, then drawn; none twice.

        Seeds over every budget are repaired.
        """
        given = seeds[met : met + n]
        budget = np.arange(met, met + n) % len(self)
        rows = np.concatenate([given, self.initial(budget[len(given) :], rng)])
        settled = self.inside(rows).any(1) & (np.arange(n) < len(given))
        rows[~settled] = self.fitted(rows[~settled], self.bounds[budget[~settled]], rng, filling)
        rows = rows[self.inside(rows).any(1)]
        _, at = np.unique(rows, axis=0, return_index=True)
        return rows[np.sort(at)]

    def fitted(self, rows: Indices, bounds: Table, rng: np.random.Generator, filling: float = 1.0) -> Indices:
        """Rows within their bounds [n, kinds], changed as little as that takes; a share of them has what is left spent.

        Genes take one step each, in random order, as many as it takes; and again where one each is not enough. Where
        no steps are left a row may stay outside.
        """
        down, up = self.space.neighbours
        rows = rows.copy()
        bad = np.flatnonzero(self._over(rows, bounds))
        while len(bad):
            moved = self._walked(rows[bad], down, bounds[bad], rng, least=True)
            stuck = (moved == rows[bad]).all(1)
            rows[bad] = moved
            bad = bad[~stuck & self._over(moved, bounds[bad])]
        spending = np.flatnonzero((rng.random(len(rows)) < filling) & ~self._over(rows, bounds))
        for _ in range(LAPS if len(spending) else 0):
            rows[spending] = self._walked(rows[spending], up, bounds[spending], rng, least=False)
        while len(spending):
            options, excess = self._steps(rows[spending], up, bounds[spending], rng)
            fits = excess <= 0
            pick, some = np.argmax(rng.random(excess.shape) * fits, axis=1), fits.any(1)
            spending = spending[some]
            rows[spending] = options[some, pick[some]]
        return rows

    def _over(self, rows: Indices, bounds: Table) -> NDArray[np.bool_]:
        return np.any(self.spent(rows) > bounds, axis=1)

    def _walked(
        self, rows: Indices, table: Sequence[NDArray[np.int64]], bounds: Table, rng: np.random.Generator, least: bool
    ) -> Indices:
        """Rows whose genes took one step by `table`, in random order: as few (`least`) or as many as keep the bounds.

        The number of steps is found by bisection; where no number keeps them, all take one.
        """
        following = stepped(rows, table)
        moves = (following != rows) & self.space.active(rows)
        keys = np.where(moves, rng.random(rows.shape), 2.0)
        for group in self.space.ties:
            keys[:, list(group)] = keys[:, list(group)].min(1, keepdims=True)
        turn = np.argsort(np.argsort(keys, axis=1), axis=1)
        for group in self.space.ties:
            turn[:, list(group)] = turn[:, list(group)].max(1, keepdims=True)

        def after(count: NDArray[np.int64]) -> Indices:
            return self._awake(rows, np.where((turn < count[:, None]) & (keys < 2), following, rows))

        low, high = np.zeros(len(rows), dtype=np.int64), moves.sum(1) + (0 if least else 1)
        while (low + 1 < high).any():
            middle = (low + high) // 2
            outside = self._over(after(middle), bounds)
            low, high = np.where(outside == least, middle, low), np.where(outside == least, high, middle)
        return after(high if least else low)

    def _awake(self, before: Indices, rows: Indices) -> Indices:
        """Canonical rows in which active genes that were not before have their first admissible choice."""
        return self.space.canonical(np.where(self.space.active(before), rows, self._first))

    def _steps(
        self, rows: Indices, table: Sequence[NDArray[np.int64]], bounds: Table, rng: np.random.Generator
    ) -> tuple[Indices, Table]:
        """[n, c, d] rows one random step away, and their excess over the bounds [n, c] (inf where no step is left)."""
        following = stepped(rows, table)
        movable = (following != rows) & self.space.active(rows)
        count = min(TRIES, rows.shape[1])
        genes = np.argsort(-rng.random(rows.shape) * movable, axis=1)[:, :count]
        at = np.arange(len(rows))[:, None]
        flat = self.space.spread(np.repeat(rows, count, axis=0), genes.ravel(), following[at, genes].ravel())
        excess = (self.spent(flat).reshape(len(rows), count, -1) / bounds[:, None] - 1).max(2)
        return flat.reshape(len(rows), count, -1), np.where(movable[at, genes], excess, np.inf)


def crossed(space: SearchSpace, one: Indices, two: Indices, rng: np.random.Generator) -> Indices:
    """Rows with each gene from either parent; what only one of them uses comes from that one."""
    uses_one, uses_two = space.active(one), space.active(two)
    from_one = np.where(uses_one == uses_two, rng.random(one.shape) < 0.5, uses_one)
    return settled(space, np.where(from_one, one, two), uses_one | uses_two, rng)


def mutated(space: SearchSpace, rows: Indices, rate: float, rng: np.random.Generator) -> Indices:
    """Each gene changed with probability `rate`: half of them one step up or down, half drawn anew."""
    drawn = sample_free(space, len(rows), rng)
    down, up = (stepped(rows, table) for table in space.neighbours)
    kind, act = rng.random(rows.shape), rng.random(rows.shape) < rate
    moved = np.where(kind < 0.5, drawn, np.where(kind < 0.75, down, up))
    return settled(space, np.where(act, moved, rows), space.active(rows), rng)


def redrawn(space: SearchSpace, rows: Indices, rate: float, rng: np.random.Generator) -> Indices:
    """Each gene drawn anew with probability `rate`."""
    act = rng.random(rows.shape) < rate
    return settled(space, np.where(act, sample_free(space, len(rows), rng), rows), space.active(rows), rng)


def single_changes(space: SearchSpace, row: Indices) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(gene, value) of every other admissible choice of every active gene; of tied genes, of one."""
    active = space.active(row[None])[0]
    spoken = {i for group in space.ties for i in [j for j in group if active[j]][1:]}
    found = [
        (i, k)
        for i, mask in enumerate(space.admissible)
        if active[i] and i not in spoken
        for k in np.flatnonzero(mask)
        if k != row[i]
    ]
    genes, values = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return genes, values


def stepped(rows: Indices, table: Sequence[NDArray[np.int64]]) -> Indices:
    """[n, d] the next choice of every gene by a table of `SearchSpace.neighbours`."""
    padded = np.zeros((len(table), max(map(len, table), default=1)), dtype=np.int64)
    for i, choices in enumerate(table):
        padded[i, : len(choices)] = choices
    return padded[np.arange(len(table)), rows]


def settled(space: SearchSpace, rows: Indices, set_before: NDArray[np.bool_], rng: np.random.Generator) -> Indices:
    """Canonical rows in which active genes that had no value before are drawn."""
    woken = space.active(rows) & ~set_before
    return space.canonical(np.where(woken, sample_free(space, len(rows), rng), rows))


def sample_free(space: SearchSpace, n: int, rng: np.random.Generator) -> Indices:
    """[n, d] admissible choices for every gene, whether active or not; tied genes are drawn alike."""
    columns = [np.flatnonzero(mask)[rng.integers(mask.sum(), size=n)] for mask in space.admissible]
    rows = np.stack(columns, axis=1)
    for group in space.ties:
        rows[:, list(group)] = rows[:, [group[0]]]
    return rows
