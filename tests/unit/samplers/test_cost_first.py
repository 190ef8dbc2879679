"""Cost-first sampling: every budget is hit, with variety, and the distribution follows what still learns."""

import numpy as np
import pytest
from scipy import stats

from supernet.samplers.cost_first import CostFirst
from supernet.samplers.uniform import Uniform
from supernet.space import SearchSpace


def targets_of(sampler, n=12):
    return np.geomspace(sampler.edges[0] * 1.001, sampler.edges[-1], n)


@pytest.mark.parametrize("kind", ["bitops", "bytes", "bitops_first_last_8"])
def test_every_target_between_the_extremes_is_hit(chain, rng, kind):
    space, costs = chain
    sampler = CostFirst(space, costs, kind=kind)
    for target in targets_of(sampler):
        rows = sampler.at(np.full(40, target), rng)
        ratio = costs.kinds[kind].value(rows) / target
        assert space.admits(rows).all()
        assert ratio.max() <= 1 + 1e-12 and ratio.min() >= 0.95


def test_uniform_choices_never_reach_three_bits_and_cost_first_does(chain, rng):
    space, costs = chain
    deep = space.restrict({"*.depth": [3]})
    limit = costs.limit("bitops", "w3a3")
    drawn = costs.kinds["bitops"].value(Uniform(deep).ask(50_000, rng))
    assert (drawn <= limit).sum() == 0
    below = costs.kinds["bitops"].value(CostFirst(deep, costs).ask(2_000, rng)) <= limit
    assert below.mean() > 0.2


def test_costs_are_flat_over_log_bins(chain, rng):
    space, costs = chain
    sampler = CostFirst(space, costs)
    cost = costs.kinds["bitops"].value(sampler.ask(1_600, rng))
    histogram = np.histogram(np.log(cost), bins=np.log(sampler.edges))[0]
    assert stats.chisquare(histogram).pvalue > 1e-3
    uniform = costs.kinds["bitops"].value(Uniform(space).ask(1_600, rng))
    assert stats.chisquare(np.histogram(np.log(uniform), bins=np.log(sampler.edges))[0]).pvalue < 1e-12


def test_one_target_has_many_subnets_with_all_bits_and_forms(chain, rng):
    space, costs = chain
    deep = space.restrict({"*.depth": [3]})
    rows = CostFirst(deep, costs).at(np.full(300, costs.limit("bitops", "w4a4")), rng)
    assert len(np.unique(rows, axis=0)) == 300
    counts = np.bincount(rows[:, space.position["s0.1.a.weight"]], minlength=28).reshape(7, 4)
    by_bits, by_form = counts.sum(1), counts.sum(0)
    assert (by_bits > 0).all() and by_bits[:3].sum() > 1.5 * by_bits[4:].sum()
    assert stats.chisquare(by_form).pvalue > 1e-3


def test_multiplier_zero_is_the_uniform_distribution(chain, rng):
    """At the mean cost of uniform bits the tilted draw has uniform bits, up to the correction to the exact cost."""
    space, costs = chain
    deep = space.restrict({"*.depth": [3]})
    mean = costs.kinds["bitops"].value(Uniform(deep).ask(20_000, rng)).mean()
    rows = CostFirst(deep, costs).at(np.full(1_500, mean), rng)
    genes = [i for i, d in enumerate(space.dimensions) if d.name.endswith("weight") and len(d.choices) == 28]
    share = np.bincount(rows[:, genes].ravel() // 4, minlength=7) / rows[:, genes].size
    assert np.abs(share - 1 / 7).max() < 0.03


def test_views_are_honoured(chain, rng):
    space, costs = chain
    view = space.restrict({"s?.*.weight": lambda c: c.symmetric, "s1.depth": [2, 3]}).tie(
        [["s*.a.input"], ["s0.*.weight"]]
    )
    sampler = CostFirst(view, costs)
    rows = sampler.ask(60, rng)
    assert view.admits(rows).all() and not space.tie([["s*.b.input"]]).admits(rows).all()


def test_fully_tied_spaces_are_tilted_as_one(chain, rng):
    space, costs = chain
    view = space.restrict({"*.depth": [3]}).tie([["s?.*.weight"], ["s?.*.input"]])
    sampler = CostFirst(view, costs)
    target = costs.limit("bitops", "w4a4")
    raw = sampler._tilt.draw(np.full(50, target), rng)
    assert costs.kinds["bitops"].value(raw).max() <= target * (1 + 1e-12)
    assert costs.kinds["bitops"].value(sampler.at(np.full(50, target), rng)).min() > 0.75 * target


def test_the_generator_decides_alone(chain):
    space, costs = chain
    sampler = CostFirst(space, costs)
    first = sampler.ask(5, np.random.default_rng(3))
    np.random.seed(0)  # noqa: NPY002 (the disturbance)
    np.random.random(10)  # noqa: NPY002
    assert np.array_equal(first, sampler.ask(5, np.random.default_rng(3)))


def test_probabilities_follow_the_current_decrease_and_turn_when_a_bin_converges(chain):
    """A supernet whose loss in bin k decays as exp(-t / tau_k): a rule that follows the level of the loss fails."""
    space, costs = chain
    sampler = CostFirst(space, costs, bins=4, adapt=True, floor=0.2)
    centres = np.sqrt(sampler.edges[1:] * sampler.edges[:-1])
    rows = sampler.at(centres, np.random.default_rng(0))
    assert sampler.bin_of(rows).tolist() == [0, 1, 2, 3]
    tau, level = np.array([30.0, 1e9, 150.0, 600.0]), np.array([0.1, 5.0, 0.2, 0.3])
    orders = {}
    for step in range(1, 1201):
        sampler.tell(rows, level + np.exp(-step / tau), step, 1200)
        orders[step] = np.argsort(-sampler.probabilities)
    assert orders[40][0] == 0 and orders[1200][0] == 3
    assert orders[1200].tolist() != orders[40].tolist()
    assert sampler.probabilities.min() >= 0.2 / 4 - 1e-12
    assert sampler.probabilities.sum() == pytest.approx(1.0)
    assert sampler.probabilities[1] < 0.25  # the highest loss, but it does not move


def test_state_round_trip(chain, rng):
    space, costs = chain
    one, two = (CostFirst(space, costs, adapt=True) for _ in range(2))
    for step in range(20):
        rows = one.ask(4, rng)
        one.tell(rows, rng.random(4), step, 20)
    assert one.probabilities.std() > 0
    two.load_state_dict(one.state_dict())
    assert np.array_equal(one.ask(6, np.random.default_rng(1)), two.ask(6, np.random.default_rng(1)))
    with pytest.raises(ValueError, match="cost bins"):
        CostFirst(space, costs, bins=3).load_state_dict(one.state_dict())


def test_without_adaptation_nothing_is_learned(chain, rng):
    space, costs = chain
    sampler = CostFirst(space, costs)
    sampler.tell(sampler.ask(8, rng), rng.random(8), 0, 1)
    assert sampler.feedback == "none" and np.ptp(sampler.probabilities) == 0


@pytest.mark.parametrize("settings", [{"kind": "joules"}, {"bins": 0}, {"floor": 2.0}, {"feedback": "x"}])
def test_settings_out_of_range_are_refused(chain, settings):
    with pytest.raises(ValueError):
        CostFirst(*chain, **settings)


def test_a_space_without_architecture_works(chain, rng):
    space, costs = chain
    flat = SearchSpace([d for d in space.dimensions if d.quantizes and not d.active_if])
    layers = [layer for layer in costs.layers if not layer.active_if]
    own = type(costs)(flat, layers)
    sampler = CostFirst(flat, own)
    target = np.sqrt(sampler.edges[0] * sampler.edges[-1])
    ratio = own.kinds["bitops"].value(sampler.at(np.full(50, target), rng)) / target
    assert flat.admits(sampler.ask(20, rng)).all() and (ratio <= 1).all() and (ratio >= 0.95).all()
