"""benchmarks/sensitivities.py: its figures against scipy, and what it prints."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from benchmarks import sensitivities


@pytest.fixture
def pairs(rng):
    scores = rng.random(60).round(2)
    return SimpleNamespace(scores=scores, costs={"bitops": np.repeat([100.0, 104.0, 200.0], 20)})


def test_ranks_are_those_of_scipy_overall_and_around_budgets(pairs, rng):
    predicted = pairs.scores + 0.3 * rng.random(60)
    options = sensitivities.parsed(["run", "--window", "0.05"])
    found = sensitivities.figures(predicted, pairs, {"a": 102.0, "b": 200.0, "c": 500.0}, options)
    assert found["spearman"] == pytest.approx(stats.spearmanr(pairs.scores, predicted).statistic)
    assert found["kendall"] == pytest.approx(stats.kendalltau(pairs.scores, predicted).statistic)
    low, high = found["spearman_interval"]
    assert low < found["spearman"] < high and high - low < 0.5
    around = found["around"]
    assert [around[name]["pairs"] for name in "abc"] == [40, 20, 0] and around["c"]["spearman"] is None
    assert around["a"]["spearman"] == pytest.approx(stats.spearmanr(pairs.scores[:40], predicted[:40]).statistic)
    assert around["b"]["kendall"] == pytest.approx(stats.kendalltau(pairs.scores[40:], predicted[40:]).statistic)
    assert found["comparisons_equal_cost"] == 40 * 39 // 2 + 20 * 19 // 2


def test_what_is_constant_ranks_nothing(pairs):
    found = sensitivities.figures(np.zeros(60), pairs, {}, sensitivities.parsed(["run"]))
    assert found["spearman"] is found["spearman_interval"] is found["kendall"] is found["kendall_equal_cost"] is None


def test_every_sensitivity_of_conf_is_there_unless_some_are_named():
    names = {path.stem for path in (Path(__file__).parents[3] / "conf" / "sensitivity").glob("*.yaml")}
    assert set(sensitivities.nodes("", 32)) == names
    assert all(node["images"] == 32 for node in sensitivities.nodes("", 32).values())
    assert list(sensitivities.nodes("sqnr,logits_kl", 8)) == ["sqnr", "logits_kl"]
    with pytest.raises(ValueError, match="no sensitivity 'nothing'"):
        sensitivities.nodes("nothing", 8)


def test_the_table_has_the_best_at_equal_cost_first(pairs):
    options = sensitivities.parsed(["run"])
    good, bad = (sensitivities.figures(sign * pairs.scores, pairs, {"w3a3": 100.0}, options) for sign in (1, -1))
    found = {
        "sensitivities": {"bad": bad | {"measured": {"seconds": 1.0}}, "good": good | {"measured": {"seconds": 2.0}}},
        "controls": {"cost alone": sensitivities.figures(pairs.costs["bitops"], pairs, {"w3a3": 100.0}, options)},
        "ceiling_equal_cost": 0.9,
        "pairs": 60,
    }
    lines = sensitivities.table(found).splitlines()
    assert lines[2].startswith("| good | 1.000 [1.000, 1.000] | 1.000 | 1.000 | 1.000, 1.000 (40) | 2.0 |")
    assert lines[4].startswith("| bad | -1.000") and lines[-1].endswith("a tau of 0.900.")
