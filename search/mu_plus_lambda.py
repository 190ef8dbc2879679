"""(mu + lambda) evolution with a memory of everything that was evaluated, as ViT-ResNAS searches.

Liao, Karaman and Sze, Searching for Efficient Multi-Stage Vision Transformers, arXiv:2109.00642.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from search.keeping import Best, Seen
from search.variation import Limits, crossed, redrawn
from supernet.cost import Costs
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]
TRIES = 3
"""Batches of children made, at most, to find as many as are asked for that were never evaluated."""


class MuPlusLambda:
    """Parents are the best mu of the whole history; half of the children are mutants; nothing is evaluated twice.

    ViT-ResNAS draws 500 rows within [0.975, 1] of the limit, then breeds 75 mutants (each field drawn anew with
    probability 0.3) and 75 children by uniform crossover from the best 75 of all so far, and draws a child again
    until it is in that window and new. Departures: children are repaired and filled into the budget instead, which
    leaves them as near to it as single steps can; several budgets are served in one run, each with parents of its own.

    Args:
        space: what to choose from; a view is honoured.
        costs: its costs.
        budgets: limits, kind -> limit in the kind's unit; at least one, each reachable.
        seeds: [k, d] rows of the first generation; those over every budget are repaired.
        population: mu, parents for each budget, at least 2.
        first: rows of the first generation, in populations.
        mutants: share of what is asked for that are mutants.
        mutation: probability that a mutant's gene is drawn anew.

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
        population: int = 75,
        first: float = 6.7,
        mutants: float = 0.5,
        mutation: float = 0.3,
    ) -> None:
        if not budgets or population < 2 or first <= 0 or not (0 <= mutants <= 1 and 0 <= mutation <= 1):
            raise ValueError(
                "MuPlusLambda takes one or more budgets, population >= 2, first > 0, mutants and mutation in [0, 1]; "
                f"got {len(budgets)}, {population}, {first}, {mutants}, {mutation}"
            )
        self.limits, self.first = Limits(space, costs, budgets), round(first * population)
        self.mutants, self.mutation = mutants, mutation
        self.seeds = np.zeros((0, len(space)), dtype=np.int64) if seeds is None else space.canonical(seeds)
        self.best, self.seen, self.met = Best(self.limits, population), Seen(), 0

    def ask(self, n: int, rng: np.random.Generator) -> Indices:
        """[at most n, d] rows that were never told, each within some budget; none where the space is exhausted."""
        found = np.zeros((0, len(self.limits.space)), dtype=np.int64)
        for _ in range(TRIES):
            if self.met < self.first or not any(map(len, self.best.rows)):
                rows = self.limits.first(self.seeds, n, self.met, rng)
            else:
                rows = self._children(n, rng)
            rows = np.concatenate([found, rows])
            found = rows[self.seen.fresh(rows)][:n]
            if len(found) == n:
                break
        return found

    def _children(self, n: int, rng: np.random.Generator) -> Indices:
        """[at most n, d] mutants and children of two, within the budgets that their parents are of."""
        pools = [b for b, rows in enumerate(self.best.rows) if len(rows)]
        budget = rng.permutation(np.array(pools)[np.arange(n) % len(pools)])
        one, two = (
            np.stack([self.best.rows[b][rng.integers(len(self.best.rows[b]))] for b in budget]) for _ in range(2)
        )
        mixed = crossed(self.limits.space, one, two, rng)
        changed = redrawn(self.limits.space, one, self.mutation, rng)
        rows = np.where((np.arange(n) < round(self.mutants * n))[:, None], changed, mixed)
        rows = self.limits.fitted(rows, self.limits.bounds[budget], rng)
        return rows[self.limits.inside(rows).any(1)]

    def tell(self, indices: Indices, scores: Table, step: int = 0, total_steps: int = 1) -> None:
        """Objectives [n, 1 + kinds] of rows [n, d], all to be minimised; they enter the history."""
        self.met += len(indices)
        self.seen.add(indices)
        self.best.add(indices, scores)

    def front(self) -> tuple[Indices, Table]:
        """The non-dominated of all parents, and their objectives."""
        return self.best.front()

    def state_dict(self) -> dict[str, Any]:
        """The parents of each budget and the history."""
        return {"best": self.best.state_dict(), "seen": self.seen.state_dict(), "met": self.met}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.best.load_state_dict(state["best"])
        self.seen.load_state_dict(state["seen"])
        self.met = int(state["met"])
