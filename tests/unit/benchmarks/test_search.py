"""benchmarks/search.py: its problems' optima against enumeration, hypervolume by hand, a small run of its parts."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from benchmarks import search as bench
from benchmarks.searching import excess, exhaustive, problems, settling
from supernet.artefacts import read_json


def test_additive_optima_are_those_of_enumeration() -> None:
    rng = np.random.default_rng(0)
    case = problems.additive("tiny", np.array([3e6, 1e6]), rng.lognormal(size=2), rng.lognormal(size=2))
    every = np.array(list(itertools.product(range(7), repeat=4)))
    errors, spent = case.error(every), case.costs.kinds["bitops"].value(every)
    for budget, best in zip(case.budgets, case.best, strict=True):
        assert errors[spent <= case.costs.parse(budget)["bitops"]].min() == pytest.approx(best, rel=1e-9)


def test_the_entangled_optimum_is_within_budget_and_not_beaten_by_draws() -> None:
    case = problems.entangled(0)
    rows = case.space.sample_indices(20_000, np.random.default_rng(0))
    spent, errors = case.costs.kinds["bitops"].value(rows), case.error(rows)
    for budget, best in zip(case.budgets, case.best, strict=True):
        inside = spent <= case.costs.parse(budget)["bitops"]
        assert inside.any() and (errors[inside] >= best * (1 - 1e-12)).all()
    assert len(np.unique(case.best)) == len(case.best)


def test_a_search_is_compared_with_its_optimum() -> None:
    case = problems.entangled(1)
    runs = [excess.searched(case, "nsga2", seeded, 0, 6, 24) for seeded in (True, False)]
    assert all(value >= -1e-12 for run in runs for value in run["excess"])
    lines = excess.summary(runs)
    assert [line["searches"] for line in lines] == [1, 1] and lines[0]["worst"] == max(runs[0]["excess"])
    assert excess.speed(case, 50, 2)["measured"]["rows_per_second"]["median"] > 0


def test_hypervolume_is_the_area_of_the_stairs() -> None:
    accuracy, cost = np.array([0.5, 0.9, 0.4, 0.8]), np.array([1.0, 3.0, 2.0, 2.0])
    assert exhaustive.hypervolume(accuracy, cost, (0.2, 4.0)) == pytest.approx(0.3 * 3 + 0.3 * 2 + 0.1 * 1)


def test_every_subnet_of_the_measured_space_stands_once_in_the_order_that_its_file_states() -> None:
    net, _ = exhaustive.network()
    space, rows = exhaustive.every(net)
    assert space.admits(rows).all() and len(np.unique(rows, axis=0)) == len(rows) == 4096
    config = space.config(rows[1 * 4**5 + 3])
    bits = [config[layer.weight].bits for layer in net.layers[1:-1]]
    assert bits == [3, 2, 2, 2, 2, 8]
    assert all(config[layer.weight].bits == config[layer.input].bits for layer in net.layers[1:-1])


def test_a_part_is_printed_and_kept_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settle = settling.settle
    monkeypatch.setattr(settling, "settle", lambda *args, **options: settle(*args, steps=5, rows=2, **options))
    file = tmp_path / "search.json"
    file.write_text('{"speed": 1}')
    assert bench.main(["--only", "fliqs", "--seeds", "1", "--json", str(file)]) == 0
    assert set(read_json(file)) == {"speed", "fliqs"} and "of 2 good" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.parsed(["--only", "speeed"])
