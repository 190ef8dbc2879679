"""What a search is about: which subnets, worth how much, at what cost, within which limits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.allocation import Program, reach
from search.refine import refined
from supernet.config import si
from supernet.cost import UNITS, Cost, Costs, Factors, label, over
from supernet.interfaces import Predictor
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]
WITHIN = 1e-12
"""Relative excess over a limit that is rounding of a sum, not cost."""
FLOOR = "accuracy"
"""The one thing that a budget may ask for at least."""
CHEAP = "bitops"
"""What is made cheap under a floor where nothing is limited."""
RUNGS = 6
"""Budgets of an algorithm in place of one with a floor, evenly over the logarithm of the cost."""
BISECTIONS = 16


@dataclass(frozen=True)
class Budget:
    """What holds together: hard limits, and perhaps a floor.

    Attributes:
        label: its name, as the user typed the limits.
        limits: kind -> limit in the kind's unit; at least one. With a floor, the first kind is made as small as may be
            (where the user limits nothing, its limit is the largest that there is).
        floor: the least predicted accuracy, 0..1; None: as much as the limits allow.
    """

    label: str
    limits: dict[str, float]
    floor: float | None = None

    @property
    def first(self) -> str:
        """The first limited kind."""
        return next(iter(self.limits))

    def rank(self, measured: float | None, predicted: float, costs: Mapping[str, float]) -> tuple[float, ...]:
        """What orders candidates, better is larger: by measured accuracy, then predicted, then cost.

        With a floor: those that reach it, by measurement where there is one, by falling cost; then the others.
        """
        cost = costs[self.first]
        if self.floor is None:
            return measured or 0.0, predicted, -cost
        known = predicted if measured is None else measured
        return (1.0, -cost, known) if known >= self.floor else (0.0, known, -cost)


def read(costs: Costs, budget: Mapping[str, str | float]) -> tuple[dict[str, float], float | None]:
    """The limits of a budget as users type it, and its floor.

    Raises:
        ValueError: it cannot be read, or no subnet is within the limits (names the nearest that is).
    """
    typed = dict(budget) if isinstance(budget, Mapping) else budget
    floor = _floor(typed.pop(FLOOR)) if isinstance(typed, dict) and FLOOR in typed else None
    if floor is not None and not typed:
        return {CHEAP: reach(costs.space, costs.kinds[CHEAP])[1]}, floor
    limits = costs.limits(typed)
    if len(limits) == 1:
        costs.check(limits)
    else:
        Program(costs.space, Factors(), {kind: costs.kinds[kind] for kind in limits}).solve(limits)
    return limits, floor


def _floor(text: str | float) -> float:
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", str(text))
    value = float(match[1]) / (100 if match[2] else 1) if match else np.nan
    if isinstance(text, bool) or not 0 < value < 1:
        raise ValueError(f"a floor of accuracy is a share between 0 and 1, e.g. 0.88 or 88%, got {text!r}")
    return value


@dataclass(frozen=True)
class _Shortfall:
    """2 - predicted accuracy, so that a floor is a limit like others; only evaluated, never solved."""

    problem: Problem
    parts: tuple[Factors, ...] = ()

    def value(self, indices: Indices) -> Table:
        return 2 - self.problem.scores(indices)

    def linear(self, limit: float) -> tuple[Table, Table]:
        raise TypeError("a predicted accuracy is no sum of tables")


class Problem:
    """Maximise the predicted score and minimise each kind of cost that some budget limits.

    Args:
        space: the subnets to choose from; a view is honoured.
        costs: their costs.
        predictor: what they are worth, higher is better.
        budgets: mappings kind -> limit (number, number with SI prefix, or wXaY), at least one. The kind `accuracy` is a
            floor: the cheapest subnet that is predicted to reach it, in the first limited kind, else in BitOps.

    Attributes:
        budgets: the limits, in the kinds' units.
        kinds: the limited kinds, in order of first mention; the costs among the objectives.

    Raises:
        ValueError: no budgets, one that cannot be read or reached, or a floor where the predictor only ranks.
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
        limits = [read(costs, budget) for budget in many]
        self.budgets = tuple(Budget(name, *found) for name, found in zip(_labels(many), limits, strict=True))
        self.kinds: dict[str, Cost] = {kind: costs.kinds[kind] for b in self.budgets for kind in b.limits}
        if getattr(predictor, "ranks_only", False) and any(b.floor is not None for b in self.budgets):
            raise ValueError(
                "a floor of accuracy needs predicted accuracies, and an additive sensitivity only ranks; "
                "run `elastibit predict run=...` first, then search with rank_by=run"
            )

    @property
    def targets(self) -> list[dict[str, float]]:
        """What an algorithm is to search: the limits of each budget; for one with a floor, those of some cheaper ones,
        since the answer lies somewhere below its limits."""
        found = []
        for budget in self.budgets:
            costs = [budget.limits[budget.first]]
            if budget.floor is not None:
                cheapest = self.kinds[budget.first].value(self.cheapest(budget)[None])[0]
                costs = np.geomspace(max(float(cheapest), 1e-12), costs[0], RUNGS + 1)[1:].tolist()
            found += [budget.limits | {budget.first: cost} for cost in costs]
        return found

    def cheapest(self, budget: Budget) -> Indices:
        """[d] the row within a budget's limits that costs least of the first kind."""
        kinds = {kind: self.kinds[kind] for kind in budget.limits}
        return Program(self.space, Factors(), kinds).least(budget.first, budget.limits)

    def scores(self, indices: Indices) -> Table:
        """[n] predicted scores."""
        return self.predictor.predict(indices)[0]

    def objectives(self, indices: Indices) -> Table:
        """[n, 1 + kinds] to be minimised: minus the predicted score, then each kind of cost."""
        return np.stack([-self.scores(indices), *(f.value(indices) for f in self.kinds.values())], axis=1)

    def within(self, budget: Budget, indices: Indices) -> NDArray[np.bool_]:
        """[n] whether each row keeps every limit, and is predicted to reach the floor if there is one."""
        inside = over(budget.limits, self.kinds, indices) <= WITHIN
        return inside if budget.floor is None else inside & (self.scores(indices) >= budget.floor)

    def goal(self, budget: Budget, indices: Indices, scores: Table) -> Table:
        """[n] what is maximised within the limits, given predicted scores [n]: these.

        With a floor: the share of the first limit that is left, 0..1; what does not reach the floor lacks this much of
        it, below 0.
        """
        if budget.floor is None:
            return scores
        left = 1 - self.kinds[budget.first].value(indices) / budget.limits[budget.first]
        return np.where(scores >= budget.floor, np.maximum(left, 0.0), scores - budget.floor)

    def improved(self, budget: Budget, row: Indices) -> Indices:
        """[d] where a row within the limits leads by single changes and exchanges."""
        if budget.floor is None or self.scores(row[None])[0] < budget.floor:
            return refined(self.space, row, budget.limits, self.kinds, self.scores)
        cost = self.kinds[budget.first]
        limits, kinds = budget.limits | {FLOOR: 2 - budget.floor}, {**self.kinds, FLOOR: _Shortfall(self)}
        return refined(self.space, row, limits, kinds, lambda rows: -cost.value(rows))

    def allocated(self, budget: Budget, program: Program) -> Indices:
        """[d] the optimum of an integer program within a budget; with a floor, the cheapest optimum that reaches it
        (by bisection of the first limit), or the optimum at the limit where none does."""
        best = program.solve(budget.limits)
        if budget.floor is None:
            return best
        low = float(self.kinds[budget.first].value(self.cheapest(budget)[None])[0])
        high = budget.limits[budget.first]
        for _ in range(BISECTIONS):
            middle = (low * high) ** 0.5
            row = program.solve(budget.limits | {budget.first: max(middle, low * (1 + 1e-9))})
            if self.scores(row[None])[0] >= budget.floor:
                best, high = row, middle
            else:
                low = middle
        return best


class Archive:
    """The best rows met within each budget, whichever algorithm met them.

    Args:
        problem: whose budgets.
        keep: rows kept for each budget.

    Attributes:
        best: for each budget, rows within its limits and their predicted scores, best first; those below a floor last.
    """

    def __init__(self, problem: Problem, keep: int = 64) -> None:
        self.problem, self.keep = problem, keep
        empty = np.zeros((0, len(problem.space)), dtype=np.int64)
        self.best: list[tuple[Indices, Table]] = [(empty, np.zeros(0)) for _ in problem.budgets]

    def add(self, rows: Indices, scores: Table) -> None:
        """Rows [n, d] with their predicted scores [n]; each is kept under every budget whose limits it keeps."""
        for b, budget in enumerate(self.problem.budgets):
            inside = over(budget.limits, self.problem.kinds, rows) <= WITHIN
            kept, theirs = self.best[b]
            every, values = np.concatenate([kept, rows[inside]]), np.concatenate([theirs, scores[inside]])
            goal = self.problem.goal(budget, every, values)
            _, first = np.unique(every, axis=0, return_index=True)
            order = np.sort(first)[np.argsort(-goal[np.sort(first)], kind="stable")][: self.keep]
            self.best[b] = every[order], values[order]

    def top(self, b: int, n: int) -> Indices:
        """[at most n, d] best rows within budget b, best first."""
        rows, scores = self.best[b]
        floor = self.problem.budgets[b].floor
        return rows[:n] if floor is None else rows[scores >= floor][:n]

    def check(self) -> None:
        """Raise ValueError, naming the nearest that was met, if nothing reaches the floor of some budget."""
        for b, budget in enumerate(self.problem.budgets):
            if budget.floor is not None and not len(self.top(b, 1)):
                rows, scores = self.best[b]
                limits = [f"{kind} <= {si(limit, UNITS.get(kind, ''))}" for kind, limit in budget.limits.items()]
                near = f"the best is predicted at {scores[0]:.4f}" if len(rows) else "none was met"
                raise ValueError(
                    f"no subnet with {' and '.join(limits)} is predicted to reach accuracy {budget.floor:g}; "
                    f"{near}: lower the floor or raise the limits"
                )


def _labels(budgets: Sequence[Mapping[str, str | float]]) -> list[str]:
    """Names of budgets; a name that comes again gets a number."""
    names: list[str] = []
    for budget in budgets:
        name = label(budget)
        again = sum(n == name or n.startswith(f"{name}#") for n in names)
        names.append(f"{name}#{again + 1}" if again else name)
    return names
