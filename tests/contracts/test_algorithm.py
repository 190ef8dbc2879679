"""Laws of every search algorithm of conf/algorithm."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from supernet.config import Layer, PerChannel, PerTensor, QuantConfig, build
from supernet.cost import Costs, over
from supernet.formats.integer import Integer
from supernet.interfaces import Sampler
from supernet.space import Dimension, SearchSpace, magnitude

CONF = Path(__file__).parents[2] / "conf"
WEIGHT = tuple(QuantConfig(Integer(b), g) for b, g in itertools.product((2, 4, 8), (PerTensor(), PerChannel())))
INPUT = tuple(QuantConfig(Integer(b), PerTensor(), s) for b, s in itertools.product((2, 4, 8), (True, False)))


def whole():
    gate = (("depth", (2,)),)
    parts = [("a", 900, ()), ("b", 400, gate), ("c", 70, ()), ("d", 200, ())]
    layers = [Layer(n, "conv", m, 50, 4, True, False, (4, 8, 8), g) for n, m, g in parts]
    dimensions = [Dimension("depth", (1, 2))]
    for layer in layers:
        dimensions += [Dimension(layer.weight, WEIGHT, layer.active_if), Dimension(layer.input, INPUT, layer.active_if)]
    space = SearchSpace(dimensions)
    return space, Costs(space, layers)


def view():
    space, costs = whole()
    return space.restrict({"a.weight": lambda c: c.bits > 2}).tie([["c.input", "d.input"]]), costs


@pytest.fixture(params=["whole", "view"])
def space_and_costs(request):
    return {"whole": whole, "view": view}[request.param]()


@pytest.mark.parametrize("path", sorted((CONF / "algorithm").glob("*.yaml")), ids=lambda p: p.stem)
class TestAlgorithm:
    def make(self, path, space_and_costs):
        space, costs = space_and_costs
        budgets = [{"bitops": costs.limit("bitops", "w4a4")}, {"bitops": 5e4, "bytes": 350.0}]
        made = build(OmegaConf.load(path))(
            space=space, costs=costs, budgets=budgets, seeds=self.seeds(space), population=12
        )
        return space, costs, budgets, made

    def seeds(self, space):
        return np.array([space.smallest().row, space.uniform("w4a4").row])

    def told(self, space, costs, rows):
        """Objectives: minus a made-up score that likes bits, and the two costs."""
        bits = sum(np.array([magnitude(c) for c in d.choices])[rows[:, i]] for i, d in enumerate(space.dimensions))
        return np.stack([-np.log(bits), costs.kinds["bitops"].value(rows), costs.kinds["bytes"].value(rows)], axis=1)

    def run(self, made, space, costs, rng, generations=4):
        asked = []
        for step in range(generations):
            rows = made.ask(12, rng)
            made.tell(rows, self.told(space, costs, rows), step, generations)
            asked.append(rows)
        return np.concatenate(asked)

    def test_it_is_a_sampler_with_a_front(self, path, space_and_costs):
        space, costs, _, made = self.make(path, space_and_costs)
        assert isinstance(made, Sampler)
        self.run(made, space, costs, np.random.default_rng(0))
        rows, values = made.front()
        assert len(rows) and np.allclose(values, self.told(space, costs, rows))
        worse = (values[:, None] <= values[None]).all(2) & (values[:, None] < values[None]).any(2)
        assert not worse.any()

    def test_rows_are_admissible_and_within_some_budget(self, path, space_and_costs):
        space, costs, budgets, made = self.make(path, space_and_costs)
        rows = self.run(made, space, costs, np.random.default_rng(1))
        assert space.admits(rows).all()
        assert np.any([over(b, costs.kinds, rows) <= 1e-12 for b in budgets], axis=0).all()

    def test_the_front_gets_better(self, path, space_and_costs):
        space, costs, budgets, made = self.make(path, space_and_costs)
        rng = np.random.default_rng(2)
        first = made.ask(2, rng)
        made.tell(first, self.told(space, costs, first), 0, 10)
        before = self.best(made, budgets, costs)
        self.run(made, space, costs, rng, 8)
        after = self.best(made, budgets, costs)
        assert all(a <= b for a, b in zip(after, before, strict=True)) and sum(after) < sum(before)

    def best(self, made, budgets, costs):
        rows, values = made.front()
        return [values[over(b, costs.kinds, rows) <= 1e-12, 0].min() for b in budgets]

    def test_the_same_generator_gives_the_same_rows(self, path, space_and_costs):
        runs = []
        for k in range(2):
            np.random.seed(k)  # noqa: NPY002 (the disturbance)
            space, costs, _, made = self.make(path, space_and_costs)
            runs.append(self.run(made, space, costs, np.random.default_rng(3)))
        assert np.array_equal(*runs)

    def test_state_continues_from_a_file(self, path, space_and_costs):
        """The state of a search that is killed lies on disk as JSON, arrays as lists."""
        space, costs, _, made = self.make(path, space_and_costs)
        rng = np.random.default_rng(4)
        self.run(made, space, costs, rng)
        twin = self.make(path, space_and_costs)[3]
        twin.load_state_dict(json.loads(json.dumps(made.state_dict(), default=lambda array: array.tolist())))
        left, right = (self.run(a, space, costs, np.random.default_rng(5)) for a in (made, twin))
        assert np.array_equal(left, right)
