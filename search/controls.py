"""What a winner has to beat within the same limits: subnets that cost no search, and random search at equal effort."""

from __future__ import annotations

import itertools

import numpy as np

from search.allocation import Program
from search.problem import Problem
from supernet.config import Granularity, QuantConfig
from supernet.cost import Factors, fill, repair
from supernet.samplers.cost_first import drawing
from supernet.space import Indices, SearchSpace, magnitude

CHUNKS = 20
"""Draws without a new random row after which there is none."""

Named = dict[str, Indices]


def controls(problem: Problem, sensitivity: Factors | None, rng: np.random.Generator) -> list[Named]:
    """For each budget, by name, the row [d] of each control that needs no measurement.

    Args:
        problem: whose budgets.
        sensitivity: of the integer program; None: there is none.
        rng: chooses what is raised where the program's optimum leaves room.
    """
    uniform = uniform_rows(problem.space)
    scores = problem.scores(uniform)
    program = Program(problem.space, sensitivity, problem.kinds) if sensitivity else None
    found: list[Named] = []
    for budget in problem.budgets:
        named: Named = {}
        fits = problem.within(budget, uniform)
        if fits.any():
            named["uniform"] = uniform[np.argmax(np.where(fits, problem.goal(budget, uniform, scores), -np.inf))]
        if program:
            optimum = problem.allocated(budget, program)[None]
            if budget.floor is None:
                optimum = fill(problem.space, optimum, budget.limits, problem.kinds, rng)
            named["integer_program"] = optimum[0]
        found.append(named)
    return found


def uniform_rows(space: SearchSpace) -> Indices:
    """[n, d] the largest architecture at uniform bits wXaY, for all X and Y that some dimension offers, in each form
    (granularity, symmetry) of weights and of inputs that some dimension offers."""
    weights, inputs = (_offered(space, kind) for kind in ("weight", "input"))
    rows = [
        space.uniform(f"w{w}a{a}", weight_form, input_form).row
        for w, a in itertools.product(weights[0], inputs[0])
        for weight_form, input_form in itertools.product(weights[1], inputs[1])
    ]
    return np.unique(np.array(rows, dtype=np.int64), axis=0)


def _offered(space: SearchSpace, kind: str) -> tuple[list[int], list[tuple[Granularity, bool]]]:
    """Bits and forms that the dimensions of one kind have."""
    choices = {c for d in space.dimensions if d.quantizes and d.name.endswith(kind) for c in d.choices}
    forms = {c.form for c in choices if isinstance(c, QuantConfig)}
    return sorted({magnitude(c) for c in choices}), sorted(forms, key=str)


def random_rows(problem: Problem, b: int, n: int, rng: np.random.Generator) -> Indices:
    """[at most n, d] distinct random rows within budget b, filled up to it: what random search measures.

    They are drawn at the cost of a limit (uniform bits in each layer would hardly ever be so cheap), brought within the
    others, and raised where there is room; under a floor at any cost below the limit, and kept where they are predicted
    to reach it. Fewer come back where the budget admits no more.
    """
    budget, space = problem.budgets[b], problem.space
    sampler, limit = drawing(space, problem.costs, budget.limits)
    rows: dict[tuple[int, ...], Indices] = {}
    barren = 0
    while len(rows) < n and barren < CHUNKS:
        before = len(rows)
        low = limit if budget.floor is None else min(sampler.edges[0], limit)
        drawn = sampler.at(np.exp(rng.uniform(np.log(low), np.log(limit), n)), rng)
        drawn = repair(space, drawn, budget.limits, problem.kinds, rng)
        if budget.floor is None:
            drawn = fill(space, drawn, budget.limits, problem.kinds, rng)
        for row in drawn[problem.within(budget, drawn)]:
            rows.setdefault(tuple(row.tolist()), row)
        barren = 0 if len(rows) > before else barren + 1
    return np.array(list(rows.values())[:n], dtype=np.int64).reshape(-1, len(space))
