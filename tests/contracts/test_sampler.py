"""Laws of every sampler of conf/sampler."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from supernet.config import Layer, PerChannel, PerTensor, QuantConfig, build
from supernet.cost import Costs
from supernet.formats.integer import Integer
from supernet.interfaces import Sampler
from supernet.space import Dimension, SearchSpace

CONF = Path(__file__).parents[2] / "conf"
WEIGHT = tuple(QuantConfig(Integer(b), g) for b, g in itertools.product((2, 4, 8), (PerTensor(), PerChannel())))
INPUT = tuple(QuantConfig(Integer(b), PerTensor(), s) for b, s in itertools.product((2, 4, 8), (True, False)))


def whole():
    gate = (("depth", (2,)),)
    layers = [
        Layer(n, "conv", m, 50, 4, True, False, (4, 8, 8), g)
        for n, m, g in [("a", 900, ()), ("b", 400, gate), ("c", 70, ())]
    ]
    dimensions = [Dimension("depth", (1, 2))]
    for layer in layers:
        dimensions += [Dimension(layer.weight, WEIGHT, layer.active_if), Dimension(layer.input, INPUT, layer.active_if)]
    space = SearchSpace(dimensions)
    return space, Costs(space, layers)


def view():
    space, costs = whole()
    return space.restrict({"a.weight": lambda c: c.bits < 8}).tie([["a.input", "b.input"]]), costs


@pytest.fixture(params=["whole", "view"])
def space_and_costs(request):
    return {"whole": whole, "view": view}[request.param]()


@pytest.mark.parametrize("path", sorted((CONF / "sampler").glob("*.yaml")), ids=lambda p: p.stem)
class TestSampler:
    def make(self, path, space_and_costs):
        space, costs = space_and_costs
        return space, build(OmegaConf.load(path), space=space, costs=costs)

    def test_it_is_a_sampler(self, path, space_and_costs):
        _, sampler = self.make(path, space_and_costs)
        assert isinstance(sampler, Sampler) and sampler.every >= 1
        assert sampler.feedback in ("none", "train_loss", "select_loss")

    @pytest.mark.parametrize("n", [1, 2, 3, 9])
    def test_rows_are_admissible(self, path, space_and_costs, n):
        space, sampler = self.make(path, space_and_costs)
        rows = sampler.ask(n, np.random.default_rng(n))
        assert rows.shape == (n, len(space)) and rows.dtype == np.int64
        assert space.admits(rows).all()

    def test_the_same_generator_gives_the_same_rows(self, path, space_and_costs):
        _, sampler = self.make(path, space_and_costs)
        first = sampler.ask(6, np.random.default_rng(5))
        np.random.seed(1)  # noqa: NPY002 (the disturbance)
        assert np.array_equal(first, sampler.ask(6, np.random.default_rng(5)))
        assert not np.array_equal(first, sampler.ask(6, np.random.default_rng(6)))

    def test_state_continues(self, path, space_and_costs):
        _, sampler = self.make(path, space_and_costs)
        rng = np.random.default_rng(0)
        for step in range(5):
            rows = sampler.ask(4, rng)
            sampler.tell(rows, rng.random(4), step, 5)
        _, twin = self.make(path, space_and_costs)
        twin.load_state_dict(sampler.state_dict())
        assert np.array_equal(sampler.ask(8, np.random.default_rng(2)), twin.ask(8, np.random.default_rng(2)))

    def test_every_dimension_varies(self, path, space_and_costs):
        space, sampler = self.make(path, space_and_costs)
        rng = np.random.default_rng(0)
        rows = np.concatenate([sampler.ask(4, rng) for _ in range(40)])
        constant = np.flatnonzero(np.ptp(rows, axis=0) == 0)
        assert not [space.dimensions[i].name for i in constant]
