"""The sensitivity as a predictor: its order, and the line through measured scores."""

import numpy as np
import pytest

from predictors.additive import Additive


def test_without_pairs_it_is_minus_the_sum(chain, truth, rng):
    space, _ = chain
    rows = space.sample_indices(9, rng)
    mean, std = Additive(space, sensitivity=truth[0]).predict(rows)
    assert np.array_equal(mean, -truth[0].value(rows)) and not std.any()


def test_the_line_is_least_squares_in_the_logarithm(chain, truth, rng):
    space, _ = chain
    rows = space.sample_indices(40, rng)
    x = np.log(truth[0].value(rows))
    scores = 0.4 - 0.2 * x + 0.03 * rng.standard_normal(40)
    predictor = Additive(space, sensitivity=truth[0])
    predictor.fit(rows, scores)
    slope, offset = np.polyfit(x, scores, 1)
    mean, std = predictor.predict(rows)
    assert np.allclose(mean, offset + slope * x)
    assert std[0] == pytest.approx(np.sqrt(np.sum((scores - mean) ** 2) / 38)) and np.ptp(std) == 0


def test_fitting_never_changes_the_order(chain, truth, rng):
    space, _ = chain
    rows = space.sample_indices(30, rng)
    predictor = Additive(space, sensitivity=truth[0])
    before = np.argsort(predictor.predict(rows)[0])
    for scores in (rng.random(30), truth[0].value(rows), np.full(30, 0.5)):
        predictor.fit(rows, scores)
        assert np.array_equal(np.argsort(predictor.predict(rows)[0]), before)


def test_bad_input_is_refused(chain, truth, rng):
    space, _ = chain
    with pytest.raises(ValueError, match="needs a sensitivity"):
        Additive(space)
    with pytest.raises(ValueError, match="3 or more finite"):
        Additive(space, sensitivity=truth[0]).fit(space.sample_indices(3, rng), np.array([1.0, np.nan, 0.5]))
