"""Local search from the seeds, or from the best of a drawn generation: a climb within each budget, with restarts.

Iterated local search (Lourenço, Martin and Stützle, Handbook of Metaheuristics, 2003); its step is an integer program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from search.climb import Climb
from search.keeping import Best, firsts
from search.variation import Limits
from supernet.cost import Costs
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]


class Local:
    """Asks for the single changes of the best row within each budget, then for what their sum says is best.

    Args:
        space: what to choose from; a view is honoured.
        costs: its costs.
        budgets: limits, kind -> limit in the kind's unit; at least one, each reachable.
        seeds: [k, d] rows to start from; those over every budget are repaired.
        population: rows of the first generation, the seeds among them; each budget's climb starts from its best.

    Raises:
        ValueError: no budget, or a population below 1.
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
    ) -> None:
        if not budgets or population < 1:
            raise ValueError(
                f"Local takes one or more budgets and population >= 1; got {len(budgets)} and {population}"
            )
        self.limits, self.population = Limits(space, costs, budgets), population
        self.seeds = np.zeros((0, len(space)), dtype=np.int64) if seeds is None else space.canonical(seeds)
        self.best = Best(self.limits)
        self.climbs = [Climb(self.limits, b) for b in range(len(self.limits))]
        self.met = 0

    def ask(self, n: int, rng: np.random.Generator) -> Indices:
        """[at most n, d] rows, each within some budget and none twice; the first generation first."""
        if self.met < self.population:
            return self.limits.first(self.seeds, n, self.met, rng)
        asked: list[Indices] = []
        left = n
        for turn, climb in enumerate(self.climbs):
            share = -(-left // (len(self.climbs) - turn))
            asked.append(climb.ask(share, rng))
            left -= len(asked[-1])
        rows = np.concatenate(asked)
        return rows[firsts(rows)]

    def tell(self, indices: Indices, scores: Table, step: int = 0, total_steps: int = 1) -> None:
        """Objectives [n, 1 + kinds] of rows [n, d], all to be minimised."""
        self.met += len(indices)
        self.best.add(indices, scores)
        for climb in self.climbs:
            climb.tell(indices, scores)

    def front(self) -> tuple[Indices, Table]:
        """The best row within each budget, without what another of them dominates, and their objectives."""
        return self.best.front()

    def state_dict(self) -> dict[str, Any]:
        """The best rows and every climb, as plain Python."""
        return {"best": self.best.state_dict(), "climbs": [c.state_dict() for c in self.climbs], "met": self.met}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.best.load_state_dict(state["best"])
        for climb, its in zip(self.climbs, state["climbs"], strict=True):
            climb.load_state_dict(its)
        self.met = int(state["met"])
