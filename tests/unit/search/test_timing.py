"""Latency as a hard limit: what the table promises is measured whole, and dropped if it is over."""

from types import SimpleNamespace

import numpy as np
import pytest

from search.front import load_front, save_front
from search.run import search as run_search
from supernet.cost import Costs, Factors, gated


def timed(space, costs):
    """The costs with a latency: a second for each layer that runs, and half of one for an input below 8 bits."""
    made = Costs(space, costs.layers)
    terms = []
    for layer in costs.layers:
        inputs = space.dimensions[space.position[layer.input]].choices
        terms.append(gated(space, layer, (layer.input,), np.array([1.0 + 0.5 * (c.bits < 8) for c in inputs])))
    made.kinds["latency"] = Factors(tuple(terms))
    return made


class ByBits:
    """More bits and more layers are better."""

    def __init__(self, costs):
        self.costs = costs

    def predict(self, rows):
        return np.log(self.costs.kinds["bitops"].value(rows)), np.full(len(rows), 0.1)


def found_in(space, costs, limit, seconds, rng, **extra):
    net = SimpleNamespace(space=space, costs=costs, fingerprint=space.fingerprint)
    return run_search(
        net,
        ByBits(costs),
        [{"latency": limit} | extra, {"bitops": "w4a4"}],
        rng,
        seconds=seconds,
        generations=6,
        population=30,
        progress=False,
    )


def value(costs, config):
    return float(costs.kinds["latency"].value(np.array([config.row]))[0])


def test_the_best_subnet_within_a_latency_is_found(small, every_row, rng):
    """The witness is the list of all subnets."""
    space, costs = small[0], timed(*small)
    rows = every_row(space)
    scores, spent = ByBits(costs).predict(rows)[0], costs.kinds["latency"].value(rows)
    for limit in (1.0, 2.0, 2.5, 3.5):
        found = found_in(space, costs, limit, None, rng)[0]
        assert found.predicted[0] == pytest.approx(scores[spent <= limit].max())
        assert found.seconds is None and found.costs["latency"] <= limit


def test_winners_that_take_longer_whole_are_dropped(short, rng):
    space, costs = short[0], timed(*short)

    def seconds(config):
        """The table is right but for subnets with an 8-bit input at the first block, which take twice as long."""
        return value(costs, config) * (2.0 if config["s0.0.a.input"].bits == 8 else 1.0)

    plain = found_in(space, costs, 9.0, None, np.random.default_rng(1))[0]
    assert plain.config["s0.0.a.input"].bits == 8
    found = found_in(space, costs, 12.0, seconds, np.random.default_rng(1))
    assert found[0].seconds <= 12.0 and found[0].seconds == seconds(found[0].config)
    assert found[0].costs["latency"] <= 12.0
    assert found[1].seconds is None, "no limit on latency, nothing to time"
    assert all(seconds(control.config) <= 12.0 for control in found[0].controls.values())


def test_the_next_candidate_wins(short, rng):
    space, costs = short[0], timed(*short)
    first = found_in(space, costs, 20.0, None, np.random.default_rng(2))[0].config

    def seconds(config):
        return 99.0 if config == first else 1.0

    found = found_in(space, costs, 20.0, seconds, np.random.default_rng(2))[0]
    assert found.config != first and found.seconds == 1.0
    assert found.predicted[0] <= ByBits(costs).predict(np.array([first.row]))[0][0]


def test_a_limit_that_nothing_keeps_whole_is_refused_before_the_search(short, rng):
    space, costs = short[0], timed(*short)
    message = r"the fastest subnet within 7\.5 takes 99 s measured whole \(its table says 6 s\), the limit is 7\.5 s"
    with pytest.raises(ValueError, match=message):
        found_in(space, costs, 7.5, lambda config: 99.0, rng)


def test_a_limit_below_the_table_is_refused(short, rng):
    space, costs = short[0], timed(*short)
    with pytest.raises(ValueError, match=r"no subnet has latency <= 1 s; the smallest reaches 6 s"):
        found_in(space, costs, 1.0, None, rng)


def test_seconds_go_through_the_file(short, tmp_path, rng):
    space, costs = short[0], timed(*short)
    front = found_in(space, costs, 9.0, lambda config: 8.25, rng)
    save_front(tmp_path / "front.json", front, seed=0)
    assert [f.seconds for f in load_front(tmp_path / "front.json", space)] == [8.25, None]
