"""Start values against a brute-force search of the same grid of ranges, and where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from supernet.quant.ranges import LOWEST, NORM, SHRINK, order_statistics, start_values

GRIDS = [(-2, 1, True), (-2, 1, False), (-8, 7, True), (-8, 7, False), (-127, 127, True), (-128, 127, False)]
UNSIGNED = [(0, 3, True), (0, 15, False), (0, 255, True)]


def data(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3, 400, generator=generator)
    return {
        "normal": normal,
        "heavy": normal.sinh() * normal.abs(),
        "shifted": normal + 4,
        "below": -normal.abs() - 1,
        "skewed": normal.exp(),
    }[kind]


def error(rows: np.ndarray, scale: float, zero: float, low: int, high: int) -> float:
    codes = np.clip(np.round(rows / np.float32(scale)) + zero, low, high)
    return float(np.mean(np.abs((codes - zero) * np.float32(scale) - rows) ** NORM))


def brute_force(row: np.ndarray, low: int, high: int, symmetric: bool, unsigned: bool) -> float:
    """Least error over the ranges from the whole one down to LOWEST of it."""
    least, most = min(row.min(), 0.0), max(row.max(), 0.0)
    errors = []
    for shrink in np.linspace(1.0, LOWEST, SHRINK):
        a, b = shrink * least, shrink * most
        span = 2 * max(b, -a) if symmetric and not unsigned else b - a
        scale = span / (high - low)
        zero = 0.0 if symmetric else float(np.clip(low - np.round(a / scale), low, high))
        errors.append(error(row, scale, zero, low, high))
    return min(errors)


@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted", "below", "skewed"])
def test_the_range_that_loses_least_is_found_for_every_choice_at_once(kind: str) -> None:
    rows = data(kind)
    low, high, symmetric = zip(*GRIDS, strict=True)
    scale, zero = start_values(rows, low, high, symmetric, unsigned=False)
    assert scale.shape == zero.shape == (len(GRIDS), 3) and (scale > 0).all()
    assert torch.equal(zero, zero.round())
    for k, (lo, hi, sym) in enumerate(GRIDS):
        assert not (sym and zero[k].any()) and (zero[k] >= lo).all() and (zero[k] <= hi).all()
        for r, row in enumerate(rows.numpy()):
            got = error(row, float(scale[k, r]), float(zero[k, r]), lo, hi)
            assert got == pytest.approx(brute_force(row.astype(np.float64), lo, hi, sym, False), rel=2e-3)


def test_unsigned_data_uses_codes_from_zero() -> None:
    rows = data("skewed")
    low, high, symmetric = zip(*UNSIGNED, strict=True)
    scale, zero = start_values(rows, low, high, symmetric, unsigned=True)
    assert not zero.any()
    for k, (lo, hi, sym) in enumerate(UNSIGNED):
        for r, row in enumerate(rows.numpy()):
            got = error(row, float(scale[k, r]), 0.0, lo, hi)
            assert got == pytest.approx(brute_force(row.astype(np.float64), lo, hi, sym, True), rel=2e-3)


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_zero_point_helps_where_the_data_is_shifted(bits: int, sign: int) -> None:
    rows = sign * (torch.rand(2, 800, generator=torch.Generator().manual_seed(2)) * 3 - 0.2)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale, zero = start_values(rows, (low, low), (high, high), (True, False), unsigned=False)
    for r, row in enumerate(rows.numpy()):
        symmetric, asymmetric = (error(row, float(scale[k, r]), float(zero[k, r]), low, high) for k in (0, 1))
        assert asymmetric < 0.5 * symmetric
    assert (torch.sign(zero[1]) == -sign).all()


def test_a_ramp_of_integers_needs_no_search() -> None:
    """The whole range is exact: 16 steps of 0.5, shifted by 3."""
    rows = (torch.arange(-11, 5) * 0.5)[None]
    scale, zero = start_values(rows, (-8,), (7,), (False,), unsigned=False)
    assert scale.item() == 0.5 and zero.item() == 3
    codes = torch.clamp(torch.round(rows / scale) + zero, -8, 7)
    assert torch.equal((codes - zero) * scale, rows)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_without_extent_get_scale_one_and_no_scale_is_zero(symmetric: bool) -> None:
    rows = torch.zeros(4, 5)
    rows[1, 2], rows[2, 0], rows[3, 3] = 1e-45, -1e-38, 3.0
    scale, zero = start_values(rows, (-8,), (7,), (symmetric,), unsigned=False)
    assert scale[0, 0] == 1 and zero[0, 0] == 0
    assert (scale > 0).all() and torch.isfinite(rows / scale.T).all()


def test_equal_channels_have_the_start_values_of_the_whole() -> None:
    row = torch.randn(1, 300, generator=torch.Generator().manual_seed(3))
    low, high, symmetric = zip(*GRIDS, strict=True)
    whole = start_values(row.repeat(1, 4), low, high, symmetric, unsigned=False)
    each = start_values(row.repeat(4, 1), low, high, symmetric, unsigned=False)
    for one, many in zip(whole, each, strict=True):
        torch.testing.assert_close(one.expand(-1, 4), many)


def test_a_grid_that_is_not_integer_is_measured_on_its_own_levels() -> None:
    levels = torch.tensor([-64.0, -16.0, -4.0, -1.0, 0.0, 1.0, 4.0, 16.0, 64.0])
    rows = data("heavy")
    scale, _ = start_values(rows, (-64.0,), (64.0,), (True,), False, [levels])
    for row, found in zip(rows.double(), scale[0].double(), strict=True):
        errors = []
        for shrink in torch.linspace(1.0, LOWEST, SHRINK).double():
            s = shrink * 2 * row.abs().max() / 128
            nearest = levels.double()[(row[:, None] / s - levels).abs().argmin(1)]
            errors.append(float(((nearest * s - row).abs() ** NORM).mean()))
        nearest = levels.double()[(row[:, None] / found - levels).abs().argmin(1)]
        assert float(((nearest * found - row).abs() ** NORM).mean()) == pytest.approx(min(errors), rel=1e-3)


def test_order_statistics_keep_the_extremes_and_the_distribution() -> None:
    rows = torch.randn(3, 10_000, generator=torch.Generator().manual_seed(4))
    some = order_statistics(rows, 500)
    assert some.shape == (3, 500) and (some.diff(dim=1) >= 0).all()
    assert torch.equal(some[:, 0], rows.amin(1)) and torch.equal(some[:, -1], rows.amax(1))
    assert torch.allclose(some.median(1).values, rows.median(1).values, atol=0.02)
    assert torch.equal(order_statistics(rows, 10_000), rows)
