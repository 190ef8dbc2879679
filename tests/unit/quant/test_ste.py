"""The quantizer's arithmetic and its hand-written gradients against plain float64 and against torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from supernet.quant.quantizer import _bounds
from supernet.quant.ste import (
    FakeQuantize,
    RoundThrough,
    ScaleGradient,
    TableQuantize,
    compile_quantizers,
    encode,
    forward,
    nearest_level,
)

FORMS = [
    pytest.param(low, high, zero, shape, id=f"{low}..{high} z={zero} {'channel' if shape[0] > 1 else 'tensor'}")
    for low, high in ((-2, 1), (-8, 7), (-127, 127), (-128, 127), (0, 3), (0, 255))
    for zero in (0, 1, -3)
    for shape in ((1, 1, 1), (3, 1, 1))
]


def operands(low: int, high: int, zero: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values inside and well outside the range, away from ties; scales; zero-points within the codes."""
    generator = torch.Generator().manual_seed(high - low + zero)
    scale = torch.rand(shape, generator=generator) * 0.2 + 0.05
    zeros = torch.full(shape, float(zero)).clamp(low, high)
    span = (high - low + 4) * scale
    v = (torch.rand(3, 40, 50, generator=generator) * 1.4 - 0.7) * span + (low + high - 2 * zeros) / 2 * scale
    ratio = v.double() / scale.double()
    tie = ((ratio - ratio.floor()) - 0.5).abs() < 1e-3
    v = torch.where(tie, v + 0.01 * scale, v)
    return v, scale, zeros, torch.tensor(float(low)), torch.tensor(float(high))


def plainly(v: Tensor, s: Tensor, z: Tensor, low: float, high: float, grad: Tensor) -> dict[str, np.ndarray]:
    """Forward and gradients as the paper writes them, element by element, in float64."""
    v64, s64, z64, g = (np.broadcast_to(t.double().numpy(), v.shape) for t in (v, s, z, grad))
    out, dv, ds, dz = (np.zeros(v.shape) for _ in range(4))
    for at in np.ndindex(*v.shape):
        q = round(v64[at] / s64[at]) + z64[at]
        if q < low:
            out[at], ds[at], dz[at] = (low - z64[at]) * s64[at], g[at] * (low - z64[at]), -g[at] * s64[at]
        elif q > high:
            out[at], ds[at], dz[at] = (high - z64[at]) * s64[at], g[at] * (high - z64[at]), -g[at] * s64[at]
        else:
            out[at], dv[at] = (q - z64[at]) * s64[at], g[at]
            ds[at] = g[at] * ((q - z64[at]) - v64[at] / s64[at])
    axes = tuple(i for i, n in enumerate(s.shape) if n == 1)
    return {"out": out, "v": dv, "s": ds.sum(axis=axes, keepdims=True), "z": dz.sum(axis=axes, keepdims=True)}


@pytest.mark.parametrize(("low", "high", "zero", "shape"), FORMS)
def test_forward_and_gradients_are_the_formula(low: int, high: int, zero: int, shape: tuple[int, ...]) -> None:
    v, scale, zeros, lo, hi = operands(low, high, zero, shape)
    grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
    expected = plainly(v, scale, zeros, low, high, grad)
    inputs = [t.clone().requires_grad_() for t in (v, scale, zeros)]
    out = FakeQuantize.apply(*inputs, lo, hi)
    out.backward(grad)
    assert np.allclose(out.detach().numpy(), expected["out"], rtol=1e-6, atol=1e-7)
    for name, tensor in zip("vsz", inputs, strict=True):
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape
        assert np.allclose(tensor.grad.numpy(), expected[name], rtol=2e-4, atol=2e-3 * scale.max().item()), name


@pytest.mark.parametrize(("low", "high", "zero", "shape"), FORMS)
def test_codes_are_those_of_torchs_own_fake_quantize(low: int, high: int, zero: int, shape: tuple[int, ...]) -> None:
    v, scale, zeros, lo, hi = operands(low, high, zero, shape)
    if shape[0] == 1:
        witness = torch.fake_quantize_per_tensor_affine(v, scale.item(), int(zeros.item()), low, high)
    else:
        witness = torch.fake_quantize_per_channel_affine(v, scale.view(-1), zeros.view(-1).int(), 0, low, high)
    assert torch.equal(forward(v, scale, zeros, lo, hi), witness)


@pytest.mark.parametrize("zero", [0.0, 1.0, -3.0])
def test_ties_go_to_the_even_multiple_of_the_scale(zero: float) -> None:
    """As ONNX rounds: before the zero-point is added. Halves and a power of two are exact."""
    k = torch.arange(-9, 9)
    v, scale, low, high = (k + 0.5) * 0.25, torch.tensor([0.25]), torch.tensor(-128.0), torch.tensor(127.0)
    expected = torch.tensor([float(round(float(i) + 0.5)) + zero for i in k])
    assert torch.equal(encode(v, scale, torch.tensor([zero]), low, high), expected)


@pytest.mark.parametrize(("low", "high", "zero", "shape"), FORMS)
def test_a_table_of_integers_is_the_integer_path_bit_for_bit(
    low: int, high: int, zero: int, shape: tuple[int, ...]
) -> None:
    v, scale, zeros, lo, hi = operands(low, high, zero, shape)
    halves = (torch.arange(low - 2, high + 3) + 0.5) * scale.view(-1, 1)
    v = torch.cat([v.reshape(3, -1), halves.expand(3, -1)], dim=1)[..., None]
    levels = torch.arange(low, high + 1).float()
    padded = torch.cat([levels, levels[-1:].expand(5)])
    bounds = torch.cat([_bounds(levels), torch.full((5,), torch.inf)])
    assert torch.equal(nearest_level(v, scale, zeros, padded, bounds), encode(v, scale, zeros, lo, hi))


@pytest.mark.parametrize(("low", "high", "zero", "shape"), FORMS)
def test_its_gradients_are_those_of_the_integer_path(low: int, high: int, zero: int, shape: tuple[int, ...]) -> None:
    v, scale, zeros, lo, hi = operands(low, high, zero, shape)
    levels = torch.arange(low, high + 1).float()
    grads = []
    for function, ends in ((FakeQuantize, (lo, hi)), (TableQuantize, (levels, _bounds(levels)))):
        inputs = [t.clone().requires_grad_() for t in (v, scale, zeros)]
        function.apply(*inputs, *ends).square().sum().backward()
        grads.append([t.grad for t in inputs])
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two)


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


def test_rounding_passes_the_gradient_on_and_the_scale_gradient_is_multiplied() -> None:
    x = torch.tensor([0.2, 0.5, 1.5, -2.5], requires_grad=True)
    out = RoundThrough.apply(x)
    assert out.tolist() == [0, 0, 2, -2]
    out.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad is not None and x.grad.tolist() == [1, 2, 3, 4]
    y = torch.tensor([3.0, -1.0], requires_grad=True)
    same = ScaleGradient.apply(y, torch.tensor(0.25))
    assert torch.equal(same, y)
    same.backward(torch.tensor([4.0, 8.0]))
    assert y.grad is not None and y.grad.tolist() == [1, 2]


@pytest.fixture
def compiled() -> Iterator[None]:
    compile_quantizers(True)
    yield
    compile_quantizers(False)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_compiled_codes_are_the_eager_ones_away_from_ties() -> None:
    for low, high, zero, shape in ((-8, 7, 0, (1, 1, 1)), (-128, 127, -3, (3, 1, 1)), (0, 15, 1, (1, 1, 1))):
        v, scale, zeros, lo, hi = operands(low, high, zero, shape)
        inputs = [t.clone().requires_grad_() for t in (v, scale, zeros)]
        out = FakeQuantize.apply(*inputs, lo, hi)
        out.square().sum().backward()
        codes = torch.round(out.detach() / scale) + zeros
        assert torch.equal(codes, encode(v, scale, zeros, lo, hi))
        plain = [t.clone().requires_grad_() for t in (v, scale, zeros)]
        compile_quantizers(False)
        FakeQuantize.apply(*plain, lo, hi).square().sum().backward()
        compile_quantizers(True)
        for one, two in zip(inputs, plain, strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-3)
