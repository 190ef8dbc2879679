"""Problems whose optimum within each budget is known: additive ones by the integer program, others by enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.allocation import Program
from supernet.config import Layer, PerTensor, QuantConfig
from supernet.cost import Costs
from supernet.factors import Factors, bits_of, gated
from supernet.formats.integer import Integer
from supernet.space import Dimension, Indices, SearchSpace

Table = NDArray[np.float64]
BITS = tuple(range(2, 9))
BUDGETS = [{"bitops": f"w{b}a{b}"} for b in BITS]
EVEN = (2, 4, 6, 8)
FIXED = 0.02
RESNET18 = [118.01, *[115.61] * 4, 57.80, 115.61, 6.42, *[115.61] * 2, 57.80, 115.61, 6.42, *[115.61] * 2]
RESNET18 += [57.80, 115.61, 6.42, *[115.61] * 2, 0.512]


@dataclass(frozen=True)
class Case:
    """A problem.

    Attributes:
        name: of the problem.
        space, costs: what is chosen and what it costs.
        error: [n] error of rows [n, d], above 0, to be minimised.
        additive: the part of the error that the integer program knows.
        budgets: as users type them.
        best: error of the optimum within each budget.
    """

    name: str
    space: SearchSpace
    costs: Costs
    error: Callable[[Indices], Table]
    additive: Factors
    budgets: list[dict[str, str]]
    best: Table

    def fit(self, indices: Indices, scores: Table) -> None:
        """Nothing is left to learn."""

    def predict(self, indices: Indices) -> tuple[Table, Table]:
        """Minus the logarithm of the error, without doubt: what a predictor that knows would say."""
        return -np.log(self.error(indices)), np.zeros(len(indices))


def additive(name: str, macs: Table, weights: Table, inputs: Table) -> Case:
    """Error sum_l sw_l 4^-bw + sa_l 4^-ba under BitOps, bits 2..8 of weights [l] and inputs [l]; solved exactly."""
    choices = tuple(QuantConfig(Integer(b), PerTensor()) for b in BITS)
    layers = [layer(f"l{k}", round(m)) for k, m in enumerate(macs)]
    space = SearchSpace([Dimension(n, choices) for each in layers for n in (each.weight, each.input)])
    terms = []
    for each, sw, sa in zip(layers, weights, inputs, strict=True):
        terms += [
            ((space.position[n],), s * 4.0 ** -bits_of(space, n)) for n, s in ((each.weight, sw), (each.input, sa))
        ]
    costs, error = Costs(space, layers), Factors(tuple(terms))
    program = Program(space, error, {"bitops": costs.kinds["bitops"]})
    best = [error.value(program.solve(costs.parse(budget))[None])[0] for budget in BUDGETS]
    return Case(name, space, costs, error.value, error, BUDGETS, np.array(best))


def yardstick() -> Case:
    """A ResNet-18 at 224 px: 42 genes, sensitivities drawn with seed 0."""
    rng, n = np.random.default_rng(0), len(RESNET18)
    weights, inputs = rng.lognormal(0, 1, n), rng.lognormal(0, 1, n)
    return additive("yardstick", np.array(RESNET18) * 1e6, weights, inputs)


def drawn(seed: int) -> Case:
    """A problem of the yardstick's kind: 20 to 200 genes, MACs and sensitivities log-normal."""
    rng = np.random.default_rng([1, seed])
    n = int(rng.integers(10, 101))
    macs, weights, inputs = 1e7 * rng.lognormal(0, 1, n), rng.lognormal(0, 1, n), rng.lognormal(0, 1, n)
    return additive(f"drawn {seed} ({2 * n} genes)", macs, weights, inputs)


def entangled(seed: int) -> Case:
    """Depth and pairwise terms: the error of a layer grows with that of its neighbour, depth takes a factor off all.

    Six layers of 2, 4, 6 or 8 bits, weight and input alike, of which two can be left out; every row is enumerated. The
    integer program knows the sum of the layers' own terms only.
    """
    rng = np.random.default_rng([2, seed])
    choices = tuple(QuantConfig(Integer(b), PerTensor()) for b in EVEN)
    gates = [(), (), (), (), (("depth", (5, 6)),), (("depth", (6,)),)]
    layers = [layer(f"l{k}", round(1e6 * rng.lognormal(0, 1)), gate) for k, gate in enumerate(gates)]
    dimensions = [Dimension("depth", (4, 5, 6))]
    dimensions += [Dimension(n, choices, each.active_if) for each in layers for n in (each.weight, each.input)]
    space = SearchSpace(dimensions).tie([[each.weight, each.input] for each in layers])
    costs, s, pairs = Costs(space, layers), rng.lognormal(0, 1, 6), rng.lognormal(0, 1, 5)
    own = tuple(
        gated(space, each, (each.weight,), s[k] * 4.0 ** -bits_of(space, each.weight)) for k, each in enumerate(layers)
    )
    genes = np.array([space.position[each.weight] for each in layers])
    halves = 2.0 ** -np.array(EVEN, dtype=float)
    loss = np.array([1.0, 0.5, 0.25]) * rng.lognormal(0, 0.3)

    def error(rows: Indices) -> Table:
        rows = space.canonical(rows)
        small = halves[rows[:, genes]] * space.active(rows)[:, genes]
        quantized = (s * small**2).sum(1) + (pairs * small[:, 1:] * small[:, :-1]).sum(1)
        return FIXED * loss[rows[:, 0]] + quantized * (1 + 0.2 * rows[:, 0])

    every = np.zeros((3 * len(EVEN) ** 6, len(space)), dtype=np.int64)
    chosen = np.array(list(itertools.product(range(3), *[range(len(EVEN))] * 6)))
    every[:, 0], every[:, genes] = chosen[:, 0], chosen[:, 1:]
    every[:, genes + 1] = chosen[:, 1:]
    every = np.unique(space.canonical(every), axis=0)
    budgets = [{"bitops": f"w{b}a{b}"} for b in (4, 6)] + [{"bitops": f"{costs.limit('bitops', 'w4a4') * 0.6:.0f}"}]
    errors, spent = error(every), costs.kinds["bitops"].value(every)
    best = [errors[spent <= costs.parse(budget)["bitops"]].min() for budget in budgets]
    return Case(f"entangled {seed}", space, costs, error, Factors(own), budgets, np.array(best))


def layer(name: str, macs: int, gate: tuple[tuple[str, tuple[int, ...]], ...] = ()) -> Layer:
    """A convolution of which only the MACs matter."""
    return Layer(name, "conv", macs, 64, 8, True, False, (8, 8, 8), gate)
