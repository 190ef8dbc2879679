"""The whole search on spaces without a network: optimum, hard limits, controls, interruption, files."""

from types import SimpleNamespace

import numpy as np
import pytest

from predictors.additive import Additive
from search.controls import uniform_rows
from search.front import load_front, save_front
from search.run import search as run_search
from supernet.cost import over
from supernet.space import SearchSpace


def net_of(space, costs):
    return SimpleNamespace(space=space, costs=costs, fingerprint=space.fingerprint, named_parameters=list)


class Opaque:
    """A predictor that shows no sensitivity: the integer program cannot help."""

    def __init__(self, objective):
        self.objective = objective

    def predict(self, rows):
        return -np.log(self.objective.value(rows)), np.full(len(rows), 0.1)


def test_the_yardstick_with_the_integer_program_as_seed_is_solved(yardstick, rng):
    space, costs, objective, _ = yardstick
    budgets = [{"bitops": f"w{b}a{b}"} for b in range(2, 9)]
    found = run_search(
        net_of(space, costs),
        Opaque(objective),
        budgets,
        rng,
        sensitivity=objective,
        generations=3,
        population=30,
        progress=False,
    )
    for f in found:
        optimum = objective.value(np.array([f.controls["integer_program"].config.row]))[0]
        assert objective.value(np.array([f.config.row]))[0] <= 1.001 * optimum
        assert f.costs["bitops"] <= f.limits["bitops"]


def test_without_seeds_it_comes_within_a_few_percent(yardstick, rng):
    space, costs, objective, _ = yardstick
    budgets = [{"bitops": f"w{b}a{b}"} for b in (3, 4, 6)]
    net = net_of(space, costs)
    found = run_search(net, Opaque(objective), budgets, rng, generations=12, population=40, progress=False)
    exact = run_search(
        net, Opaque(objective), budgets, rng, sensitivity=objective, generations=1, population=10, progress=False
    )
    for f, e in zip(found, exact, strict=True):
        assert "integer_program" not in f.controls
        assert np.exp(e.predicted[0] - f.predicted[0]) <= 1.08
        assert f.predicted[0] > f.controls["uniform"].predicted[0]


def test_an_enumerable_space_is_searched_to_its_optimum(small, every_row, sensitivity, rng):
    space, costs = small
    rows = every_row(space)
    for _ in range(3):
        objective = sensitivity(space, costs.layers, rng)
        limit = float(np.quantile(costs.kinds["bytes"].value(rows), rng.uniform(0.1, 0.9)))
        budgets = {"bytes": limit}
        found = run_search(
            net_of(space, costs), Opaque(objective), budgets, rng, generations=8, population=20, progress=False
        )
        optimum = objective.value(rows[costs.kinds["bytes"].value(rows) <= limit]).min()
        assert objective.value(np.array([found[0].config.row]))[0] <= 1.01 * optimum


def test_nothing_over_a_limit_comes_back(short, sensitivity):
    space, costs = short
    for seed in range(4):
        rng = np.random.default_rng(seed)
        objective = sensitivity(space, costs.layers, rng)
        witness = space.sample_indices(1, rng)
        exact = {kind: float(costs.kinds[kind].value(witness)[0]) for kind in ("bitops", "bytes")}
        low = {"bitops": costs.reachable("bitops")[0]}
        found = run_search(
            net_of(space, costs), Opaque(objective), [exact, low], rng, generations=2, population=16, progress=False
        )
        for f in found:
            row = np.array([f.config.row])
            assert over(f.limits, costs.kinds, row)[0] <= 1e-12 and space.admits(row).all()
            for control in f.controls.values():
                assert all(control.costs[kind] <= limit * (1 + 1e-12) for kind, limit in f.limits.items())
            assert all(0 <= share < 1 for share in f.slack.values())
        assert np.all(
            [over(exact, costs.kinds, found.rows) <= 1e-12, over(low, costs.kinds, found.rows) <= 1e-12], axis=0
        ).any()


def test_limits_that_contradict_each_other_are_named(short, sensitivity, rng):
    space, costs = short
    objective = sensitivity(space, costs.layers, rng)
    budget = {"macs": costs.reachable("macs")[0], "bytes": costs.reachable("bytes")[0] * 0.999}
    with pytest.raises(ValueError, match=r"has macs <= .* and bytes <= .*; the nearest has macs .* and bytes"):
        run_search(net_of(space, costs), Opaque(objective), budget, rng, progress=False)


def test_views_are_searched(short, sensitivity, rng):
    space, costs = short
    view = space.restrict({"s?.*.weight": lambda c: c.symmetric}).tie([["s0.*.input"]]).pin({"s1.depth": 2})
    objective = sensitivity(space, costs.layers, rng)
    found = run_search(
        net_of(space, costs),
        Additive(space, sensitivity=objective),
        {"bitops": "w4a4"},
        rng,
        space=view,
        generations=2,
        population=16,
        progress=False,
    )
    row = np.array([found[0].config.row])
    assert view.admits(row).all() and found[0].config["s1.depth"] == 2 and view.admits(found.rows).all()
    tied = {c for name, c in found[0].config.items() if name.startswith("s0.") and name.endswith(".input")}
    assert len(tied) == 1
    assert found[0].limits["bitops"] == costs.of(view.uniform("w4a4"))["bitops"]
    with pytest.raises(ValueError, match="no view"):
        run_search(net_of(space, costs), None, {"bitops": "w4a4"}, rng, space=SearchSpace(space.dimensions[:9]))


def test_equal_generators_find_equal_subnets(short, sensitivity):
    space, costs = short
    objective = sensitivity(space, costs.layers, np.random.default_rng(0))
    outcomes = []
    for k in range(2):
        np.random.seed(k)  # noqa: NPY002 (the disturbance)
        found = run_search(
            net_of(space, costs),
            Opaque(objective),
            [{"bitops": "w3a3"}, {"bytes": "w4a4"}],
            np.random.default_rng(3),
            generations=3,
            population=16,
            progress=False,
        )
        outcomes.append([f.plain() for f in found])
    assert outcomes[0] == outcomes[1]


def test_uniform_controls_are_the_best_that_fit(short, sensitivity, rng):
    space, costs = short
    objective = sensitivity(space, costs.layers, rng)
    found = run_search(
        net_of(space, costs),
        Opaque(objective),
        [{"bitops": "w4a4"}, {"bitops": costs.reachable("bitops")[0]}],
        rng,
        generations=1,
        population=8,
        progress=False,
    )
    rows = uniform_rows(space)
    forms = {
        kind: {c.form for d in space.dimensions if d.name.endswith(kind) for c in d.choices}
        for kind in ("weight", "input")
    }
    assert len(rows) == 49 * len(forms["weight"]) * len(forms["input"])
    free = [d.name for d in space.dimensions if d.quantizes and len({c.bits for c in d.choices}) > 1]
    for config in map(space.config, rows):
        assert all(len({config[name] for name in free if name.endswith(kind)}) == 1 for kind in forms)
    fits = costs.kinds["bitops"].value(rows) <= costs.limit("bitops", "w4a4")
    best = rows[fits][np.argmin(objective.value(rows[fits]))]
    assert found[0].controls["uniform"].config.row == tuple(best)
    assert "uniform" not in found[1].controls


@pytest.mark.parametrize("at", [0, 3])
def test_an_interrupted_search_returns_the_best_so_far(short, sensitivity, rng, at):
    space, costs = short
    objective, calls = sensitivity(space, costs.layers, rng), []

    class Interrupted(Opaque):
        def predict(self, rows):
            calls.append(len(rows))
            if len(calls) == 2 + at:
                raise KeyboardInterrupt
            return super().predict(rows)

    found = run_search(
        net_of(space, costs),
        Interrupted(objective),
        {"bitops": "w3a3"},
        rng,
        generations=50,
        population=16,
        progress=False,
    )
    assert found[0].interrupted and found[0].costs["bitops"] <= found[0].limits["bitops"]


def test_files_hold_everything_and_come_back(short, sensitivity, rng, tmp_path):
    space, costs = short
    objective = sensitivity(space, costs.layers, rng)
    front = run_search(
        net_of(space, costs),
        Opaque(objective),
        [{"bitops": "w3a3"}, {"bytes": "w4a4"}],
        rng,
        generations=2,
        population=16,
        progress=False,
    )
    save_front(tmp_path / "front.json", front, seed=5, settings={"candidates": 8})
    back = load_front(tmp_path / "front.json", space)
    assert [f.plain() for f in back] == [f.plain() for f in front] and [f.config for f in back] == [
        f.config for f in front
    ]
    assert np.array_equal(back.rows, front.rows) and set(back.costs) == {"bitops", "bytes"}
    other = SearchSpace(space.dimensions[:-1])
    with pytest.raises(ValueError, match=f"{space.fingerprint}.*{other.fingerprint}"):
        load_front(tmp_path / "front.json", other)
    with pytest.raises(FileNotFoundError, match="no front"):
        load_front(tmp_path / "none.json", space)


def test_the_reachable_range_is_said_before_the_search(short, sensitivity, rng, capsys):
    space, costs = short
    objective = sensitivity(space, costs.layers, rng)
    run_search(net_of(space, costs), Opaque(objective), {"bitops": "w3a3"}, rng, generations=1, population=8)
    said = capsys.readouterr().err
    assert "bitops: reachable" in said and "w3a3 =" in said


@pytest.mark.parametrize("settings", [{"candidates": -1}, {"generations": 0}, {"population": 0}])
def test_settings_below_one_are_refused(small, settings):
    space, costs = small
    with pytest.raises(ValueError, match="at least 1"):
        run_search(net_of(space, costs), None, {"bitops": 1e9}, **settings)
