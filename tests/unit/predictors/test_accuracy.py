"""The ensemble: on a known curve, on an error of its own weights, and its arithmetic against a plain one."""

import numpy as np
import pytest
import torch

from predictors.accuracy import CHUNK, Ensemble, falling, fit_predictor
from predictors.encoding import described
from predictors.judging import kendall, report
from predictors.members import parts
from predictors.noise import Terms
from supernet.cost import Factors

QUICK = {"members": 4, "steps": 120}


def test_it_ranks_held_out_subnets_far_better_than_cost_does(chain, measured, rng):
    space, costs = chain
    predictor = fit_predictor(space, measured(150, rng), costs=costs, rng=rng, members=4, steps=200)
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


def test_every_pair_is_unseen_by_some_member_and_none_sees_all(rng):
    unseen = parts(50, 3, 0.1, rng)
    assert unseen.any(0).all() and unseen.any(1).all() and (~unseen).any(1).all()


def test_constant_scores_are_predicted_as_that_constant(chain, measured, rng):
    space, costs = chain
    pairs = measured(20, rng)
    predictor = Ensemble(space, costs, rng=rng, **QUICK)
    predictor.fit(pairs.indices, np.full(20, 0.7))
    mean, std = predictor.predict(pairs.indices)
    assert np.allclose(mean, 0.7, atol=1e-4) and np.isfinite(std).all()


@pytest.mark.parametrize("settings", [{"members": 1}, {"unseen": 1.0}, {"hidden": 0}, {"pull": -1.0}])
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
    predictor = fit_predictor(space, measured(20, rng), rng=rng, **QUICK)
    with pytest.raises(ValueError, match=r"0\.\.size-1"):
        predictor.predict(np.full((1, len(space)), 99))


def test_what_the_terms_are_worth_is_learned(chain, truth, rng):
    """A sensitivity that weighs its terms wrongly, as one measured before training does."""
    space, _ = chain
    wrong = Factors(tuple((dims, table * np.exp(rng.normal(0, 1.5))) for dims, table in truth[0].terms))
    rows, held = space.sample_indices(200, rng), space.sample_indices(300, rng)
    predictor = Ensemble(space, None, wrong, rng, **QUICK)
    predictor.fit(rows, truth[1](rows))
    learned = kendall(truth[1](held), predictor.predict(held)[0])
    assert learned > kendall(truth[1](held), -wrong.value(held)) + 0.1 and learned > 0.9


def test_a_correction_finds_what_no_sum_can_say(chain, truth, rng):
    """Two layers that want equally many bits: the curve alone (hidden layers that never learn) misses it."""
    space, _ = chain
    bits = np.array([c.bits for c in space.dimensions[1].choices])

    def score(rows):
        return 0.5 + 0.05 * (bits[rows[:, 1]] - 5) * (bits[rows[:, 3]] - 5) - 0.02 * truth[0].value(rows)

    rows, held = space.sample_indices(500, rng), space.sample_indices(300, rng)
    found = []
    for rate in (0.0, 5e-3):
        predictor = Ensemble(space, None, truth[0], np.random.default_rng(0), members=2, steps=200, learning_rate=rate)
        predictor.fit(rows, score(rows))
        found.append(np.corrcoef(score(held), predictor.predict(held)[0])[0, 1])
    assert found[1] > found[0] + 0.2


def test_looking_up_is_what_a_plain_forward_pass_computes(chain, truth, rng):
    """Inputs multiplied, the weighed terms as Factors, in float64."""
    space, _ = chain
    rows = space.sample_indices(60, rng)
    predictor = Ensemble(space, None, truth[0], rng, **QUICK)
    predictor.fit(rows, truth[1](rows))
    known = {name: t.double().numpy() for name, t in predictor.tensors.items()}
    many = space.sample_indices(CHUNK + 50, rng)
    x = (space.features(many) - known["x_mean"]) / known["x_std"]
    ends = np.cumsum([len(d.choices) + 1 for d in space.dimensions])
    outputs = []
    for m in range(QUICK["members"]):
        tables = np.split(known["entries"][:, m], ends[:-1])
        assert all(table[-1] == 0 for table in tables), "what is not there makes no error"
        error = np.sum(
            [t[np.where(on, k, -1)] for t, k, on in zip(tables, many.T, space.active(many).T, strict=True)], 0
        )
        top, drop, middle, rate = known["curve"][m]
        base = top - np.exp(drop) / (1 + np.exp(-np.exp(rate) * (np.log(error) - middle)))
        hidden = np.maximum(x @ known["w1"][m] + known["b1"][m], 0)
        hidden = np.maximum(hidden @ known["w2"][m] + known["b2"][m], 0)
        outputs.append(base + (hidden @ known["w3"][m] + known["b3"][m])[:, 0])
    mean, std = predictor.predict(many)
    assert np.allclose(mean, known["y_mean"] + known["y_std"] * np.mean(outputs, axis=0), atol=2e-5)
    spread = known["stretch"] * known["y_std"] * np.sqrt(np.var(outputs, axis=0, ddof=1) + known["floor"])
    assert np.allclose(std, spread, atol=2e-5)


def test_the_curve_falls_from_its_top_by_its_drop():
    curve = torch.tensor([[2.0, np.log(3.0), 1.0, np.log(4.0)]], dtype=torch.float64)
    found = falling(torch.tensor([[-50.0, 1.0, 50.0]], dtype=torch.float64), curve)
    assert torch.allclose(found, torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64))


def test_terms_over_several_genes_are_looked_up_too(chain, truth, rng):
    """A term over the bits of two layers, and one that looks at more of the depth than whether its layer runs."""
    space, _ = chain
    pair = rng.random((len(space.dimensions[1].choices), len(space.dimensions[3].choices)))
    deep = ((0, space.position["l7.weight"]), rng.random((4, len(space.dimensions[-2].choices))))
    joint = Factors((*truth[0].terms, ((1, 3), pair), deep))
    terms = Terms(space, joint, described(space))
    rows = space.sample_indices(50, rng)
    genes = described(space).read(rows)[1]
    found = terms.values[genes].sum(1) + terms.values[terms.codes(rows)].sum(1)
    assert len(terms.offsets) == 2 and np.allclose(found, joint.value(rows), rtol=1e-5)
    predictor = Ensemble(space, None, joint, rng, **QUICK)
    predictor.fit(rows, -joint.value(rows))
    order = np.random.default_rng(0).permutation(50)
    assert np.allclose(predictor.predict(rows[order])[0], predictor.predict(rows)[0][order], atol=1e-5)
    assert kendall(-joint.value(rows), predictor.predict(rows)[0]) > 0.8


def test_without_a_sensitivity_terms_are_the_variance_of_rounding(chain, rng):
    space, _ = chain
    terms, rows = Terms(space, None, described(space)), space.sample_indices(30, rng)
    found = terms.values[described(space).read(rows)[1]]
    for row, values in zip(rows, found, strict=True):
        config = space.config(row)
        expected = [
            0.0
            if d.name not in config
            else (4.0**-3 * (1 - config[d.name] / 4) if k == 0 else 4.0 ** -config[d.name].bits)
            for k, d in enumerate(space.dimensions)
        ]
        assert np.allclose(values, expected)
