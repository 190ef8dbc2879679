"""How good a predictor is: figures of merit against their definitions."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from predictors.judging import ceiling, controls, kendall, kendall_at_equal_cost, landmarks, report, windows


def brute(scores, predicted, costs, window):
    concordant = ties_a = ties_b = total = 0
    for i, j in itertools.combinations(range(len(scores)), 2):
        if max(costs[i], costs[j]) / min(costs[i], costs[j]) > 1 + window:
            continue
        a, b = np.sign(scores[i] - scores[j]), np.sign(predicted[i] - predicted[j])
        concordant, ties_a, ties_b, total = concordant + a * b, ties_a + (a == 0), ties_b + (b == 0), total + 1
    return concordant / np.sqrt((total - ties_a) * (total - ties_b)), total


def test_kendall_at_equal_cost_is_its_definition(rng):
    scores, predicted = rng.integers(0, 9, 50) / 9, rng.integers(0, 9, 50) / 9
    costs = np.exp(rng.random(50))
    tau, count = kendall_at_equal_cost(scores, predicted, costs, 0.1)
    expected, total = brute(scores, predicted, costs, 0.1)
    assert count == total and tau == pytest.approx(expected)
    whole, _ = kendall_at_equal_cost(scores, predicted, costs, 1e9)
    assert (
        whole
        == pytest.approx(stats.kendalltau(scores, predicted).statistic)
        == pytest.approx(kendall(scores, predicted))
    )


def test_a_predictor_that_reads_the_cost_ranks_well_but_not_at_equal_cost(rng):
    costs = np.exp(3 * rng.random(400))
    scores = np.log(costs) + 0.3 * rng.standard_normal(400)
    assert kendall(scores, costs) > 0.7
    assert kendall_at_equal_cost(scores, costs, costs, 0.03)[0] < 0.2


def test_taus_of_constants_are_none():
    assert kendall(np.ones(5), np.arange(5.0)) is None and kendall(np.ones(1), np.ones(1)) is None
    assert kendall_at_equal_cost(np.ones(5), np.arange(5.0), np.ones(5)) == (None, 10)
    assert kendall_at_equal_cost(np.arange(2.0), np.arange(2.0), np.array([1.0, 9.0])) == (None, 0)


def test_the_ceiling_is_what_the_truth_itself_reaches(rng):
    truth = rng.standard_normal(600)
    halves = truth[:, None] + rng.standard_normal((600, 2))
    costs = np.ones(600)
    reached = kendall_at_equal_cost(halves.mean(1), truth, costs)[0]
    assert ceiling(halves, costs) == pytest.approx(reached, abs=0.05)
    assert ceiling(rng.standard_normal((5, 2)) * [1, -1] + np.arange(5)[:, None] * [1, -1], np.ones(5)) is None


def test_controls_are_mean_bits_and_cost(chain, rng):
    space, costs = chain
    rows = space.sample_indices(20, rng)
    pairs = SimpleNamespace(indices=rows, costs={"bytes": costs.kinds["bytes"].value(rows)})
    found = controls(space, pairs, "bytes")
    for row, bits in zip(rows, found["mean bits"], strict=True):
        assert bits == pytest.approx(np.mean([c.bits for c in space.config(row).values() if not isinstance(c, int)]))
    assert found["cost alone"] is pairs.costs["bytes"]


def test_windows_hold_what_costs_about_as_much(rng):
    costs = np.exp(rng.random(500))
    truth = rng.standard_normal(500)
    halves = truth[:, None] + 0.3 * rng.standard_normal((500, 2))
    pairs = SimpleNamespace(scores=halves.mean(1), halves=halves, costs={"bytes": costs})
    found = windows(truth, pairs, {"here": 1.5, "nowhere": 99.0}, {"cost": costs}, kind="bytes", width=0.1)
    inside = (costs >= 1.35) & (costs <= 1.65)
    assert found["here"]["pairs"] == inside.sum() and found["nowhere"]["pairs"] == 0
    expected = stats.kendalltau(pairs.scores[inside], truth[inside]).statistic
    assert found["here"]["kendall"] == pytest.approx(expected)
    assert found["here"]["share_of_ceiling"] == pytest.approx(1, abs=0.1)
    assert abs(found["here"]["controls"]["cost"]) < 0.3
    assert found["nowhere"]["kendall"] is None and found["nowhere"]["share_of_ceiling"] is None


def test_landmarks_are_uniform_bits_that_the_space_offers(chain):
    _, costs = chain
    found = landmarks(costs, bits=("w3a3", "w4a4", "w9a9"))
    assert found == {name: costs.of(costs.space.uniform(name))["bitops"] for name in ("w3a3", "w4a4")}


def test_a_report_judges_windows_and_further_controls(chain, measured, truth, rng):
    space, costs = chain
    held = measured(200, rng)

    class Oracle:
        def fit(self, indices, scores): ...

        def predict(self, indices):
            return truth[1](indices), np.full(len(indices), 0.02)

    others = {"noise": rng.random(200)}
    found = report(Oracle(), held, space, around=landmarks(costs), others=others)
    assert set(found["windows"]) == {"w3a3", "w4a4"} and set(found["controls"]) == {"mean bits", "cost alone", "noise"}
    assert found["kendall"] == pytest.approx(stats.kendalltau(held.scores, truth[1](held.indices)).statistic)
    assert found["share_of_ceiling"] == pytest.approx(1, abs=0.2)
    assert found["kendall"] / found["ceiling"] == pytest.approx(1, abs=0.1)
    assert 0.8 < found["within_2_std"] <= 1
