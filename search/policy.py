"""A policy for each budget, learned by REINFORCE from what its draws are worth.

The controller of FLIQS (Dotzel et al., AutoML 2024, arXiv:2308.03290, section 3) on a supernet that is trained already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from search.keeping import Best, arrays, firsts, keys
from search.variation import Limits
from supernet.cost import Costs
from supernet.samplers.controller import Controller, entropy_price
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]
LEAST_SPREAD = 1e-12


class Policy:
    """Asks for draws of one policy a budget, which learn and settle; keeps the best row within each budget.

    The reward of a draw is, with cost C and limit C0 (of several limits, the one that C is most of),

        r = score / spread - beta |1 - C / C0|.

    Departures from FLIQS: `spread` is the standard deviation of what uniform draws scored, since predicted scores have
    any unit. Nothing over budget is evaluated: a draw that is over its budget is repaired by as few random steps as
    that takes, and is worth what the repaired row scores and what itself costs. The repair counts as part of what is
    sampled from, so the gradient stays that of the expected reward; the penalty keeps the policy near its budget.

    Args:
        space: what to choose from; a view is honoured.
        costs: its costs.
        budgets: limits, kind -> limit in the kind's unit; at least one, each reachable.
        seeds: [k, d] rows of the first generation, evaluated beside the draws; those over every budget are repaired.
        population: taken because every algorithm is constructed alike; a generation is what is asked for.
        beta: price of missing the budget by all of it, in spreads of the score, at least 0.
        entropy: price of a nat of mean entropy in the last generation, in spreads, at least 0.
        learning_rate: of Adam; one step a generation.
        delay: share of the generations that draw uniformly, 0..1 without 1.

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
        beta: float = 1.0,
        entropy: float = 0.5,
        learning_rate: float = 0.1,
        delay: float = 0.1,
    ) -> None:
        del population
        if not budgets or beta < 0 or entropy < 0 or learning_rate <= 0 or not 0 <= delay < 1:
            raise ValueError(
                "Policy takes one or more budgets, beta >= 0, entropy >= 0, learning_rate > 0 and delay in [0, 1); "
                f"got {len(budgets)}, {beta}, {entropy}, {learning_rate}, {delay}"
            )
        self.limits = Limits(space, costs, budgets)
        self.best = Best(self.limits)
        self.seeds = np.zeros((0, len(space)), dtype=np.int64) if seeds is None else space.canonical(seeds)
        self.beta, self.entropy, self.delay = beta, entropy, delay
        self.controllers = [Controller(space, learning_rate) for _ in budgets]
        self.met, self.passed = 0, 0.0
        self.uniform: list[list[float]] = [[] for _ in budgets]
        self._drawn, self._asked, self._budget = self._nothing()

    def _nothing(self) -> tuple[Indices, Indices, NDArray[np.int64]]:
        empty = np.zeros((0, len(self.limits.space)), dtype=np.int64)
        return empty, empty, np.zeros(0, dtype=np.int64)

    def ask(self, n: int, rng: np.random.Generator) -> Indices:
        """[at most n, d] rows, each within some budget and none twice; the seeds first."""
        given = self.seeds[self.met : self.met + n].copy()
        over = ~self.limits.inside(given).any(1)
        bounds = self.limits.bounds[np.flatnonzero(over) % len(self.limits)]
        given[over] = self.limits.fitted(given[over], bounds, rng)
        budget = (self.met + np.arange(n - len(given))) % len(self.limits)
        drawn = np.zeros((len(budget), len(self.limits.space)), dtype=np.int64)
        for b, controller in enumerate(self.controllers):
            drawn[budget == b] = controller.draw(int((budget == b).sum()), rng, uniform=self.passed < self.delay)
        asked = self.limits.fitted(drawn, self.limits.bounds[budget], rng, filling=0.0)
        inside = self.limits.inside(asked).any(1)
        self._drawn, self._asked, self._budget = drawn[inside], asked[inside], budget[inside]
        rows = np.concatenate([given[self.limits.inside(given).any(1)], self._asked])
        return rows[firsts(rows)]

    def tell(self, indices: Indices, scores: Table, step: int = 0, total_steps: int = 1) -> None:
        """Objectives [n, 1 + kinds] of rows [n, d], all to be minimised; one step of each policy on its draws.

        Rows that no policy drew are kept if they are good, and teach nothing.
        """
        self.met += len(indices)
        self.best.add(indices, scores)
        known = dict(zip(keys(indices), -scores[:, 0], strict=True))
        worth = np.array([known.get(key, np.nan) for key in keys(self._asked)])
        for b in range(len(self.limits)):
            mine = (self._budget == b) & np.isfinite(worth)
            if mine.any():
                self._learn(b, self._drawn[mine], worth[mine], step, total_steps)
        self._drawn, self._asked, self._budget = self._nothing()
        self.passed = (step + 1) / total_steps

    def _learn(self, b: int, drawn: Indices, worth: Table, step: int, total_steps: int) -> None:
        if step < self.delay * total_steps or not self.uniform[b]:
            self.uniform[b] += worth.tolist()
            return
        spread = max(float(np.std(self.uniform[b])), LEAST_SPREAD)
        missed = np.abs(1 - (self.limits.spent(drawn) / self.limits.bounds[b]).max(1))
        price = entropy_price(step + 1, total_steps, self.delay, self.entropy)
        self.controllers[b].learn(drawn, worth / spread - self.beta * missed, price)

    def front(self) -> tuple[Indices, Table]:
        """The best row within each budget, without what another of them dominates, and their objectives."""
        return self.best.front()

    def state_dict(self) -> dict[str, Any]:
        """The policies, what they wait to be told, the best rows, and how far the search is."""
        return {
            "controllers": [controller.state_dict() for controller in self.controllers],
            "best": self.best.state_dict(),
            "uniform": self.uniform,
            "waiting": [self._drawn.tolist(), self._asked.tolist(), self._budget.tolist()],
            "met": self.met,
            "passed": self.passed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.best.load_state_dict(state["best"])
        for controller, its in zip(self.controllers, state["controllers"], strict=True):
            controller.load_state_dict(its)
        drawn, asked, budget = state["waiting"]
        self._drawn, self._asked = (arrays(self.limits, rows, [])[0] for rows in (drawn, asked))
        self._budget = np.array(budget, dtype=np.int64)
        self.uniform = [[float(v) for v in its] for its in state["uniform"]]
        self.met, self.passed = int(state["met"]), float(state["passed"])
