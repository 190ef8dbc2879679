"""Spaces small enough to reason about, without a network behind them."""

import itertools

import numpy as np
import pytest

from supernet.config import Layer, PerChannel, PerTensor, QuantConfig
from supernet.cost import Costs
from supernet.formats.integer import Integer
from supernet.space import Dimension, SearchSpace

GRANULARITIES, BOTH = (PerTensor(), PerChannel()), (True, False)
WEIGHT = tuple(QuantConfig(Integer(b), g, s) for b, g, s in itertools.product(range(2, 9), GRANULARITIES, BOTH))
INPUT = tuple(QuantConfig(Integer(b), PerTensor(), s) for b, s in itertools.product(range(2, 9), BOTH))
PINNED = tuple(QuantConfig(Integer(8), PerTensor(), s) for s in BOTH)


def make(stages, blocks, elastic=True):
    """(space, costs) of a residual chain: two convolutions a block, first blocks always run, edges at 8 bits."""
    dimensions, layers = [], []
    names = (
        [("stem", 0, 0)]
        + [(f"s{s}.{b}.{c}", s, b) for s in range(stages) for b in range(blocks) for c in "ab"]
        + [("head", 0, 0)]
    )
    if elastic:
        dimensions += [Dimension(f"s{s}.depth", tuple(range(1, blocks + 1))) for s in range(stages)]
    for k, (name, s, b) in enumerate(names):
        gate = ((f"s{s}.depth", tuple(range(b + 1, blocks + 1))),) if elastic and b else ()
        edge = name in ("stem", "head")
        dimensions.append(Dimension(f"{name}.weight", PINNED if edge else WEIGHT, gate))
        dimensions.append(Dimension(f"{name}.input", PINNED if edge else INPUT, gate))
        layers.append(Layer(name, "conv", 1000 * (1 + 7 * k % 5), 64 * (1 + k), 8, True, False, (8, 8, 8), gate))
    space = SearchSpace(dimensions)
    return space, Costs(space, layers)


@pytest.fixture
def chain():
    """A space with three elastic stages of three blocks: 20 layers."""
    return make(3, 3)


@pytest.fixture
def rng():
    return np.random.default_rng(7)
