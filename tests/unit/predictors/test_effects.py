"""Effects against a regression in its primal form, and the blend against all others."""

import numpy as np
import pytest
import torch

from predictors.accuracy import fit_predictor
from predictors.effects import blend, effects
from predictors.judging import kendall
from predictors.members import parts

SIZES = (3, 5, 2, 4)
FIRST = np.cumsum([0, *SIZES[:-1]])
QUICK = {"members": 4, "steps": 100}


def drawn(n, rng):
    return torch.from_numpy(np.stack([rng.integers(k, size=n) for k in SIZES], axis=1) + FIRST)


def test_they_are_those_of_the_primal_ridge_regression_on_what_each_member_sees(rng):
    codes, y = drawn(40, rng), torch.from_numpy(rng.standard_normal(40).astype(np.float32))
    unseen = parts(40, 3, 0.25, rng)
    found = effects(codes, y, unseen, sum(SIZES), 2.5)
    x = np.zeros((40, sum(SIZES)))
    np.put_along_axis(x, codes.numpy(), 1.0, axis=1)
    for m, mask in enumerate(~unseen.numpy()):
        seen, level = x[mask], y.numpy()[mask].mean()
        expected = np.linalg.solve(seen.T @ seen + 2.5 * np.eye(x.shape[1]), seen.T @ (y.numpy()[mask] - level))
        assert np.allclose(found["effects"][:, m], expected, atol=1e-4)
        assert found["level"][m] == pytest.approx(level, abs=1e-6)


def test_the_blend_is_the_best_of_all_shares(rng):
    y, unseen = torch.from_numpy(rng.standard_normal(60)), parts(60, 4, 0.3, rng)
    one, other = (y + torch.from_numpy(s * rng.standard_normal((4, 60))) for s in (0.5, 0.9))

    def error(share):
        return float(((y - torch.lerp(one, other, share)).square() * unseen).sum())

    share = float(blend(one, other, y, unseen))
    assert 0.05 < share < 0.6
    assert error(share) <= min(error(s) for s in np.linspace(0, 1, 101)) + 1e-9


def test_the_blend_leaves_out_what_is_worse_than_nothing(rng):
    y, unseen = torch.from_numpy(rng.standard_normal(60)), parts(60, 4, 0.3, rng)
    truth, opposite = y.expand(4, -1), -y.expand(4, -1)
    assert blend(truth, opposite, y, unseen) == 0 and blend(opposite, truth, y, unseen) == 1
    assert blend(truth, truth, y, unseen) == 0  # no difference, no division by it


def test_what_no_sensitivity_and_no_bits_tell_is_learned_of_many_pairs(chain, rng):
    space, costs = chain
    worth = [rng.standard_normal(n) for n in space.sizes]  # the worth of a choice has nothing to do with its bits

    class Found:
        def __init__(self, n):
            self.indices = space.sample_indices(n, rng)
            active = space.active(self.indices)
            self.scores = sum(w[self.indices[:, i]] * active[:, i] for i, w in enumerate(worth))

    held = Found(200)
    found = {}
    for ridge in (1.0, 1e6):
        predictor = fit_predictor(space, Found(600), costs=costs, rng=np.random.default_rng(0), ridge=ridge, **QUICK)
        found[ridge] = kendall(held.scores, predictor.predict(held.indices)[0])
    assert found[1.0] > 0.7 and found[1.0] > found[1e6] + 0.1
