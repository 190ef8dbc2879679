"""The cheapest subnet of a given accuracy, against enumeration; and new kinds of budgets in a whole search."""

from types import SimpleNamespace

import numpy as np
import pytest

from predictors.additive import Additive
from search.allocation import Program
from search.problem import Archive, Problem
from search.run import search as run_search
from supernet.cost import Costs, over
from supernet.costs.peak import Held, Step

STEPS = (
    Step("a", (Held(500, "a.input"), Held(300, 8))),
    Step("b", (Held(300, 8), Held(400, "b.input"), Held(64, 4)), (("s.depth", (2, 3)),)),
    Step("c", (Held(700, "c.input"), Held(10, 32)), (("t.depth", (2,)),)),
)


class Saturating:
    """Accuracy that falls with the square of an additive error: not additive itself."""

    def __init__(self, objective):
        self.objective = objective

    def predict(self, rows):
        return 0.95 / (1 + self.objective.value(rows) ** 2), np.full(len(rows), 0.01)


def net_of(space, costs):
    return SimpleNamespace(space=space, costs=costs, fingerprint=space.fingerprint)


@pytest.fixture
def world(small, sensitivity, rng):
    space, made = small
    costs = Costs(space, made.layers, STEPS)
    return space, costs, sensitivity(space, costs.layers, rng)


@pytest.mark.parametrize(
    ("budget", "kind"),
    [
        ({}, "bitops"),
        ({"bytes": "150B"}, "bytes"),
        ({"peak_activation_bytes": 600, "bitops": "30k"}, "peak_activation_bytes"),
    ],
)
def test_the_cheapest_that_reaches_the_floor_is_found(world, every_row, budget, kind):
    space, costs, objective = world
    rows = every_row(space)
    accuracy = Saturating(objective).predict(rows)[0]
    limits = costs.parse(budget) if budget else {}
    inside = over(limits, costs.kinds, rows) <= 1e-12
    for share in (0.2, 0.9):
        floor = float(np.quantile(accuracy[inside], share))
        least = costs.kinds[kind].value(rows[inside & (accuracy >= floor)]).min()
        (found,) = run_search(
            net_of(space, costs),
            Saturating(objective),
            budget | {"accuracy": floor},
            np.random.default_rng(0),
            sensitivity=objective,
            generations=4,
            population=24,
            progress=True,
        )
        assert found.predicted[0] >= floor
        assert found.costs[kind] == pytest.approx(least)
        assert over(limits, costs.kinds, np.array([found.config.row]))[0] <= 1e-12
        control = found.controls["integer_program"]
        assert control.costs[kind] >= least * (1 - 1e-9)


def test_a_larger_space_comes_near_the_optimum_of_the_program(short, sensitivity, rng):
    """One score for all: where the floor is on an additive sum, the cheapest row is an integer program's."""
    space, costs = short
    objective = sensitivity(space, costs.layers, rng)
    exact = Program(space, costs.kinds["bitops"], {"error": objective})
    error = float(objective.value(Program(space, objective, {"bitops": costs.kinds["bitops"]}).solve(
        {"bitops": costs.limit("bitops", "w4a4")}
    )[None])[0])  # fmt: skip
    optimum = costs.kinds["bitops"].value(exact.solve({"error": error})[None])[0]
    floor = float(0.95 / (1 + error**2))
    (found,) = run_search(
        net_of(space, costs), Saturating(objective), {"accuracy": floor}, rng, generations=5, population=36,
        progress=False,
    )  # fmt: skip
    assert found.predicted[0] >= floor
    assert optimum * (1 - 1e-9) <= found.costs["bitops"] <= 1.05 * optimum


def test_a_floor_that_nothing_reaches_names_the_nearest(world):
    space, costs, objective = world
    best = float(Saturating(objective).predict(np.array([space.largest().row]))[0][0])
    with pytest.raises(ValueError, match=rf"reach accuracy 0.99; the best is predicted at {best:.2f}.*: lower the"):
        run_search(
            net_of(space, costs),
            Saturating(objective),
            {"accuracy": 0.99},
            generations=2,
            population=20,
            progress=False,
        )


def test_what_only_ranks_has_no_floor(world):
    space, costs, objective = world
    with pytest.raises(ValueError, match="an additive sensitivity only ranks; run `elastibit predict"):
        Problem(space, costs, Additive(space, sensitivity=objective), {"accuracy": 0.8})
    fitted = Additive(space, sensitivity=objective)
    rows = space.sample_indices(20, np.random.default_rng(0))
    fitted.fit(rows, Saturating(objective).predict(rows)[0])
    assert Problem(space, costs, fitted, {"accuracy": 0.8}).budgets[0].floor == 0.8


@pytest.mark.parametrize(("text", "floor"), [(0.88, 0.88), ("88%", 0.88), ("0.5", 0.5), (" 7.5 %", 0.075)])
def test_floors_as_typed(world, text, floor):
    space, costs, objective = world
    (budget,) = Problem(space, costs, Saturating(objective), {"bytes": "150B", "accuracy": text}).budgets
    assert budget.floor == pytest.approx(floor) and budget.limits == {"bytes": 150.0}


@pytest.mark.parametrize("text", [88, 0, -0.1, 1.0, "w4a4", "110%", True, None])
def test_floors_that_are_none(world, text):
    space, costs, objective = world
    with pytest.raises(ValueError, match=r"share between 0 and 1, e.g. 0.88 or 88%"):
        Problem(space, costs, Saturating(objective), {"accuracy": text})


def test_the_archive_puts_what_reaches_the_floor_first_by_cost(world):
    space, costs, objective = world
    predictor = Saturating(objective)
    rows = np.unique(space.sample_indices(200, np.random.default_rng(1)), axis=0)
    scores = predictor.predict(rows)[0]
    floor = float(np.median(scores))
    problem = Problem(space, costs, predictor, [{"accuracy": floor}, {"bitops": "w4a4"}])
    archive = Archive(problem, keep=500)
    archive.add(rows, scores)
    top = archive.top(0, 500)
    assert len(top) == (scores >= floor).sum() and (np.diff(costs.kinds["bitops"].value(top)) >= 0).all()
    assert (np.diff(archive.best[0][1][len(top) :]) <= 0).all()
    assert (
        archive.top(1, 1)[0].tolist()
        == max(
            zip(scores.tolist(), rows.tolist(), strict=True),
            key=lambda pair: (over(problem.budgets[1].limits, costs.kinds, np.array([pair[1]]))[0] <= 1e-12, pair[0]),
        )[1]
    )


def test_candidates_are_ranked_by_what_is_known(world):
    space, costs, objective = world
    problem = Problem(space, costs, Saturating(objective), [{"accuracy": 0.9}, {"bitops": "w4a4"}])
    floored, plain = problem.budgets
    cheap, dear = {"bitops": 1.0}, {"bitops": 2.0}
    assert floored.rank(None, 0.91, cheap) > floored.rank(None, 0.95, dear)
    assert floored.rank(0.91, 0.0, dear) > floored.rank(0.89, 0.95, cheap)  # measured below the floor
    assert floored.rank(0.89, 0.0, dear) > floored.rank(0.88, 0.95, cheap)
    assert plain.rank(0.91, 0.1, dear) > plain.rank(0.9, 0.9, cheap)
    assert plain.rank(None, 0.5, cheap) > plain.rank(None, 0.5, dear)


@pytest.mark.parametrize(
    "budget",
    [
        {"peak_activation_bytes": 550},
        {"average_weight_bits": 3.5, "average_input_bits": 4},
        {"bitops": "20k", "peak_activation_bytes": 560, "average_weight_bits": 5},
    ],
    ids=lambda b: "+".join(b),
)
def test_any_conjunction_of_kinds_is_searched_to_its_optimum(world, every_row, budget):
    space, costs, objective = world
    rows = every_row(space)
    inside = over(costs.parse(budget), costs.kinds, rows) <= 1e-12
    for seeded in (True, False):
        (found,) = run_search(
            net_of(space, costs),
            Saturating(objective),
            budget,
            np.random.default_rng(2),
            sensitivity=objective if seeded else None,
            generations=5,
            population=20,
            progress=False,
        )
        row = np.array([found.config.row])
        assert over(found.limits, costs.kinds, row)[0] <= 1e-12
        assert objective.value(row)[0] <= 1.01 * objective.value(rows[inside]).min()
        assert set(found.slack) == set(budget) and min(found.slack.values()) >= 0
