"""Local search: it climbs, stays within the limits, and ends where nothing better is next to it."""

import itertools

import numpy as np

from search.allocation import allocate
from search.refine import refined
from supernet.cost import over


def score_of(objective):
    return lambda rows: -objective.value(rows)


def test_no_single_change_and_no_exchange_is_better(small, every_row, sensitivity, rng):
    space, costs = small
    objective = sensitivity(space, costs.layers, rng)
    rows = every_row(space)
    cost, value = costs.kinds["bitops"].value(rows), objective.value(rows)
    limits = {"bitops": float(np.quantile(cost, 0.4))}
    start = rows[cost <= limits["bitops"]][0]
    end = refined(space, start, limits, costs.kinds, score_of(objective))
    assert over(limits, costs.kinds, end[None])[0] <= 1e-12 and space.admits(end[None]).all()
    here = objective.value(end[None])[0]
    differ = (rows != end).sum(1)
    assert not ((differ == 1) & (cost <= limits["bitops"]) & (value < here)).any()
    active = np.flatnonzero(space.active(end[None])[0])
    for i, j in itertools.combinations(active, 2):
        pairs = (rows == end).all(1, where=~np.isin(np.arange(len(space)), [i, j])) & (cost <= limits["bitops"])
        assert not (value[pairs] < here - 1e-12).any()


def test_from_the_smallest_subnet_it_comes_near_the_optimum(short, sensitivity, rng):
    whole, costs = short
    space = whole.pin({"*.depth": 2})
    objective = sensitivity(space, costs.layers, rng)
    limits = {"bitops": costs.limit("bitops", "w4a4")}
    optimum = objective.value(allocate(space, objective, limits, costs.kinds)[None])[0]
    start = np.array(space.smallest().row)
    end = objective.value(refined(space, start, limits, costs.kinds, score_of(objective))[None])[0]
    assert optimum <= end + 1e-12 and end <= 1.2 * optimum < 0.5 * objective.value(start[None])[0]


def test_views_are_honoured(short, sensitivity, rng):
    space, costs = short
    view = space.restrict({"s?.*.weight": lambda c: c.symmetric, "s?.depth": [2]}).tie([["s?.*.input"]])
    objective = sensitivity(space, costs.layers, rng)
    limits = {"bitops": costs.limit("bitops", "w4a4"), "bytes": costs.limit("bytes", "w4a4")}
    end = refined(view, np.array(view.smallest().row), limits, costs.kinds, score_of(objective))
    assert view.admits(end[None]).all() and over(limits, costs.kinds, end[None])[0] <= 1e-12
    assert objective.value(end[None])[0] < objective.value(np.array([view.smallest().row]))[0] / 2
