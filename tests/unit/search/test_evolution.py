"""The evolution: within budgets always, near the optimum, repeatable, resumable."""

import numpy as np
import pytest
from deap import base, tools

from search.evolution import NSGA2, survivors
from search.keeping import dominates
from search.variation import crossed, mutated
from supernet.cost import over


def objectives(costs, objective, kinds=("bitops",)):
    def values(rows):
        return np.stack([objective.value(rows), *(costs.kinds[k].value(rows) for k in kinds)], axis=1)

    return values


def run(algorithm, values, generations, n, rng):
    for step in range(generations):
        rows = algorithm.ask(n, rng)
        algorithm.tell(rows, values(rows), step, generations)


def test_the_optimum_of_an_enumerable_space_is_found(small, every_row, sensitivity, rng):
    space, costs = small
    objective = sensitivity(space, costs.layers, rng)
    rows = every_row(space)
    limits = [float(v) for v in np.quantile(costs.kinds["bitops"].value(rows), [0.1, 0.4, 0.8])]
    algorithm = NSGA2(space, costs, [{"bitops": v} for v in limits], population=40)
    run(algorithm, objectives(costs, objective), 15, 40, rng)
    for limit, values in zip(limits, algorithm.best.values, strict=True):
        optimum = objective.value(rows[costs.kinds["bitops"].value(rows) <= limit]).min()
        assert values[0, 0] <= 1.02 * optimum


def test_every_row_asked_for_is_admissible_and_within_a_budget(short, sensitivity, rng):
    space, costs = short
    view = space.restrict({"s?.*.weight": lambda c: c.bits >= 3}).tie([["s0.*.input"]])
    objective = sensitivity(space, costs.layers, rng)
    for _ in range(3):
        budgets = [
            {"bitops": costs.limit("bitops", "w4a4") * rng.uniform(0.8, 2)},
            {"bytes": costs.limit("bytes", "w4a4") * rng.uniform(0.9, 2), "bitops": costs.limit("bitops", "w6a6")},
        ]
        algorithm = NSGA2(view, costs, budgets, population=20)
        for step in range(3):
            rows = algorithm.ask(20, rng)
            assert view.admits(rows).all() and len(np.unique(rows, axis=0)) == len(rows)
            assert np.any([over(b, costs.kinds, rows) <= 1e-12 for b in budgets], axis=0).all()
            algorithm.tell(rows, objectives(costs, objective, ("bitops", "bytes"))(rows), step, 3)


def test_seeds_come_first_and_survive(chain, sensitivity, rng):
    space, costs = chain
    budgets = [{"bitops": costs.limit("bitops", "w4a4")}]
    seeds = np.array([space.uniform("w4a4").row, space.largest().row])
    algorithm = NSGA2(space, costs, budgets, seeds=seeds, population=8)
    rows = algorithm.ask(8, rng)
    assert np.array_equal(rows[0], seeds[0]) and not (rows == seeds[1]).all(1).any()
    values = objectives(costs, sensitivity(space, costs.layers, rng))(rows)
    values[0, 0] = -1.0  # the best of all, and by far not the cheapest
    algorithm.tell(rows, values, 0, 1)
    assert np.array_equal(algorithm.best.rows[0][0], seeds[0]) and (algorithm.rows == seeds[0]).all(1).any()


def test_the_generator_decides_and_a_stored_state_continues_alike(short, sensitivity):
    space, costs = short
    values = objectives(costs, sensitivity(space, costs.layers, np.random.default_rng(0)))
    budgets = [{"bitops": costs.limit("bitops", w)} for w in ("w3a3", "w5a5")]
    one, two = (NSGA2(space, costs, budgets, population=20) for _ in range(2))
    rngs = [np.random.default_rng(4), np.random.default_rng(4)]
    run(one, values, 4, 20, rngs[0])
    for step in range(4):
        rows = two.ask(20, rngs[1])
        np.random.seed(step)  # noqa: NPY002 (the disturbance)
        two.tell(rows, values(rows), step, 4)
    assert np.array_equal(one.rows, two.rows)
    resumed = NSGA2(space, costs, budgets, population=20)
    resumed.load_state_dict(one.state_dict())
    run(one, values, 3, 20, rngs[0])
    run(resumed, values, 3, 20, rngs[1])
    assert resumed.state_dict() == one.state_dict()
    with pytest.raises(ValueError, match="budgets"):
        NSGA2(space, costs, budgets[:1]).load_state_dict(one.state_dict())


def test_the_front_is_not_dominated_and_dominates_the_rest(short, sensitivity, rng):
    space, costs = short
    values = objectives(costs, sensitivity(space, costs.layers, rng))
    algorithm = NSGA2(space, costs, [{"bitops": costs.limit("bitops", "w8a8")}], population=30)
    run(algorithm, values, 5, 30, rng)
    rows, front = algorithm.front()
    assert np.array_equal(values(rows), front)
    assert not any(dominates(front, v[None]).any() for v in front)
    assert all((front <= v).all(1).any() for v in algorithm.values)


def test_survival_is_textbook_nsga2(rng):
    """Against DEAP's selection with its other sorting, and the definition of the first front."""
    values = rng.random((60, 2)).round(2)
    chosen, _ = survivors(values, 25)
    fitness = type("Fitness", (base.Fitness,), {"weights": (-1.0, -1.0)})
    points = []
    for i, row in enumerate(values.tolist()):
        point = type("Point", (), {})()
        point.fitness, point.at = fitness(row), i
        points.append(point)
    other = {p.at for p in tools.selNSGA2(points, 25, nd="standard")}
    assert sorted(map(tuple, values[sorted(other)])) == sorted(map(tuple, values[np.sort(chosen)]))
    first = {i for i, v in enumerate(values) if not dominates(values, v[None]).any()}
    assert first <= set(chosen.tolist())


def test_children_take_genes_from_the_parent_that_uses_them(chain, rng):
    space, _ = chain
    shallow, deep = np.array([space.smallest().row]), np.array([space.largest().row])
    children = crossed(space, np.repeat(shallow, 200, axis=0), np.repeat(deep, 200, axis=0), rng)
    active, only_deep = space.active(children), ~space.active(shallow)[0]
    assert (children[:, only_deep] == np.where(active[:, only_deep], deep[0, only_deep], 0)).all()
    assert space.admits(children).all() and len(np.unique(children, axis=0)) > 100


def test_genes_that_wake_up_are_drawn(chain, rng):
    space, _ = chain
    rows = np.repeat(np.array([space.smallest().row]), 3_000, axis=0)
    changed = mutated(space, rows, 0.1, rng)
    gene = space.position["s0.2.a.weight"]
    woken = changed[space.active(changed)[:, gene], gene]
    assert len(woken) > 30 and len(np.unique(woken)) > 15
    assert space.admits(changed).all()


@pytest.mark.parametrize("settings", [{"budgets": []}, {"population": 2}, {"crossover": 1.2}, {"mutations": -1}])
def test_settings_out_of_range_are_refused(small, settings):
    space, costs = small
    with pytest.raises(ValueError, match="NSGA2 takes"):
        NSGA2(space, costs, **({"budgets": [{"bitops": 1e9}]} | settings))
