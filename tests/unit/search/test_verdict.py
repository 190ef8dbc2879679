"""Whether a search paid: the interval against resampled images, and the words against what the figures say."""

import numpy as np
import pytest

from search.front import Candidate, Found
from search.verdict import Difference, difference, on_select, on_test


def outcomes(rng, n, share):
    return rng.random(n) < share


def test_the_interval_is_that_of_resampled_images(rng):
    """Images drawn one by one, the plain way, give the same quantiles up to the noise of the resamples."""
    one, two = outcomes(rng, 400, 0.9), outcomes(rng, 400, 0.85)
    found = difference(one, two, np.random.default_rng(1), resamples=20_000)
    each = one.astype(float) - two
    drawn = each[rng.integers(400, size=(20_000, 400))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.mean == pytest.approx(each.mean())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.0026), pytest.approx(high, abs=0.0026))
    theory = 1.96 * each.std() / 20
    assert found.high - found.low == pytest.approx(2 * theory, rel=0.06)


def test_what_both_get_wrong_says_nothing(rng):
    """Pairing: two subnets that differ on few images have a narrow interval, however inaccurate both are."""
    one = outcomes(rng, 1000, 0.5)
    two = one.copy()
    two[:3] = ~two[:3]
    found = difference(one, two, rng)
    assert max(abs(found.low), abs(found.high)) <= 0.008
    assert difference(one, one, rng) == Difference(0.0, 0.0, 0.0)
    assert difference(one, two, np.random.default_rng(4)) == difference(one, two, np.random.default_rng(4))


def test_other_images_are_refused(rng):
    with pytest.raises(ValueError, match="same images"):
        difference(np.ones(3, dtype=bool), np.ones(4, dtype=bool), rng)
    with pytest.raises(ValueError, match="same images"):
        difference(np.ones(0, dtype=bool), np.ones(0, dtype=bool), rng)


IDS = {"uniform": "u", "integer_program": "i", "random_search": "r"}
WON, TIED, LOST = Difference(0.02, 0.01, 0.03), Difference(0.001, -0.002, 0.003), Difference(-0.02, -0.03, -0.01)


@pytest.mark.parametrize(
    ("winner", "gaps", "use", "words"),
    [
        (
            "w",
            {"uniform": WON, "integer_program": WON},
            None,
            "use the winner: 2.00 points above the best uniform bits",
        ),
        (
            "w",
            {"uniform": WON, "integer_program": TIED, "random_search": WON},
            "integer_program",
            "use the integer program's subnet: no difference on test within +-0.3 points and it needed no search",
        ),
        ("w", {"uniform": TIED, "integer_program": LOST}, "integer_program", "2.00 points better on test"),
        ("w", {"uniform": TIED, "integer_program": TIED}, "uniform", "use the best uniform bits"),
        ("w", {"uniform": WON, "random_search": TIED}, "random_search", "it needed no predictor"),
        ("i", {"uniform": WON}, "integer_program", "it is what the search found"),
        ("r", {"uniform": TIED, "integer_program": WON}, "uniform", "use the best uniform bits: no difference on test"),
        ("r", {"uniform": WON, "integer_program": WON}, "random_search", "it is what the search found"),
        ("w", {}, None, "no control fits"),
    ],
)
def test_the_simplest_that_is_not_beaten_is_to_be_used(winner, gaps, use, words):
    controls = {name: identity for name, identity in IDS.items() if name in gaps or identity == winner}
    found, said = on_test(winner, controls, gaps)
    assert found == use and words in said


def test_on_select_the_winner_may_be_a_control(chain):
    space, costs = chain

    def candidate(bits, measured):
        config = space.uniform(bits)
        return Candidate(config, (0.8, 0.0), measured, costs.of(config))

    def found(bits, measured, **controls):
        own = vars(candidate(bits, measured))
        return Found(**own, label="x", limits={}, slack={}, controls=controls, interrupted=False)

    uniform, program = candidate("w4a4", 0.81), candidate("w3a4", 0.8)
    both = {"uniform": uniform, "integer_program": program}
    assert "use the best uniform bits: the search found nothing better on select" in on_select(
        found("w4a4", 0.81, **both)
    )
    said = on_select(found("w4a3", 0.825, **both))
    assert "+1.50 points to the best uniform bits" in said and "+2.50 points to the integer program's" in said
    assert on_select(found("w4a3", None, uniform=uniform)) == "by prediction only: nothing was measured"
    assert "nothing better by prediction" in on_select(found("w3a4", None, **both))
