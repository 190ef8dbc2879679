"""Order and extremes of the sandwich."""

from functools import partial

import numpy as np

from supernet.samplers.cost_first import CostFirst
from supernet.samplers.sandwich import Sandwich
from supernet.samplers.uniform import Uniform
from supernet.space import magnitude


def magnitudes(space, row, quantized):
    return np.array(
        [magnitude(d.choices[i]) for d, i in zip(space.dimensions, row, strict=True) if d.quantizes == quantized]
    )


def test_highest_first_lowest_last_forms_at_random(chain, rng):
    space, costs = chain
    sampler = Sandwich(space, costs)
    firsts = [sampler.ask(3, rng)[0] for _ in range(20)]
    assert all(
        (magnitudes(space, row, True) == 8).all() and (magnitudes(space, row, False) == 3).all() for row in firsts
    )
    assert len({tuple(row) for row in firsts}) == 20
    for _ in range(20):
        last = sampler.ask(3, rng)[2]
        config = space.config(last)
        inner = [c.bits for n, c in config.items() if not n.startswith(("stem", "head")) and not n.endswith("depth")]
        assert set(inner) == {2}


def test_the_lowest_draws_its_architecture_unless_told_otherwise(chain, rng):
    space, costs = chain
    free, small = Sandwich(space, costs), Sandwich(space, costs, smallest_architecture=True)
    depths = {tuple(magnitudes(space, free.ask(2, rng)[1], False)) for _ in range(60)}
    assert len(depths) > 10
    assert (magnitudes(space, small.ask(2, rng)[1], False) == 1).all()


def test_the_middle_comes_from_the_inner_sampler(chain):
    space, costs = chain
    inner = partial(CostFirst, kind="bytes")
    sampler = Sandwich(space, costs, inner=inner)
    assert sampler.inner.kind == "bytes"
    assert np.array_equal(
        Sandwich(space, costs, inner=Uniform).ask(1, np.random.default_rng(0)),
        Uniform(space).ask(1, np.random.default_rng(0)),
    )
    assert sampler.ask(5, np.random.default_rng(0)).shape == (5, len(space))


def test_feedback_and_state_are_those_of_the_inner_sampler(chain, rng):
    space, costs = chain
    sampler = Sandwich(space, costs, inner=partial(CostFirst, adapt=True, feedback="select_loss", every=7))
    assert (sampler.feedback, sampler.every) == ("select_loss", 7)
    rows = sampler.ask(4, rng)
    sampler.tell(rows, np.arange(4.0), 0, 10)
    twin = Sandwich(space, costs, inner=partial(CostFirst, adapt=True))
    twin.load_state_dict(sampler.state_dict())
    assert np.array_equal(twin.inner.fast, sampler.inner.fast, equal_nan=True)
    assert Sandwich(space, costs).feedback == "none"


def test_views_bound_the_extremes(chain, rng):
    space, costs = chain
    view = space.restrict({"s?.*.weight": lambda c: 3 <= c.bits <= 5, "s0.depth": [1, 2]}).tie([["s1.*.input"]])
    rows = Sandwich(view, costs).ask(2, rng)
    assert view.admits(rows).all()
    highest = view.config(rows[0])
    assert highest["s0.depth"] == 2 and highest["s2.0.a.weight"].bits == 5
    assert view.config(rows[1])["s2.0.a.weight"].bits == 3
