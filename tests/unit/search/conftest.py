"""Spaces small enough to reason about, without a network behind them."""

import itertools

import numpy as np
import pytest

from supernet.config import Layer, PerChannel, PerTensor, QuantConfig
from supernet.cost import Costs, Factors, gated
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


CHOICES = (
    QuantConfig(Integer(2)),
    QuantConfig(Integer(2), PerChannel()),
    QuantConfig(Integer(4), PerTensor(), False),
    QuantConfig(Integer(8)),
)


@pytest.fixture
def small():
    """Two stages; 3 layers, of which two depend on depth: 2 * 3 * 4^3 * 2^3 rows before canonical form."""
    deep, deeper = (("s.depth", (2, 3)),), (("t.depth", (2,)),)
    parts = [("a", 900, ()), ("b", 500, deep), ("c", 300, deeper)]
    layers = [Layer(n, "conv", m, 40, 4, n != "b", False, (4, 8, 8), gate) for n, m, gate in parts]
    dimensions = [Dimension("s.depth", (1, 2, 3)), Dimension("t.depth", (1, 2))]
    for layer in layers:
        dimensions.append(Dimension(layer.weight, CHOICES, layer.active_if))
        dimensions.append(Dimension(layer.input, CHOICES[1:], layer.active_if))
    space = SearchSpace(dimensions)
    return space, Costs(space, layers)


def _every_row(space):
    """All canonical rows that the view admits."""
    rows = np.array(list(itertools.product(*(range(n) for n in space.sizes))), dtype=np.int64)
    rows = np.unique(space.canonical(rows), axis=0)
    return rows[space.admits(rows)]


@pytest.fixture
def every_row():
    """Function: all canonical rows that a view admits."""
    return _every_row


@pytest.fixture
def yardstick():
    """21 layers of a ResNet-18 at 224 px with weight and activation bits 2..8: search_baseline's problem."""
    inner = [118.01, *[115.61] * 4, 57.80, 115.61, 6.42, *[115.61] * 2, 57.80, 115.61, 6.42, *[115.61] * 2]
    macs = np.array([*inner, 57.80, 115.61, 6.42, *[115.61] * 2, 0.512]) * 1e6
    rng = np.random.default_rng(0)
    weight, data = rng.lognormal(0, 1, len(macs)), rng.lognormal(0, 1, len(macs))
    choices = tuple(QuantConfig(Integer(b)) for b in range(2, 9))
    layers = [Layer(f"l{i}", "conv", int(m), 1000, 8, True, False, (1, 1, 1)) for i, m in enumerate(macs)]
    space = SearchSpace([Dimension(name, choices) for x in layers for name in (x.weight, x.input)])
    noise = 4.0 ** -np.arange(2.0, 9.0)
    terms = [((2 * i + j,), s[i] * noise) for i in range(len(macs)) for j, s in enumerate((weight, data))]
    return space, Costs(space, layers), Factors(tuple(terms)), (macs.astype(int), weight, data)


@pytest.fixture
def short():
    """A space with two elastic stages of two blocks: 10 layers."""
    return make(2, 2)


@pytest.fixture
def chain():
    """A space with three elastic stages of three blocks: 20 layers."""
    return make(3, 3)


def _sensitivity(space, layers, rng):
    """Random falling errors of every choice, with a price for depth where it is elastic."""
    terms = []
    for i, d in enumerate(space.dimensions):
        if d.name.endswith("depth"):
            terms.append(((i,), np.linspace(0.2, 0.0, len(d.choices)) * rng.random()))
    for layer in layers:
        for gene in (layer.weight, layer.input):
            choices = space.dimensions[space.position[gene]].choices
            noise = np.array([4.0**-c.bits * (1.1 - 0.1 * c.symmetric) for c in choices])
            terms.append(gated(space, layer, (gene,), rng.lognormal() * noise))
    return Factors(tuple(terms))


@pytest.fixture
def sensitivity():
    """Function (space, layers, rng) -> Factors: random additive sensitivities."""
    return _sensitivity


@pytest.fixture
def rng():
    return np.random.default_rng(7)
