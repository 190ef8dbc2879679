"""The ensemble on a known curve, and its figures of merit against definitions."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from predictors.accuracy import (
    Ensemble,
    ceiling,
    controls,
    fit_predictor,
    kendall,
    kendall_at_equal_cost,
    report,
    ridge,
)

QUICK = {"members": 4, "steps": 120}


def test_it_ranks_held_out_subnets_far_better_than_cost_does(chain, measured, rng):
    space, costs = chain
    predictor = fit_predictor(space, measured(150, rng), costs=costs, rng=rng)
    figures = report(predictor, measured(300, rng), space)
    assert figures["kendall"] > 0.8
    assert figures["kendall_equal_cost"] > 0.5
    for control in figures["controls"].values():
        assert figures["kendall"] > control["kendall"] + 0.05
        assert figures["kendall_equal_cost"] > (control["kendall_equal_cost"] or 0) + 0.3
    assert figures["rmse"] < 0.08 and 0 < figures["share_of_ceiling"] <= 1


def test_its_uncertainty_is_calibrated(chain, measured, rng):
    space, costs = chain
    within, errors = [], []
    for seed in range(3):
        predictor = fit_predictor(space, measured(120, rng), costs=costs, rng=np.random.default_rng(seed), **QUICK)
        held = measured(200, rng)
        mean, std = predictor.predict(held.indices)
        within.append(report(predictor, held, space)["within_2_std"])
        errors.append(np.mean(((held.scores - mean) / std) ** 2))
    assert 0.85 <= np.mean(within) <= 0.99 and 0.5 < np.mean(errors) < 2


def test_more_pairs_are_better_and_a_sensitivity_helps_with_few(chain, measured, truth, rng):
    space, costs = chain
    test, few, many = measured(300, rng), measured(40, rng), measured(250, rng)
    taus = [
        report(fit_predictor(space, p, costs=costs, sensitivity=s, rng=np.random.default_rng(0), **QUICK), test, space)[
            "kendall"
        ]
        for p, s in ((few, None), (few, truth[0]), (many, None))
    ]
    assert taus[1] > taus[0] and taus[2] > taus[0] + 0.03


def test_inactive_genes_have_no_influence(chain, measured, rng):
    space, costs = chain
    predictor = fit_predictor(space, measured(30, rng), costs=costs, rng=rng, **QUICK)
    row = np.array([space.smallest().row])
    disturbed = row.copy()
    disturbed[0, space.position["l7.weight"]] = 20
    assert not space.active(row)[0, space.position["l7.weight"]]
    assert np.array_equal(predictor.predict(row), predictor.predict(disturbed))


def test_equal_generators_learn_equal_predictors(chain, measured):
    space, costs = chain
    pairs = measured(30, np.random.default_rng(0))
    outputs = []
    for seed in range(2):
        torch.manual_seed(seed)
        predictor = fit_predictor(space, pairs, costs=costs, rng=np.random.default_rng(5), **QUICK)
        outputs.append(predictor.predict(pairs.indices))
    assert np.array_equal(outputs[0], outputs[1])


def test_every_pair_is_unseen_by_some_member_and_none_sees_all(chain, rng):
    space, costs = chain
    unseen = Ensemble(space, costs, rng=rng, members=3, unseen=0.1)._unseen(50)
    assert unseen.any(0).all() and unseen.any(1).all() and (~unseen).any(1).all()


def test_constant_scores_are_predicted_as_that_constant(chain, measured, rng):
    space, costs = chain
    pairs = measured(20, rng)
    predictor = Ensemble(space, costs, rng=rng, **QUICK)
    predictor.fit(pairs.indices, np.full(20, 0.7))
    mean, std = predictor.predict(pairs.indices)
    assert np.allclose(mean, 0.7, atol=1e-4) and np.isfinite(std).all()


def test_ridge_is_the_textbook_solution_on_what_each_member_sees(rng):
    x, y = torch.from_numpy(rng.standard_normal((40, 6))).float(), torch.from_numpy(rng.standard_normal(40)).float()
    unseen = torch.from_numpy(rng.random((3, 40)) < 0.25)
    found = ridge(x, y, unseen)
    from predictors.accuracy import STRENGTHS

    best = min(
        (
            [
                np.linalg.solve(a.T @ a + s * np.eye(6), a.T @ b)
                for a, b in ((x[~u].numpy(), y[~u].numpy()) for u in unseen)
            ]
            for s in STRENGTHS
        ),
        key=lambda ws: sum(
            float(((x[u].numpy() @ w - y[u].numpy()) ** 2).sum()) for u, w in zip(unseen, ws, strict=True)
        ),
    )
    assert np.allclose(found[..., 0].numpy(), np.array(best), atol=1e-4)


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


@pytest.mark.parametrize("settings", [{"members": 1}, {"unseen": 1.0}, {"hidden": 0}, {"cost_features": ["joules"]}])
def test_settings_out_of_range_are_refused(chain, settings):
    with pytest.raises(ValueError):
        Ensemble(*chain, **settings)


def test_what_cannot_be_learned_is_refused(chain, measured, rng):
    space, costs = chain
    with pytest.raises(ValueError, match="8 or more"):
        Ensemble(space, costs).fit(space.sample_indices(3, rng), np.ones(3))
    with pytest.raises(ValueError, match="8 or more finite"):
        Ensemble(space, costs).fit(space.sample_indices(9, rng), np.full(9, np.nan))
    with pytest.raises(ValueError, match="learned nothing"):
        Ensemble(space, costs).predict(space.sample_indices(1, rng))
    with pytest.raises(ValueError, match="pass the space's costs"):
        Ensemble(space, cost_features=["bitops"])
