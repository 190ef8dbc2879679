"""Average bits against counting every weight and every input element."""

import itertools

import numpy as np
import pytest

from supernet.config import Layer, QuantConfig
from supernet.costs.average import average_input_bits, average_weight_bits
from supernet.formats.integer import Integer
from supernet.space import Dimension, SearchSpace

CHOICES = tuple(QuantConfig(Integer(b)) for b in (2, 3, 8))
DEEP = (("depth", (2,)),)
LAYERS = (
    Layer("first", "conv", 10, 9, 4, True, False, (3, 6, 6)),
    Layer("a", "conv", 10, 40, 4, True, False, (2, 3, 3)),
    Layer("b", "conv", 10, 100, 4, True, False, (4, 5, 5), DEEP),
    Layer("qk", "matmul", 2 * 7 * 5 * 3, 0, 1, False, False, (2, 7, 5)),
    Layer("last", "linear", 10, 1000, 4, True, False, (64,)),
)
SPACE = SearchSpace(
    [Dimension("depth", (1, 2)), *(Dimension(g, CHOICES, x.active_if) for x in LAYERS for g in (x.weight, x.input))]
)
RIGHT = 2 * 5 * 3
"""Elements of the right operand: heads x k x n."""


def rows():
    drawn = np.random.default_rng(0).integers(SPACE.sizes, size=(80, len(SPACE)))
    return SPACE.canonical(drawn)


def bits(config, name):
    choice = config.get(name)
    return 0 if choice is None else choice.bits


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (average_weight_bits, {"a.weight": 40, "b.weight": 100}),
        (average_input_bits, {"a.input": 18, "b.input": 100, "qk.left.input": 70, "qk.right.input": RIGHT}),
    ],
)
def test_every_element_counts_once(make, read):
    for row, average in zip(rows(), make(SPACE, LAYERS).value(rows()), strict=True):
        config = SPACE.config(row)
        elements = list(itertools.chain.from_iterable([bits(config, g)] * n for g, n in read.items() if g in config))
        assert average == pytest.approx(np.mean(elements), rel=1e-12)


@pytest.mark.parametrize("make", [average_weight_bits, average_input_bits])
@pytest.mark.parametrize("limit", [2.0, 2.7, 3.0, 5.5, 8.0])
def test_a_limit_is_one_on_a_sum(make, limit):
    average = make(SPACE, LAYERS)
    weights, bounds = average.linear(limit)
    sums = np.stack([part.value(rows()) for part in average.parts], axis=1) @ weights.T
    assert (bounds > 0).all() and (weights >= 0).all()
    assert ((sums <= bounds * (1 + 1e-12)).all(1) == (average.value(rows()) <= limit * (1 + 1e-12))).all()


def test_two_layers_have_no_inner_one_and_count_both():
    ends = (LAYERS[0], LAYERS[4])
    row = SPACE.uniform("w3a3").row
    assert average_weight_bits(SPACE, ends).value(np.array([row])).tolist() == [3]


def test_where_nothing_runs_the_average_is_zero():
    only = (LAYERS[0], LAYERS[2], LAYERS[4])  # the one inner layer needs depth 2
    average = average_weight_bits(SPACE, only)
    shallow, deep = SPACE.smallest().row, SPACE.largest().row
    assert average.value(np.array([shallow, deep])).tolist() == [0, 8]
