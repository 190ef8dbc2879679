"""Dyadic factors against exact fractions and float64 rounding."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from supernet.export.dyadic import MOST, Dyadic


@pytest.fixture
def ratios(rng):
    return torch.from_numpy(rng.uniform(1e-5, 0.9, 10_000))


@pytest.fixture
def totals(rng):
    return torch.from_numpy(rng.integers(-(1 << 20) + 1, 1 << 20, 10_000))


def rounded(totals, ratios):
    return torch.floor(totals.double() * ratios + 0.5).long()


def test_31_bits_are_as_good_as_real_factors(ratios, totals):
    """Of 10,000 totals, half of them negative, one or none is rounded otherwise: next to a tie, by one."""
    factor = Dyadic.of(ratios)
    error = (factor.b.double() / 2.0 ** factor.c.double() / ratios - 1).abs().max()
    assert 0 < error < 5e-10
    other = factor(totals) != rounded(totals, ratios)
    assert other.sum() <= 2 and (factor(totals) - rounded(totals, ratios)).abs().max() <= 1
    products = (totals.double() * ratios)[other]
    assert ((products + 0.5 - (products + 0.5).round()).abs() <= products.abs() * 5e-10).all()


def test_8_bits_are_not(ratios, totals):
    wrong = Dyadic.of(ratios, bits=8)(totals) != rounded(totals, ratios)
    assert wrong.double().mean() > 0.985


def test_the_shift_is_exact_where_float64_is_not(rng):
    totals = torch.from_numpy(rng.integers(-(2**31) + 1, 2**31, 2000))
    ratios = torch.from_numpy(np.exp2(rng.uniform(-60, 29, 2000)))
    factor = Dyadic.of(ratios)
    expected = [
        (Fraction(int(t) * int(b), 1 << int(c)) + Fraction(1, 2)).__floor__()
        for t, b, c in zip(totals, factor.b, factor.c, strict=True)
    ]
    assert factor(totals).tolist() == expected


def test_ties_go_up():
    assert Dyadic.of(0.5)(torch.tensor([-3, -1, 1, 3])).tolist() == [-1, 0, 1, 2]


def test_mantissas_keep_to_their_bits():
    near = torch.tensor([1 - 2.0**-40, 0.5, 1.0, 3.0])
    factor = Dyadic.of(near)
    assert factor.b.tolist() == [1 << 30, 1 << 30, 1 << 30, 3 << 29]
    assert factor.c.tolist() == [30, 31, 30, 29]


def test_small_ratios_lose_nothing_that_shows():
    factor = Dyadic.of(torch.tensor([2.0**-30 * 1.1, 1e-20]))
    assert factor.c.tolist() == [MOST, MOST]
    worst = (2**31 - 1) * abs(Fraction(int(factor.b[0]), 1 << MOST) - Fraction(2.0**-30 * 1.1))
    assert worst < 2.0**-23


def test_common_powers_of_two_are_taken_out():
    factor = Dyadic.of(torch.tensor([0.75, 0.0625])).reduced()
    assert factor.b.tolist() == [3, 2] and factor.c.tolist() == [2, 5]
    single = Dyadic.of(0.125).reduced()
    assert (int(single.b), int(single.c)) == (1, 3)


@pytest.mark.parametrize("ratio", [0.0, -1.0, 2.0**30, float("nan"), float("inf")])
def test_other_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="recalibrate"):
        Dyadic.of(ratio)
