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

from search.climb import Climb
from search.keeping import Best, arrays, dominates, firsts, front_of, keys
from search.variation import Limits, crossed, mutated
from supernet.cost import Costs
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]


class NSGA2:
    """Asks for rows that keep some budget, and is told their objectives: minus the score, then each limited cost.

    Every child is given one of the budgets in turn, has parents next to it, and is taken down or up in small steps
    until it is just within: the search works where the answers are. The best row within each budget survives in any
    case.

    Args:
        space: what to choose from; a view is honoured.
        costs: its costs.
        budgets: limits, kind -> limit in the kind's unit; at least one, each reachable.
        seeds: [k, d] rows of the first generation; those over every budget are repaired.
        population: survivors of each generation, at least 4.
        crossover: probability that a child has two parents, each gene from either with equal probability.
        mutations: expected genes drawn anew in each child.
        filling: probability that a child spends what its budget leaves.
        climbing: share of what is asked for that goes to a climb from the best row within each budget (a memetic
            algorithm); 0: textbook NSGA-II.

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
        climbing: float = 0.25,
    ) -> None:
        shares = (crossover, filling, climbing)
        if not budgets or population < 4 or not all(0 <= share <= 1 for share in shares) or mutations < 0:
            raise ValueError(
                "NSGA2 takes one or more budgets, population >= 4, crossover, filling and climbing in [0, 1], "
                f"mutations >= 0; got {len(budgets)}, {population}, {crossover}, {filling}, {climbing}, {mutations}"
            )
        self.space, self.limits = space, Limits(space, costs, budgets)
        self.seeds = np.zeros((0, len(space)), dtype=np.int64) if seeds is None else space.canonical(seeds)
        self.population, self.crossover, self.mutations = population, crossover, mutations
        self.filling, self.climbing = filling, climbing
        self.rows: Indices = np.zeros((0, len(space)), dtype=np.int64)
        self.values: Table = np.zeros((0, 1 + len(self.limits.kinds)))
        self.crowding: Table = np.zeros(0)
        self.best = Best(self.limits)
        self.climbs = [Climb(self.limits, b) for b in range(len(budgets))] if climbing else []

    # -- ask ----------------------------------------------------------------------------------------------------
    def ask(self, n: int, rng: np.random.Generator) -> Indices:
        """[at most n, d] rows, each within some budget, none twice or in the population; the seeds come first."""
        if len(self.rows) == 0:
            return self.limits.first(self.seeds, n, 0, rng, self.filling)
        climbed = [c.ask(round(n * self.climbing / len(self.climbs)), rng) for c in self.climbs]
        budget = np.arange(n - sum(map(len, climbed))) % len(self.limits)
        children = self.limits.fitted(self._children(budget, rng), self.limits.bounds[budget], rng, self.filling)
        known = set(keys(self.rows))
        new = np.array([key not in known for key in keys(children)], dtype=bool) & self.limits.inside(children).any(1)
        rows = np.concatenate([*climbed, children[new]])
        return rows[firsts(rows)]

    def _children(self, budget: NDArray[np.int64], rng: np.random.Generator) -> Indices:
        """Rows of two parents each, or mutated copies of one; parents live next to the child's budget."""
        n = len(budget)
        one, two = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        for b in range(len(self.limits)):
            mine, pool = np.flatnonzero(budget == b), self._near(b)
            one[mine], two[mine] = self._tournament(pool, len(mine), rng), self._tournament(pool, len(mine), rng)
        mixed = crossed(self.space, self.rows[one], self.rows[two], rng)
        rows = np.where(rng.random((n, 1)) < self.crossover, mixed, self.rows[one])
        return mutated(self.space, rows, self.mutations / max(1, len(self.space)), rng)

    def _near(self, b: int) -> NDArray[np.int64]:
        """Positions of the population nearest to budget b (largest log ratio of cost to limit): its share of it."""
        limited = np.isfinite(self.limits.bounds[b])
        ratio = np.maximum(self.values[:, 1:][:, limited], 1e-300) / self.limits.bounds[b][limited]
        share = max(4, 2 * len(self.rows) // (1 + len(self.limits)))
        return np.argsort(np.abs(np.log(ratio).max(1)), kind="stable")[:share]

    def _tournament(self, pool: NDArray[np.int64], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Winners of n duels among `pool`: who dominates, else who is less crowded."""
        a, b = pool[rng.integers(len(pool), size=(2, n))]
        better = self.crowding[a] >= self.crowding[b]
        a_wins, b_wins = (dominates(self.values[i], self.values[j]) for i, j in ((a, b), (b, a)))
        return np.where(a_wins | (better & ~b_wins), a, b)

    # -- tell ---------------------------------------------------------------------------------------------------
    def tell(self, indices: Indices, scores: Table, step: int = 0, total_steps: int = 1) -> None:
        """Objectives [n, 1 + kinds] of rows [n, d], all to be minimised; survivors are chosen."""
        for climb in self.climbs:
            climb.tell(indices, scores)
        self.best.add(indices, scores)
        known = set(keys(self.rows))
        new = np.array([key not in known for key in keys(indices)], dtype=bool) & firsts(indices)
        rows, values = np.concatenate([self.rows, indices[new]]), np.concatenate([self.values, scores[new]])
        chosen, crowding = survivors(values, self.population)
        elite, kept = set(keys(np.concatenate(self.best.rows))), set(chosen.tolist())
        missing = [i for i, key in enumerate(keys(rows)) if key in elite and i not in kept]
        chosen = np.concatenate([chosen, np.array(missing, dtype=np.int64)])
        self.rows, self.values = rows[chosen], values[chosen]
        self.crowding = np.concatenate([crowding, np.full(len(missing), np.inf)])

    def front(self) -> tuple[Indices, Table]:
        """Non-dominated rows [n, d] of all that were kept, and their objectives [n, 1 + kinds]; by falling score."""
        rows, values = np.concatenate([self.rows, *self.best.rows]), np.concatenate([self.values, *self.best.values])
        return front_of(rows, values)

    # -- state --------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Population, crowding, the best of each budget and the climbs, as plain Python."""
        return {
            "rows": self.rows.tolist(),
            "values": self.values.tolist(),
            "crowding": self.crowding.tolist(),
            "best": self.best.state_dict(),
            "climbs": [climb.state_dict() for climb in self.climbs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; ValueError if that was of other budgets or another `climbing`."""
        self.best.load_state_dict(state["best"])
        if len(state["climbs"]) != len(self.climbs):
            raise ValueError(
                f"state has {len(state['climbs'])} climbs, this search {len(self.climbs)}; set climbing alike"
            )
        self.rows, self.values = arrays(self.limits, state["rows"], state["values"])
        self.crowding = np.array(state["crowding"], dtype=float)
        for climb, its in zip(self.climbs, state["climbs"], strict=True):
            climb.load_state_dict(its)


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
