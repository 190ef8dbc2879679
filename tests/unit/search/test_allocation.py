"""The integer program against enumeration, and against its own problem written down another way."""

import itertools
import time

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from search.allocation import Program, allocate, undominated
from supernet.config import Layer, QuantConfig
from supernet.cost import Factors, gated, over
from supernet.formats.integer import Integer
from supernet.space import Dimension, SearchSpace


def objective_of(space, layers, rng, wild=False):
    """Random sensitivities; `wild`: terms over genes of different layers, without gates."""
    terms = [((0,), rng.random(3)), ((1,), rng.random(2))]
    for layer in layers:
        for gene in (layer.weight, layer.input):
            terms.append(gated(space, layer, (gene,), rng.random(len(space.dimensions[space.position[gene]].choices))))
    if wild:
        for a, b in [(2, 4), (3, 7), (0, 5)]:
            terms.append(((a, b), rng.random((space.sizes[a], space.sizes[b]))))
        terms.append(((), np.array(0.3)))
    return Factors(tuple(terms))


VIEWS = {
    "whole": lambda s: s,
    "restricted": lambda s: s.restrict({"b.weight": lambda c: c.bits > 2, "a.input": lambda c: c.bits > 2}),
    "tied": lambda s: s.tie([["a.weight", "c.weight"], ["*.input"]]),
    "pinned": lambda s: s.pin({"s.depth": 2, "c.weight": s.dimensions[-2].choices[3]}).tie([["a.weight", "b.weight"]]),
}


@pytest.mark.parametrize("wild", [False, True], ids=["gated", "wild"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kinds", [("bitops",), ("bytes", "macs"), ("bitops", "bytes")], ids="-".join)
def test_it_equals_enumeration(rng, small, every_row, view, kinds, wild):
    whole, costs = small
    space = VIEWS[view](whole)
    rows = every_row(space)
    for _ in range(3):
        objective = objective_of(whole, costs.layers, rng, wild)
        values = {kind: costs.kinds[kind].value(rows) for kind in kinds}
        witness = rows[rng.integers(len(rows))][None]
        limits = {kind: float(costs.kinds[kind].value(witness)[0] * rng.choice([1.0, 1.05])) for kind in kinds}
        feasible = np.all([values[kind] <= limit for kind, limit in limits.items()], axis=0)
        best = objective.value(rows[feasible]).min()
        row = allocate(space, objective, limits, costs.kinds)
        assert space.admits(row[None]).all() and over(limits, costs.kinds, row[None])[0] <= 0
        assert objective.value(row[None])[0] == pytest.approx(best, abs=1e-9)


def test_impossible_budgets_are_named(rng, small, every_row):
    space, costs = small
    objective = objective_of(space, costs.layers, rng)
    least = costs.kinds["bytes"].value(every_row(space)).min()
    with pytest.raises(
        ValueError, match=f"no subnet has bytes <= .*; the nearest has bytes {least:g} B .1.01 times the limit.: raise"
    ):
        allocate(space, objective, {"bytes": least * 0.99}, costs.kinds)
    with pytest.raises(ValueError, match="names its kind"):
        allocate(space, objective, {"joules": 1.0}, costs.kinds)
    assert costs.kinds["bytes"].value(allocate(space, objective, {"bytes": least}, costs.kinds)[None])[0] == least


def test_what_is_dominated_is_dropped():
    values = np.array([[1.0, 5], [2, 4], [2, 5], [1, 5], [3, 1], [0, 9]])
    assert sorted(undominated(values)) == [0, 1, 4, 5]


def reference(macs, weight, data, budget):
    """The same problem straight from its definition: one binary for each pair of bits of each layer."""
    pairs = np.array(list(itertools.product(range(2, 9), repeat=2)))
    value = (weight[:, None] * 4.0 ** -pairs[:, 0] + data[:, None] * 4.0 ** -pairs[:, 1]).ravel()
    cost = (macs[:, None] * pairs[:, 0] * pairs[:, 1]).ravel() / budget
    one = np.kron(np.eye(len(macs)), np.ones(len(pairs)))
    constraints = [LinearConstraint(one, 1, 1), LinearConstraint(cost[None] * 1e4, 0, 1e4)]
    settings = {"bounds": Bounds(0, 1), "options": {"mip_rel_gap": 1e-9}}
    return milp(value * 1e4, constraints=constraints, integrality=np.ones(len(value)), **settings)


def test_the_yardstick_is_solved_to_the_optimum(yardstick):
    space, costs, objective, problem = yardstick
    program = Program(space, objective, {"bitops": costs.kinds["bitops"]})
    found = []
    for bits in range(2, 9):
        limit = costs.limit("bitops", f"w{bits}a{bits}")
        row = program.solve({"bitops": limit})
        assert costs.kinds["bitops"].value(row[None])[0] <= limit
        found.append(objective.value(row[None])[0])
        assert found[-1] == pytest.approx(reference(*problem, limit).fun / 1e4, rel=1e-8)
    assert found[0] == pytest.approx(problem[1].sum() / 16 + problem[2].sum() / 16)
    assert np.all(np.diff(found) < 0)


def test_twenty_layers_with_depth_take_under_a_second(chain, rng):
    space, costs = chain
    terms = [((space.position[f"s{s}.depth"],), np.array([0.2, 0.08, 0.0])) for s in range(3)]
    for layer in costs.layers:
        for gene in (layer.weight, layer.input):
            choices = space.dimensions[space.position[gene]].choices
            noise = np.array([4.0**-c.bits * (1.1 - 0.1 * c.symmetric) for c in choices])
            terms.append(gated(space, layer, (gene,), rng.lognormal() * noise))
    program = Program(space, Factors(tuple(terms)), {kind: costs.kinds[kind] for kind in ("bitops", "bytes")})
    assert sum(len(b.choices) for b in program.blocks) < 2_000
    start = time.process_time()
    row = program.solve({"bitops": costs.limit("bitops", "w3a3"), "bytes": costs.limit("bytes", "w4a4")})
    assert time.process_time() - start < 1.0
    assert space.admits(row[None]).all()


def test_random_instances_over_eight_layers_equal_brute_force(rng):
    """3^8 assignments each, as AdaQuant's integer program is checked; bits of weight and input are one choice."""
    choices = tuple(QuantConfig(Integer(b)) for b in (2, 4, 8))
    layers = [Layer(f"l{i}", "conv", 1, 1, 1, False, False, (1,)) for i in range(8)]
    space = SearchSpace([Dimension(layer.weight, choices) for layer in layers])
    rows = np.array(list(itertools.product(range(3), repeat=8)))
    for _ in range(12):
        loss, macs = np.sort(rng.lognormal(0, 2, (8, 3)), axis=1)[:, ::-1], rng.integers(1, 1000, 8)
        objective = Factors(tuple(((i,), loss[i]) for i in range(8)))
        cost = Factors(tuple(((i,), macs[i] * np.array([4.0, 16.0, 64.0])) for i in range(8)))
        program, spent, values = Program(space, objective, {"bitops": cost}), cost.value(rows), objective.value(rows)
        best = []
        for share in (0.1, 0.2, 0.3, 0.5, 0.8):
            limit = float(spent.min() + share * (spent.max() - spent.min()))
            best.append(objective.value(program.solve({"bitops": limit})[None])[0])
            assert best[-1] == pytest.approx(values[spent <= limit].min(), rel=1e-9)
        assert np.all(np.diff(best) <= 0)
