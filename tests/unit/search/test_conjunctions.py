"""Limits on sums, maxima and averages at once: the program against enumeration."""

import numpy as np
import pytest

from search.allocation import Program, reach
from supernet.cost import Costs, Factors, fill, gated, over, repair
from supernet.costs.peak import Held, Step

DEEP, DEEPER = (("s.depth", (2, 3)),), (("t.depth", (2,)),)
STEPS = (
    Step("a", (Held(500, "a.input"), Held(300, 8))),
    Step("b", (Held(300, 8), Held(400, "b.input"), Held(64, 4)), DEEP),
    Step("add", (Held(300, 8), Held(300, 8), Held(64, 4)), DEEP),
    Step("c", (Held(700, "c.input"), Held(10, 32)), DEEPER),
    Step("d", (Held(90, "a.input"), Held(200, "c.input")), DEEPER),
)
VIEWS = {
    "whole": lambda s: s,
    "restricted": lambda s: s.restrict({"b.weight": lambda c: c.bits > 2, "a.input": lambda c: c.bits > 2}),
    "tied": lambda s: s.tie([["a.weight", "c.weight"], ["b.input", "c.input"]]),
    "pinned": lambda s: s.pin({"s.depth": 2, "c.weight": s.dimensions[-2].choices[3]}).tie([["a.input", "b.input"]]),
    "dear blocks": lambda s: s.restrict({"c.weight": lambda c: c.bits == 8, "b.*": lambda c: c.bits == 4}),
}
ALL = ("bitops", "bytes", "average_weight_bits", "average_input_bits", "peak_activation_bytes")


@pytest.fixture
def costs(small):
    """The costs of the small space, averages over all three layers and a peak among them."""
    space, made = small
    padded = (made.layers[0], *made.layers, made.layers[-1])  # so that none of them is first or last
    averages = Costs(space, padded).kinds
    full = Costs(space, made.layers, STEPS)
    full.kinds |= {kind: averages[kind] for kind in full.kinds if kind.startswith("average")}
    return full


def objective_of(space, layers, rng):
    genes = [gene for layer in layers for gene in (layer.weight, layer.input)]
    owner = {gene: layer for layer in layers for gene in (layer.weight, layer.input)}
    terms = [((0,), rng.random(3)), ((1,), rng.random(2))]
    terms += [gated(space, owner[g], (g,), rng.random(space.sizes[space.position[g]])) for g in genes]
    return Factors(tuple(terms))


def draw(costs, rows, rng):
    """Limits on one to four kinds that some row keeps, and a little more."""
    kinds = rng.choice(ALL, size=rng.integers(1, 5), replace=False)
    witness = rows[rng.integers(len(rows))][None]
    return {str(k): float(costs.kinds[k].value(witness)[0] * rng.choice([1.0, 1.02, 1.3])) for k in kinds}


@pytest.mark.parametrize("view", VIEWS)
def test_the_optimum_is_that_of_enumeration(costs, every_row, view):
    rng = np.random.default_rng(list(VIEWS).index(view))
    space = VIEWS[view](costs.space)
    rows = every_row(space)
    for _ in range(6):
        objective = objective_of(space, costs.layers, rng)
        program = Program(space, objective, {kind: costs.kinds[kind] for kind in ALL})
        for _ in range(3):  # one program, several budgets
            limits = draw(costs, rows, rng)
            best = objective.value(rows[over(limits, costs.kinds, rows) <= 1e-12]).min()
            row = program.solve(limits)
            assert space.admits(row[None]).all() and over(limits, costs.kinds, row[None])[0] <= 1e-12
            assert objective.value(row[None])[0] == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("view", VIEWS)
def test_an_impossible_conjunction_names_the_nearest_point(costs, every_row, view):
    rng = np.random.default_rng(list(VIEWS).index(view))
    space = VIEWS[view](costs.space)
    rows = every_row(space)
    objective = objective_of(space, costs.layers, rng)
    program = Program(space, objective, {kind: costs.kinds[kind] for kind in ALL})
    for _ in range(8):
        limits = {kind: limit * 0.4 for kind, limit in draw(costs, rows, rng).items()}
        excess = over(limits, costs.kinds, rows)
        found = program.nearest(limits)
        assert space.admits(found[None]).all()
        assert over(limits, costs.kinds, found[None])[0] == pytest.approx(excess.min(), abs=1e-8)
        if excess.min() > 1e-9:
            with pytest.raises(ValueError, match=r"no subnet has .*; the nearest has .* times the limit.*: raise"):
                program.solve(limits)


def test_what_is_named_can_be_typed_and_kept(costs):
    program = Program(costs.space, Factors(), {kind: costs.kinds[kind] for kind in ALL})
    with pytest.raises(ValueError) as error:
        program.solve({"bitops": 3_000.0, "peak_activation_bytes": 100.0, "average_weight_bits": 8.0})
    said = str(error.value).partition("the nearest has ")[2].partition(": raise")[0].split(" and ")
    limits = {part.split()[0]: " ".join(part.split(" (")[0].split()[1:]) for part in said}
    assert list(limits) == ["bitops", "peak_activation_bytes", "average_weight_bits"]
    assert said[0].endswith("times the limit)") and not said[2].endswith("limit)")
    read = costs.parse(limits)
    assert over(read, costs.kinds, program.solve(read)[None])[0] <= 1e-12


@pytest.mark.parametrize("view", VIEWS)
def test_what_can_be_reached(costs, every_row, view):
    space = VIEWS[view](costs.space)
    rows = every_row(space)
    for kind, cost in costs.kinds.items():
        values = cost.value(rows)
        assert reach(space, cost) == pytest.approx((values.min(), values.max()), rel=1e-9), kind
    assert Costs(space, costs.layers).reachable("bitops")[0] == costs.kinds["bitops"].value(rows).min()


@pytest.mark.parametrize("view", VIEWS)
def test_the_quick_check_refuses_nothing_that_exists(costs, every_row, view):
    """`check` runs before every search; the smallest value there is must pass, less must not."""
    space = VIEWS[view](costs.space)
    rows = every_row(space)
    viewed = Costs(space, costs.layers)
    viewed.kinds = costs.kinds
    for kind in ALL:
        least = float(costs.kinds[kind].value(rows).min())
        viewed.check({kind: least})
        with pytest.raises(ValueError, match="the smallest reaches"):
            viewed.check({kind: least * 0.99})


@pytest.mark.parametrize("view", VIEWS)
def test_repair_and_fill_know_all_kinds(costs, every_row, view):
    rng = np.random.default_rng(3)
    space = VIEWS[view](costs.space)
    rows = every_row(space)
    for _ in range(4):
        limits = draw(costs, rows, rng)
        fitted = repair(space, space.sample_indices(40, rng), limits, costs.kinds, rng)
        inside = over(limits, costs.kinds, fitted) <= 1e-12
        filled = fill(space, fitted[inside], limits, costs.kinds, rng)
        assert inside.mean() > 0.7 and (over(limits, costs.kinds, filled) <= 1e-12).all()
        assert space.admits(filled).all()


def test_the_optimum_is_monotone_in_the_budget(costs, every_row):
    rng = np.random.default_rng(5)
    objective = objective_of(costs.space, costs.layers, rng)
    kinds = {kind: costs.kinds[kind] for kind in ("bytes", "average_input_bits", "peak_activation_bytes")}
    program = Program(costs.space, objective, kinds)
    limits = {"bytes": 130.0, "average_input_bits": 5.5, "peak_activation_bytes": 900.0}
    for kind, (low, high) in {kind: reach(costs.space, cost) for kind, cost in kinds.items()}.items():
        others = {k: reach(costs.space, c)[1] for k, c in kinds.items()} | limits | {kind: high}
        feasible = [low + s * (high - low) for s in (0.6, 0.7, 0.8, 0.9, 1.0)]
        best = [objective.value(program.solve(others | {kind: limit})[None])[0] for limit in feasible]
        assert np.all(np.diff(best) <= 1e-9)
