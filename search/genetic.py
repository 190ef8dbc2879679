"""A constrained genetic algorithm, as EQ-Net searches its supernet.

Xu et al., EQ-Net, ICCV 2023, arXiv:2308.07650, section 3.5 and its code, which descends from the evolution of
Once-for-all (Cai et al., ICLR 2020, arXiv:1908.09791).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from search.keeping import Best, firsts
from search.variation import Limits, crossed, redrawn
from supernet.cost import Costs
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]


class Genetic:
    """The best of each generation, as many mutants of them, and as many children of two of them.

    EQ-Net keeps 25 parents and makes 50 mutants and 50 children of two by uniform crossover, each gene of a mutant
    drawn anew with probability 0.1; one run for each target. Departures: all budgets are served in one run, each with
    parents of its own and its share of what is asked for. A child that is over its budget is repaired, and one below
    it spends the rest, where EQ-Net draws again until one fits (at a 3-bit budget of 2..8 bits that practically never
    ends). Any cost can be limited, not only average bits.

    Args:
        space: what to choose from; a view is honoured.
        costs: its costs.
        budgets: limits, kind -> limit in the kind's unit; at least one, each reachable.
        seeds: [k, d] rows of the first generation; those over every budget are repaired.
        population: rows of the first generation, and the size that `parents` is a share of, at least 4.
        parents: share of the population that breeds.
        mutants: share of what is asked for that are mutants; the others have two parents.
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
        population: int = 100,
        parents: float = 0.25,
        mutants: float = 0.5,
        mutation: float = 0.1,
    ) -> None:
        if not budgets or population < 4 or not all(0 <= p <= 1 for p in (parents, mutants, mutation)):
            raise ValueError(
                "Genetic takes one or more budgets, population >= 4, parents, mutants and mutation in [0, 1]; "
                f"got {len(budgets)}, {population}, {parents}, {mutants}, {mutation}"
            )
        self.limits, self.population = Limits(space, costs, budgets), population
        self.mutants, self.mutation = mutants, mutation
        self.seeds = np.zeros((0, len(space)), dtype=np.int64) if seeds is None else space.canonical(seeds)
        self.best = Best(self.limits, max(2, round(parents * population)))
        self.met = 0

    def ask(self, n: int, rng: np.random.Generator) -> Indices:
        """[at most n, d] rows, each within some budget and none twice; the first generation first."""
        if self.met < self.population:
            return self.limits.first(self.seeds, n, self.met, rng)
        budget = rng.permutation(np.arange(n) % len(self.limits))
        one, two = self._parents(budget, rng), self._parents(budget, rng)
        mixed = crossed(self.limits.space, one, two, rng)
        changed = redrawn(self.limits.space, one, self.mutation, rng)
        rows = np.where((np.arange(n) < round(self.mutants * n))[:, None], changed, mixed)
        rows = self.limits.fitted(rows, self.limits.bounds[budget], rng)
        rows = rows[self.limits.inside(rows).any(1)]
        return rows[firsts(rows)]

    def _parents(self, budget: NDArray[np.int64], rng: np.random.Generator) -> Indices:
        """A parent for each child, of those of its budget; of any budget where its own has none yet."""
        everyone = np.concatenate(self.best.rows)
        pools = [rows if len(rows) else everyone for rows in self.best.rows]
        return np.stack([pools[b][rng.integers(len(pools[b]))] for b in budget])

    def tell(self, indices: Indices, scores: Table, step: int = 0, total_steps: int = 1) -> None:
        """Objectives [n, 1 + kinds] of rows [n, d], all to be minimised; the next parents are chosen."""
        self.met += len(indices)
        self.best.add(indices, scores)

    def front(self) -> tuple[Indices, Table]:
        """The non-dominated of all parents, and their objectives."""
        return self.best.front()

    def state_dict(self) -> dict[str, Any]:
        """The parents of each budget, and how many rows were told."""
        return {"best": self.best.state_dict(), "met": self.met}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.best.load_state_dict(state["best"])
        self.met = int(state["met"])
