"""What a search is about: which subnets, worth how much, at what cost, within which limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from supernet.cost import Cost, Costs, label, over
from supernet.interfaces import Predictor
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]
WITHIN = 1e-12
"""Relative excess over a limit that is rounding of a sum, not cost."""


@dataclass(frozen=True)
class Budget:
    """Hard limits that hold together.

    Attributes:
        label: its name, as the user typed the limits.
        limits: kind -> limit in the kind's unit.
    """

    label: str
    limits: dict[str, float]


class Problem:
    """Maximise the predicted score and minimise each kind of cost that some budget limits.

    Args:
        space: the subnets to choose from; a view is honoured.
        costs: their costs.
        predictor: what they are worth, higher is better.
        budgets: mappings kind -> limit (number, number with SI prefix, or wXaY), at least one.

    Attributes:
        budgets: the limits, in the kinds' units.
        kinds: the limited kinds, in order of first mention; the costs among the objectives.

    Raises:
        ValueError: no budgets, or one that cannot be read or reached.
    """

    def __init__(
        self,
        space: SearchSpace,
        costs: Costs,
        predictor: Predictor,
        budgets: Mapping[str, str | float] | Sequence[Mapping[str, str | float]],
    ) -> None:
        many = [budgets] if isinstance(budgets, Mapping) else list(budgets)
        if not many:
            raise ValueError("a search needs at least one budget, e.g. budgets=[{'bitops': 'w4a4'}]")
        self.space, self.costs, self.predictor = space, costs, predictor
        limits = [costs.parse(budget) for budget in many]
        self.budgets = tuple(Budget(*named) for named in zip(_labels(many), limits, strict=True))
        self.kinds: dict[str, Cost] = {kind: costs.kinds[kind] for b in self.budgets for kind in b.limits}

    def scores(self, indices: Indices) -> Table:
        """[n] predicted scores."""
        return self.predictor.predict(indices)[0]

    def objectives(self, indices: Indices) -> Table:
        """[n, 1 + kinds] to be minimised: minus the predicted score, then each kind of cost."""
        return np.stack([-self.scores(indices), *(f.value(indices) for f in self.kinds.values())], axis=1)

    def within(self, budget: Budget, indices: Indices) -> NDArray[np.bool_]:
        """[n] whether each row keeps every limit."""
        return over(budget.limits, self.kinds, indices) <= WITHIN


class Archive:
    """The best rows met within each budget, whichever algorithm met them.

    Args:
        problem: whose budgets.
        keep: rows kept for each budget.
    """

    def __init__(self, problem: Problem, keep: int = 64) -> None:
        self.problem, self.keep = problem, keep
        empty = np.zeros((0, len(problem.space)), dtype=np.int64)
        self.best: list[tuple[Indices, Table]] = [(empty, np.zeros(0)) for _ in problem.budgets]

    def add(self, rows: Indices, scores: Table) -> None:
        """Rows [n, d] with their predicted scores [n]; each is kept under every budget that it keeps."""
        for b, budget in enumerate(self.problem.budgets):
            inside = self.problem.within(budget, rows)
            kept, theirs = self.best[b]
            every, values = np.concatenate([kept, rows[inside]]), np.concatenate([theirs, scores[inside]])
            _, first = np.unique(every, axis=0, return_index=True)
            order = np.sort(first)[np.argsort(-values[np.sort(first)], kind="stable")][: self.keep]
            self.best[b] = every[order], values[order]

    def top(self, b: int, n: int) -> Indices:
        """[at most n, d] best rows within budget b, best first."""
        return self.best[b][0][:n]


def _labels(budgets: Sequence[Mapping[str, str | float]]) -> list[str]:
    """Names of budgets; a name that comes again gets a number."""
    names: list[str] = []
    for budget in budgets:
        name = label(budget)
        again = sum(n == name or n.startswith(f"{name}#") for n in names)
        names.append(f"{name}#{again + 1}" if again else name)
    return names
