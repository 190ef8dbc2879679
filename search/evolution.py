"""NSGA-II on index rows, for all budgets at once.

Deb et al., A fast and elitist multiobjective genetic algorithm: NSGA-II, IEEE TEC 2002. Survival is DEAP's;
tournament and variation are vectorised here, with the caller's generator, since DEAP's use the global one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from deap import base, tools
from numpy.typing import NDArray

from supernet.cost import Costs
from supernet.samplers.cost_first import drawing
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]
SPAN = 0.5
"""Half of the first generation costs between this share of its budget and all of it."""
TRIES = 8
"""Steps looked at before one is taken."""


class NSGA2:
    """Asks for rows that keep some budget, and is told their objectives: minus the score, then each limited cost.

    Every child is given one of the budgets in turn, has parents next to it, and is taken down or up in small steps
    until it is just
    within: the search works where the answers are. The best row within each budget survives in any case.

    Args:
        space: what to choose from; a view is honoured.
        costs: its costs.
        budgets: limits, kind -> limit in the kind's unit; at least one, each reachable.
        seeds: [k, d] rows of the first generation; those over every budget are repaired.
        population: survivors of each generation, at least 4.
        crossover: probability that a child has two parents, each gene from either with equal probability.
        mutations: expected genes drawn anew in each child.
        filling: probability that a child spends what its budget leaves.

    Raises:
        ValueError: no budget, or an option out of range.
    """

    feedback: Literal["none", "train_loss", "select_loss"] = "train_loss"
    every = 1

    def __init__(
        self,
        space: SearchSpace,
        costs: Costs,
        budgets: Sequence[Mapping[str, float]],
        seeds: Indices | None = None,
        population: int = 200,
        crossover: float = 0.9,
        mutations: float = 2.0,
        filling: float = 0.7,
    ) -> None:
        if not budgets or population < 4 or not (0 <= crossover <= 1 and 0 <= filling <= 1) or mutations < 0:
            raise ValueError(
                "NSGA2 takes one or more budgets, population >= 4, crossover and filling in [0, 1], mutations >= 0; "
                f"got {len(budgets)}, {population}, {crossover}, {filling}, {mutations}"
            )
        self.space, self.costs, self.budgets = space, costs, [dict(b) for b in budgets]
        self.kinds = list(dict.fromkeys(kind for b in budgets for kind in b))
        # Limits as [budgets, kinds], inf where a budget says nothing; a sum of floats may round up by an ulp or two.
        self.bounds = np.array([[b.get(kind, np.inf) for kind in self.kinds] for b in self.budgets]) * (1 + 1e-12)
        self.seeds = np.zeros((0, len(space)), dtype=np.int64) if seeds is None else space.canonical(seeds)
        self.population, self.crossover, self.mutations = population, crossover, mutations
        self.filling = filling
        self.rows: Indices = np.zeros((0, len(space)), dtype=np.int64)
        self.values: Table = np.zeros((0, 1 + len(self.kinds)))
        self.crowding: Table = np.zeros(0)
        self.best = [(self.rows, self.values) for _ in budgets]

    # -- ask ----------------------------------------------------------------------------------------------------
    def ask(self, n: int, rng: np.random.Generator) -> Indices:
        """[at most n, d] new rows, each within some budget and none twice; the seeds first, if nothing was told yet."""
        budget = np.arange(n) % len(self.budgets)
        if len(self.rows) == 0:
            rows = np.concatenate([self.seeds[:n], self._initial(budget[len(self.seeds) :], rng)])
            settled = self._inside(rows).any(1) & (np.arange(n) < len(self.seeds))
        else:
            rows, settled = self._children(budget, rng), np.zeros(n, dtype=bool)
        rows[~settled] = self.fitted(rows[~settled], self.bounds[budget[~settled]], rng)
        rows = rows[self._inside(rows).any(1)]
        _, first = np.unique(rows, axis=0, return_index=True)
        return rows[np.sort(first)]

    def _inside(self, rows: Indices) -> NDArray[np.bool_]:
        """[n, budgets] whether each row is within each budget."""
        return np.all(self._spent(rows)[:, None] <= self.bounds, axis=2)

    def _spent(self, rows: Indices) -> Table:
        """[n, kinds] costs."""
        return np.stack([self.costs.kinds[kind].value(rows) for kind in self.kinds], axis=1)

    def _initial(self, budget: NDArray[np.int64], rng: np.random.Generator) -> Indices:
        """Rows for the given budgets: half of them near it, half spread over all costs below."""
        rows = self.space.sample_indices(len(budget), rng)
        for b, limits in enumerate(self.budgets):
            sampler, limit = drawing(self.space, self.costs, limits)
            mine = np.flatnonzero(budget == b)
            near = limit * rng.uniform(SPAN, 1.0, len(mine))
            spread = np.exp(rng.uniform(np.log(min(sampler.edges[0], limit)), np.log(limit), len(mine)))
            rows[mine] = sampler.at(np.where(np.arange(len(mine)) % 2 == 0, near, spread), rng)
        return rows

    def _children(self, budget: NDArray[np.int64], rng: np.random.Generator) -> Indices:
        """Rows of two parents each, or mutated copies of one; parents live next to the child's budget."""
        n = len(budget)
        one, two = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        for b in range(len(self.budgets)):
            mine, pool = np.flatnonzero(budget == b), self._near(b)
            one[mine], two[mine] = self._tournament(pool, len(mine), rng), self._tournament(pool, len(mine), rng)
        mixed = crossed(self.space, self.rows[one], self.rows[two], rng)
        rows = np.where(rng.random((n, 1)) < self.crossover, mixed, self.rows[one])
        return mutated(self.space, rows, self.mutations / max(1, len(self.space)), rng)

    def _near(self, b: int) -> NDArray[np.int64]:
        """Positions of the population nearest to budget b (largest log ratio of cost to limit): its share of it."""
        limited = np.isfinite(self.bounds[b])
        ratio = np.maximum(self.values[:, 1:][:, limited], 1e-300) / self.bounds[b][limited]
        share = max(4, 2 * len(self.rows) // (1 + len(self.budgets)))
        return np.argsort(np.abs(np.log(ratio).max(1)), kind="stable")[:share]

    def _tournament(self, pool: NDArray[np.int64], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Winners of n duels among `pool`: who dominates, else who is less crowded."""
        a, b = pool[rng.integers(len(pool), size=(2, n))]
        better = self.crowding[a] >= self.crowding[b]
        a_wins, b_wins = (dominates(self.values[i], self.values[j]) for i, j in ((a, b), (b, a)))
        return np.where(a_wins | (better & ~b_wins), a, b)

    def fitted(self, rows: Indices, bounds: Table, rng: np.random.Generator) -> Indices:
        """Rows within their bounds [n, kinds], changed as little as that takes; a share of them has what is left spent.

        Steps are drawn at random; downwards, one that just suffices is preferred to those that overshoot. Where no
        steps are left a row may stay outside (`ask` drops it).
        """
        down, up = self.space.neighbours()
        bad = np.flatnonzero((self._spent(rows) > bounds).any(1))
        while len(bad):
            options, excess = self._steps(rows[bad], down, bounds[bad], rng)
            left, fits = np.isfinite(excess), excess <= 0
            pick = np.argmax(np.where(fits, 2 + excess, np.where(left, rng.random(excess.shape), -1.0)), axis=1)
            rows[bad] = options[np.arange(len(bad)), pick]
            bad = bad[~fits.any(1) & left.any(1)]
        spending = np.flatnonzero(rng.random(len(rows)) < self.filling)
        while len(spending):
            options, excess = self._steps(rows[spending], up, bounds[spending], rng)
            fits = excess <= 0
            pick, some = np.argmax(rng.random(excess.shape) * fits, axis=1), fits.any(1)
            spending = spending[some]
            rows[spending] = options[some, pick[some]]
        return rows

    def _steps(
        self, rows: Indices, table: list[NDArray[np.int64]], bounds: Table, rng: np.random.Generator
    ) -> tuple[Indices, Table]:
        """[n, c, d] rows one random step away, and their excess over the bounds [n, c] (inf where no step is left)."""
        following = stepped(rows, table)
        movable = (following != rows) & self.space.active(rows)
        count = min(TRIES, rows.shape[1])
        genes = np.argsort(-rng.random(rows.shape) * movable, axis=1)[:, :count]
        at = np.arange(len(rows))[:, None]
        flat = self.space.spread(np.repeat(rows, count, axis=0), genes.ravel(), following[at, genes].ravel())
        excess = (self._spent(flat).reshape(len(rows), count, -1) / bounds[:, None] - 1).max(2)
        return flat.reshape(len(rows), count, -1), np.where(movable[at, genes], excess, np.inf)

    # -- tell ---------------------------------------------------------------------------------------------------
    def tell(self, indices: Indices, scores: Table, step: int = 0, total_steps: int = 1) -> None:
        """Objectives [n, 1 + kinds] of rows [n, d], all to be minimised; survivors are chosen."""
        known = {tuple(row) for row in self.rows.tolist()}
        new = np.array([tuple(row) not in known for row in indices.tolist()], dtype=bool)
        rows, values = np.concatenate([self.rows, indices[new]]), np.concatenate([self.values, scores[new]])
        self.best = [self._best(b, rows, values) for b in range(len(self.budgets))]
        elite = {tuple(row) for kept, _ in self.best for row in kept.tolist()}
        chosen, crowding = survivors(values, self.population)
        missing = [i for i, row in enumerate(rows.tolist()) if tuple(row) in elite and i not in set(chosen.tolist())]
        chosen = np.concatenate([chosen, np.array(missing, dtype=np.int64)])
        self.rows, self.values = rows[chosen], values[chosen]
        self.crowding = np.concatenate([crowding, np.full(len(missing), np.inf)])

    def _best(self, b: int, rows: Indices, values: Table) -> tuple[Indices, Table]:
        """The best row within budget b, [1 or 0, d], and its objectives; of equal scores, the cheaper."""
        kept, theirs = self.best[b]
        rows, values = np.concatenate([kept, rows]), np.concatenate([theirs, values])
        inside = np.flatnonzero((values[:, 1:] <= self.bounds[b]).all(1))
        cost = values[inside, 1 + self.kinds.index(next(iter(self.budgets[b])))]
        order = inside[np.lexsort((cost, values[inside, 0]))][:1]
        return rows[order], values[order]

    def front(self) -> tuple[Indices, Table]:
        """Non-dominated rows [n, d] of all that were kept, and their objectives [n, 1 + kinds]; by falling score."""
        rows = np.concatenate([self.rows, *(kept for kept, _ in self.best)])
        values = np.concatenate([self.values, *(theirs for _, theirs in self.best)])
        _, first = np.unique(rows, axis=0, return_index=True)
        rows, values = rows[first], values[first]
        free = np.array([not dominates(values, v[None]).any() for v in values], dtype=bool)
        order = np.flatnonzero(free)[np.argsort(values[free, 0], kind="stable")]
        return rows[order], values[order]

    # -- state --------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Population, crowding and the best of each budget, as lists."""
        return {
            "rows": self.rows.tolist(),
            "values": self.values.tolist(),
            "crowding": self.crowding.tolist(),
            "best": [[rows.tolist(), values.tolist()] for rows, values in self.best],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        if len(state["best"]) != len(self.budgets):
            raise ValueError(f"state is of {len(state['best'])} budgets, this search has {len(self.budgets)}")
        self.rows, self.values = self._arrays(state["rows"], state["values"])
        self.crowding = np.array(state["crowding"], dtype=float)
        self.best = [self._arrays(rows, values) for rows, values in state["best"]]

    def _arrays(self, rows: list[list[int]], values: list[list[float]]) -> tuple[Indices, Table]:
        shaped = np.array(rows, dtype=np.int64).reshape(-1, len(self.space))
        return shaped, np.array(values, dtype=float).reshape(-1, 1 + len(self.kinds))


def dominates(a: Table, b: Table) -> NDArray[np.bool_]:
    """[n] whether each a is nowhere worse than its b and somewhere better (minimising; broadcasts)."""
    return np.all(a <= b, axis=1) & np.any(a < b, axis=1)


def crossed(space: SearchSpace, one: Indices, two: Indices, rng: np.random.Generator) -> Indices:
    """Rows with each gene from either parent; what only one of them uses comes from that one."""
    uses_one, uses_two = space.active(one), space.active(two)
    from_one = np.where(uses_one == uses_two, rng.random(one.shape) < 0.5, uses_one)
    return settled(space, np.where(from_one, one, two), uses_one | uses_two, rng)


def mutated(space: SearchSpace, rows: Indices, rate: float, rng: np.random.Generator) -> Indices:
    """Each gene changed with probability `rate`: half of them one step up or down, half drawn anew."""
    drawn = sample_free(space, len(rows), rng)
    down, up = (stepped(rows, table) for table in space.neighbours())
    kind, act = rng.random(rows.shape), rng.random(rows.shape) < rate
    moved = np.where(kind < 0.5, drawn, np.where(kind < 0.75, down, up))
    return settled(space, np.where(act, moved, rows), space.active(rows), rng)


def stepped(rows: Indices, table: list[NDArray[np.int64]]) -> Indices:
    """[n, d] the next choice of every gene."""
    return np.stack([choices[rows[:, i]] for i, choices in enumerate(table)], axis=1)


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


def survivors(values: Table, k: int) -> tuple[NDArray[np.int64], Table]:
    """Positions of the k of [n, m] that NSGA-II keeps, and their crowding distances."""
    fitness = type("Fitness", (base.Fitness,), {"weights": (-1.0,) * values.shape[1]})
    points = [_Point(fitness(tuple(row)), i) for i, row in enumerate(values.tolist())]
    chosen = tools.selNSGA2(points, min(k, len(points)), nd="log")
    return np.array([p.at for p in chosen], dtype=np.int64), np.array([p.fitness.crowding_dist for p in chosen])


class _Point:
    """What DEAP calls an individual."""

    __slots__ = ("at", "fitness")

    def __init__(self, fitness: Any, at: int) -> None:
        self.fitness, self.at = fitness, at
