"""The quantizer's arithmetic and its hand-written gradients against plain float64 and against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from supernet.quant.quantizer import _bounds
from supernet.quant.ste import BYPASS, FakeQuantize, Select, TableQuantize, encode, forward, nearest_level
from tests.unit.quant.reference import check, plainly, values

FORMS = [
    pytest.param(low, high, zero, channels, id=f"{low}..{high} z={zero} {'channel' if channels > 1 else 'tensor'}")
    for low, high in ((-2, 1), (-8, 7), (-127, 127), (-128, 127), (0, 3), (0, 255))
    for zero in (0, 1, -3)
    for channels in (1, 3)
]


def operands(low: int, high: int, zero: int, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values inside and well outside the range, away from ties; scales; zero-points within the codes; the bound row."""
    generator = torch.Generator().manual_seed(high - low + zero)
    scale = torch.rand(channels, generator=generator) * 0.2 + 0.05
    zeros = torch.full((channels,), float(zero)).clamp(low, high)
    row = torch.tensor([0, low, high, int(zero != 0), 0])
    return values((3, 40, 50), scale, zeros, low, high), scale, zeros, row


def applied(
    function: type[torch.autograd.Function], tensors: tuple[Tensor, ...], *rest: object, grad: Tensor
) -> dict[str, Tensor]:
    """What a function of (v, scale, zero, ...) gives, and its gradients."""
    inputs = [t.clone().requires_grad_() for t in tensors]
    out = function.apply(*inputs, *rest)
    out.backward(grad)
    return {"out": out} | {name: t.grad for name, t in zip(("v", "scale", "zero"), inputs, strict=True)}


def noise(v: Tensor) -> Tensor:
    return torch.randn(v.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("low", "high", "zero", "channels"), FORMS)
def test_forward_and_gradients_are_the_formula(low: int, high: int, zero: int, channels: int) -> None:
    v, scale, zeros, row = operands(low, high, zero, channels)
    grad = noise(v)
    expected = plainly(v, scale, zeros, low, high, grad, factor=49**-0.5)
    assert (expected.v == 0).mean() > 0.05 and (expected.v != 0).mean() > 0.05, "values on both sides of the limits"
    check(applied(FakeQuantize, (v, scale, zeros), row, 49, False, False, grad=grad), expected)


@pytest.mark.parametrize("bypass", [0, 1])
def test_a_row_may_let_values_pass_and_then_nothing_is_learned(bypass: int) -> None:
    v, scale, zeros, row = operands(-8, 7, 1, 1)
    row[BYPASS] = bypass
    grad = noise(v)
    found = applied(FakeQuantize, (v, scale, zeros), row, 4, True, False, grad=grad)
    check(found, plainly(v, scale, zeros, -8, 7, grad, factor=0.5, bypass=bool(bypass)))
    assert torch.equal(found["out"], v) == bool(bypass) and bool(found["scale"].any()) != bool(bypass)


def test_half_precision_is_that_of_float_rounded() -> None:
    """Values and gradients are bfloat16; scales, and all that is computed between, stay float32."""
    v, scale, zeros, row = operands(-8, 7, 1, 3)
    v, grad = v.bfloat16(), noise(v).bfloat16()
    found = applied(FakeQuantize, (v, scale, zeros), row, 9, False, False, grad=grad)
    wide = applied(FakeQuantize, (v.float(), scale, zeros), row, 9, False, False, grad=grad.float())
    assert found["out"].dtype == found["v"].dtype == torch.bfloat16 and found["scale"].dtype == torch.float32
    assert torch.equal(found["out"], wide["out"].bfloat16()) and torch.equal(found["v"], wide["v"].bfloat16())
    assert torch.equal(found["scale"], wide["scale"]) and torch.equal(found["zero"], wide["zero"])


def shaped(scale: Tensor, zeros: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, zero-point and limits, to broadcast against values [n, ...] of three axes."""
    return scale.view(-1, 1, 1), zeros.view(-1, 1, 1), row[1].float(), row[2].float()


@pytest.mark.parametrize(("low", "high", "zero", "channels"), FORMS)
def test_codes_are_those_of_torchs_own_fake_quantize(low: int, high: int, zero: int, channels: int) -> None:
    v, scale, zeros, row = operands(low, high, zero, channels)
    if channels == 1:
        witness = torch.fake_quantize_per_tensor_affine(v, scale.item(), int(zeros.item()), low, high)
    else:
        witness = torch.fake_quantize_per_channel_affine(v, scale, zeros.int(), 0, low, high)
    assert torch.equal(forward(v, *shaped(scale, zeros, row)), witness)
    assert torch.equal(FakeQuantize.apply(v, scale, zeros, row, 1, False, False), witness)


@pytest.mark.parametrize("zero", [0.0, 1.0, -3.0])
def test_ties_go_to_the_even_multiple_of_the_scale(zero: float) -> None:
    """As ONNX rounds: before the zero-point is added. Halves and a power of two are exact."""
    k = torch.arange(-9, 9)
    v, scale, low, high = (k + 0.5) * 0.25, torch.tensor([0.25]), torch.tensor(-128.0), torch.tensor(127.0)
    expected = torch.tensor([float(round(float(i) + 0.5)) + zero for i in k])
    assert torch.equal(encode(v, scale, torch.tensor([zero]), low, high), expected)


@pytest.mark.parametrize(("low", "high", "zero", "channels"), FORMS)
def test_a_table_of_integers_is_the_integer_path_bit_for_bit(low: int, high: int, zero: int, channels: int) -> None:
    v, scale, zeros, row = operands(low, high, zero, channels)
    s, z, lo, hi = shaped(scale, zeros, row)
    halves = (torch.arange(low - 2, high + 3) + 0.5) * scale.view(-1, 1)
    v = torch.cat([v.reshape(3, -1), halves.expand(3, -1)], dim=1)[..., None]
    levels = torch.arange(low, high + 1).float()
    padded = torch.cat([levels, levels[-1:].expand(5)])
    bounds = torch.cat([_bounds(levels), torch.full((5,), torch.inf)])
    assert torch.equal(nearest_level(v, s, z, padded, bounds), encode(v, s, z, lo, hi))


@pytest.mark.parametrize("bypass", [None, 0, 1])
@pytest.mark.parametrize(("low", "high", "zero", "channels"), FORMS)
def test_its_gradients_are_those_of_the_integer_path(
    low: int, high: int, zero: int, channels: int, bypass: int | None
) -> None:
    *tensors, row = operands(low, high, zero, channels)
    row[BYPASS] = bypass or 0
    may_bypass, grad, levels = bypass is not None, noise(tensors[0]), torch.arange(low, high + 1).float()
    one = applied(FakeQuantize, tuple(tensors), row, 25, may_bypass, False, grad=grad)
    two = applied(TableQuantize, tuple(tensors), row, 25, may_bypass, levels, _bounds(levels), grad=grad)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_any_grid_against_a_search_over_all_levels() -> None:
    levels = torch.tensor([-6.0, -4.0, -1.5, 0.0, 0.5, 1.0, 3.0])
    v = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 3
    got = nearest_level(v, torch.tensor(0.7), torch.tensor(0.0), levels, _bounds(levels))
    distance = (v[:, None].double() / 0.7 - levels.double()).abs()
    assert torch.equal(got, levels[distance.argmin(1)])


def test_ties_of_any_grid_go_an_even_number_of_levels_from_zero() -> None:
    levels = torch.tensor([-4.0, -1.0, 0.0, 2.0, 3.0, 5.0])
    middles = (levels[1:] + levels[:-1]) / 2
    got = nearest_level(middles, torch.tensor(1.0), torch.tensor(0.0), levels, _bounds(levels))
    assert got.tolist() == [-4.0, 0.0, 0.0, 3.0, 3.0]
    assert torch.equal(nearest_level(levels, torch.tensor(1.0), torch.tensor(0.0), levels, _bounds(levels)), levels)


class TestSelect:
    SCALE = torch.tensor([0.5, 1.5, 2.5, 3.5])
    ZERO = torch.tensor([0.4, -2.6, 40.0, -40.0])
    ENTRY = torch.tensor([3, 1, 1, 2, 0])
    FACTOR = torch.tensor([0.5, 2.0, 4.0, 1.0, 3.0])
    SHIFTED = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])

    def test_it_gathers_and_rounds_and_keeps_zero_points_within_the_codes(self) -> None:
        low, high = torch.tensor([-8.0, -8.0, -2.0, 0.0, 0.0]), torch.tensor([7.0, 7.0, 1.0, 15.0, 15.0])
        scale, zero = Select.apply(self.SCALE, self.ZERO, self.ENTRY, self.FACTOR, self.SHIFTED, low, high)
        assert scale.tolist() == [3.5, 1.5, 1.5, 2.5, 0.5] and zero.tolist() == [-8, -3, -2, 15, 0]

    def test_ties_of_the_zero_point_go_to_the_even_code(self) -> None:
        zero_point = torch.tensor([0.5, 1.5, -0.5, -1.5])
        one = torch.tensor(1.0)
        _, zero = Select.apply(self.SCALE, zero_point, torch.arange(4), one, one, -8 * one, 7 * one)
        assert zero.tolist() == [0, 2, 0, -2]

    def test_gradients_are_multiplied_added_up_and_pass_rounding_and_clamping(self) -> None:
        """Entry 1 is in use twice; entries 2 and 3 have left the codes; the last use, of entry 0, is symmetric."""
        scale, zero_point = (t.clone().requires_grad_() for t in (self.SCALE, self.ZERO))
        limits = torch.tensor(-8.0), torch.tensor(7.0)
        chosen, zero = Select.apply(scale, zero_point, self.ENTRY, self.FACTOR, self.SHIFTED, *limits)
        upward = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
        torch.autograd.backward([chosen, zero], [upward, -upward])
        assert scale.grad.tolist() == [30000, 20 + 400, 1000, 0.5]
        assert zero_point.grad.tolist() == [0, -(20 + 400), -1000, -0.5]

    @pytest.mark.parametrize("used", ["scale", "zero"])
    def test_either_output_may_go_unused(self, used: str) -> None:
        scale, zero_point = (t.clone().requires_grad_() for t in (self.SCALE, self.ZERO))
        one = torch.tensor(1.0)
        chosen, zero = Select.apply(scale, zero_point, torch.tensor([2]), one, one, -8 * one, 7 * one)
        (chosen if used == "scale" else zero).sum().backward()
        expected = [[0, 0, 1, 0], [0, 0, 0, 0]] if used == "scale" else [[0, 0, 0, 0], [0, 0, 1, 0]]
        assert [scale.grad.tolist(), zero_point.grad.tolist()] == expected


def test_backward_needs_no_more_than_what_was_quantized() -> None:
    """Masks, ratios and codes are computed again: nothing of the size of `v` is stored but `v` itself."""
    v, scale, zeros, row = operands(-8, 7, 1, 3)
    inputs = [t.requires_grad_() for t in (v, scale, zeros)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        FakeQuantize.apply(*inputs, row, 1, False, False)
    assert [t.data_ptr() for t in kept if t.numel() >= v.numel()] == [v.data_ptr()]
    assert sum(t.numel() for t in kept) <= v.numel() + 2 * len(scale) + len(row)


@pytest.mark.parametrize("step", [1e-25, 1e-3, 1.0, 3e5])
def test_inside_ends_half_a_step_beyond_the_outermost_levels(step: float) -> None:
    """The next float beyond is outside, however small the step is."""
    scale, zero, row = torch.tensor([step]), torch.tensor([1.0]), torch.tensor([0, -8, 7, 1, 0])
    lowest, highest = -9.5 * scale, 6.5 * scale
    v = torch.cat([lowest, highest, torch.nextafter(lowest, 2 * lowest), torch.nextafter(highest, 2 * highest)])
    found = applied(FakeQuantize, (v, scale, zero), row, 1, False, False, grad=torch.ones(4))
    assert found["v"].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "v", [torch.zeros(0, 3, 2), torch.zeros(2, 3), torch.full((2, 2), 1e30)], ids=["none", "zeros", "huge"]
)
def test_batches_without_values_or_far_outside_have_finite_gradients(v: Tensor) -> None:
    _, scale, zeros, row = operands(-8, 7, 1, 1)
    found = applied(FakeQuantize, (v, scale, zeros), row, 1, False, False, grad=torch.ones_like(v))
    assert all(torch.isfinite(t).all() for t in found.values()) and found["out"].shape == found["v"].shape == v.shape
    if v.numel() and v.max() > 1:
        assert found["scale"].item() == pytest.approx(4 * 6) and not found["v"].any()
