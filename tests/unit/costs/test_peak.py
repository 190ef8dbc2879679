"""The peak of activations against sums written out by hand."""

import itertools

import numpy as np
import pytest

from supernet.config import QuantConfig
from supernet.costs.peak import Held, Most, Step, peak_activation_bytes
from supernet.factors import Factors
from supernet.formats.integer import Integer
from supernet.space import Dimension, SearchSpace

CHOICES = tuple(QuantConfig(Integer(b)) for b in (2, 3, 8))
DEEP = (("depth", (2,)),)
SPACE = SearchSpace(
    [Dimension("depth", (1, 2)), *(Dimension(f"{n}.input", CHOICES, DEEP if n == "b" else ()) for n in "abc")]
)
STEPS = (
    Step("a", (Held(100, "a.input"), Held(51, 8))),
    Step("b", (Held(51, 8), Held(77, "b.input"), Held(40, "b.input")), DEEP),
    Step("c", (Held(100, "c.input"), Held(10, 32)), (("depth", (1, 2)),)),
)


def by_hand(row):
    a, b, c = (CHOICES[i].bits for i in row[1:])
    up = lambda n: -(-n // 8)  # noqa: E731
    one, three = up(100 * a) + 51, up(100 * c) + 40
    return max(one, three) if row[0] == 0 else max(one, three, 51 + up(77 * b) + up(40 * b))


def test_every_row_by_hand():
    rows = np.array(list(itertools.product((0, 1), *[range(3)] * 3)))
    rows = np.unique(SPACE.canonical(rows), axis=0)
    assert peak_activation_bytes(SPACE, STEPS).value(rows).tolist() == [by_hand(row) for row in rows]


def test_a_step_that_another_always_covers_is_left_out():
    less = Step("less", (Held(99, "a.input"), Held(50, 8)), DEEP)
    other = Step("other", (Held(100, "c.input"), Held(9, 32)))
    assert len(peak_activation_bytes(SPACE, STEPS).parts) == len(STEPS)
    assert len(peak_activation_bytes(SPACE, (less, *STEPS, other)).parts) == len(STEPS)
    alone = Step("alone", (Held(90, "a.input"), Held(51, 8), Held(10, "c.input")))  # more than `a` where c has 8 bits
    assert len(peak_activation_bytes(SPACE, (*STEPS, alone)).parts) == len(STEPS) + 1
    sometimes = Step("sometimes", (Held(1000, 8),), DEEP)  # covers nothing that runs without it
    assert len(peak_activation_bytes(SPACE, (*STEPS, sometimes)).parts) == 3


def test_a_limit_is_one_on_each_sum():
    most = Most((Factors((((0,), np.array([1.0, 5.0])),)), Factors((((1,), np.array([4.0, 2.0])),))))
    rows = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    assert most.value(rows).tolist() == [4, 2, 5, 5]
    weights, bounds = most.linear(4.5)
    sums = np.stack([part.value(rows) for part in most.parts], axis=1) @ weights.T
    assert ((sums <= bounds).all(1) == (most.value(rows) <= 4.5)).all()


@pytest.mark.parametrize("gene", [1, 2, 3])
def test_more_bits_never_hold_less(gene):
    rows = np.array(list(itertools.product((1,), *[range(3)] * 3)))
    higher = rows.copy()
    higher[:, gene] = np.minimum(higher[:, gene] + 1, 2)
    peak = peak_activation_bytes(SPACE, STEPS)
    assert (peak.value(higher) >= peak.value(rows)).all()
