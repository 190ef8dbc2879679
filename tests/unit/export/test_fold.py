"""Layer and BatchNorm as one integer layer: whose codes, which scales, what becomes of odd channels."""

import itertools
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.elastic.layers import QuantConv2d, QuantLinear
from supernet.export.fold import embedding, fine, fold, signed
from supernet.export.graph import Grid
from supernet.formats.integer import Integer
from supernet.formats.powers import PowersOfTwo

SOURCE = ("x", Grid(0.05, 37, 0, 255, 8))
FORMS = tuple(itertools.product((PerTensor(), PerChannel()), (True, False)))
CHOICES = [QuantConfig(Integer(bits), *form) for bits in range(2, 9) for form in FORMS]


def conv(choice, bias=True, **options):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, bias=bias, **options)
    layer.weight.data *= 1 + torch.randn(8, 1, 1, 1)
    layer.weight.data += 0.05 * torch.randn(8, 1, 1, 1)
    made = QuantConv2d.from_float(layer).quantize([choice], [QuantConfig(Integer(8))])
    made.weight_quantizer.start(made.weight)
    return made


def norm(channels=8, gamma=None):
    torch.manual_seed(1)
    made = nn.BatchNorm2d(channels).eval()
    made.weight.data = torch.linspace(-1.5, 2, channels) if gamma is None else gamma
    made.bias.data = torch.randn(channels)
    made.running_mean, made.running_var = torch.randn(channels) * 0.2, torch.rand(channels) + 0.1
    return made


def codes(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2)).float()


def real(layer, batch_norm, x):
    """The trained module and its BatchNorm on the values of codes, in float64."""
    values = (x.double() - SOURCE[1].zero) * SOURCE[1].scale
    weight = layer.weight_quantizer(layer.weight).double()
    bias = None if layer.bias is None else layer.bias.double()
    y = nn.functional.conv2d(values, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    if batch_norm is None:
        return y
    statistics = (batch_norm.running_mean, batch_norm.running_var, batch_norm.weight, batch_norm.bias)
    mean, var, gamma, beta = (t.double().view(-1, 1, 1) for t in statistics)
    return (y - mean) / torch.sqrt(var + batch_norm.eps) * gamma + beta


class TestFold:
    @pytest.mark.parametrize("choice", CHOICES, ids=str)
    def test_it_computes_layer_and_norm(self, choice):
        """Beside rounding, only the bias may be off, by half its unit."""
        layer, batch_norm, x = conv(choice), norm(), codes(4, 6, 9, 9)
        with torch.no_grad():
            made = fold("c", layer, batch_norm, SOURCE, None)
            got, expected = made([x], [SOURCE[1]]).double(), real(layer, batch_norm, x)
        unit = (made.scale * SOURCE[1].scale / made.fine).double().view(-1, 1, 1)
        assert ((got - expected).abs() <= 0.5 * unit + 1e-6 * expected.abs().max()).all()

    @pytest.mark.parametrize("choice", CHOICES, ids=str)
    def test_its_codes_are_those_of_the_trained_module(self, choice):
        layer, batch_norm = conv(choice), norm()
        with torch.no_grad():
            made = fold("c", layer, batch_norm, SOURCE, None)
            scale, zero, _, _ = layer.weight_quantizer.parameters_of(layer.weight)
            trained = layer.weight_quantizer.encode(layer.weight) - zero
        sign = torch.sign(batch_norm.weight).view(-1, 1, 1, 1)
        assert torch.equal(made.centred.float(), sign * trained)
        low, high = -(2 ** (choice.bits - 1)), 2 ** (choice.bits - 1) - 1
        for held in (made.codes, made.zero):
            assert low <= int(held.min()) and int(held.max()) <= high
        gain = batch_norm.weight.abs() / torch.sqrt(batch_norm.running_var + batch_norm.eps)
        alive = gain > 0
        assert torch.allclose(made.scale[alive], (scale.flatten() * gain)[alive]) and (made.scale > 0).all()

    def test_symmetric_codes_keep_zero_point_zero(self):
        """Where a plain minus fits: 8 bits are +-127, and 4-bit weights rarely hold -8."""
        layer = conv(QuantConfig(Integer(8), PerChannel(), True))
        with torch.no_grad():
            assert not fold("c", layer, norm(), SOURCE, None).zero.any()

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("choice", [CHOICES[0], CHOICES[-2]], ids=str)
    def test_without_a_norm(self, choice, bias):
        layer, x = conv(choice, bias), codes(2, 6, 5, 5)
        with torch.no_grad():
            made = fold("c", layer, None, SOURCE, None)
            got, expected = made([x], [SOURCE[1]]).double(), real(layer, None, x)
        assert len(made.scale) == len(made.zero) == (1 if choice.granularity == PerTensor() else 8)
        assert (made.bias is None) == (not bias)
        unit = (made.scale * SOURCE[1].scale / made.fine).double().view(-1, 1, 1)
        assert ((got - expected).abs() <= 0.5 * unit * bias + 1e-6 * expected.abs().max()).all()

    def test_a_norm_without_gain_and_offset(self):
        layer, plain, x = conv(CHOICES[-1]), nn.BatchNorm2d(8, affine=False).eval(), codes(2, 6, 5, 5)
        plain.running_mean, plain.running_var = torch.randn(8), torch.rand(8) + 0.5
        full = norm(gamma=torch.ones(8))
        full.bias.data.zero_()
        full.running_mean, full.running_var = plain.running_mean, plain.running_var
        with torch.no_grad():
            one, other = (fold("c", layer, n, SOURCE, None)([x], [SOURCE[1]]) for n in (plain, full))
        assert torch.equal(one, other)

    def test_the_float_twin_is_folded_too(self):
        layer, batch_norm, x = conv(CHOICES[-1]), norm(), torch.randn(2, 6, 5, 5)
        with torch.no_grad():
            made = fold("c", layer, batch_norm, SOURCE, None)
            twin = nn.functional.conv2d(x, made.weight, made.shift)
            expected = batch_norm(nn.functional.conv2d(x, layer.weight, layer.bias))
        assert torch.allclose(twin, expected, atol=1e-5)

    def test_a_linear_layer_behind_a_norm(self):
        torch.manual_seed(0)
        layer = QuantLinear.from_float(nn.Linear(20, 6)).quantize([CHOICES[-1]], [QuantConfig(Integer(8))])
        layer.weight_quantizer.start(layer.weight)
        batch_norm, x = nn.BatchNorm1d(6).eval(), codes(5, 20)
        batch_norm.weight.data = torch.linspace(-1, 1, 6)
        batch_norm.running_mean = torch.randn(6)
        with torch.no_grad():
            got = fold("l", layer, batch_norm, SOURCE, None)([x], [SOURCE[1]])
            values = (x - 37) * 0.05
            expected = batch_norm(nn.functional.linear(values, layer.weight_quantizer(layer.weight), layer.bias))
        assert torch.allclose(got, expected, atol=2e-3)


class TestOddChannels:
    def test_gain_zero_gives_the_offset(self):
        gamma = torch.tensor([1.0, 0, -1, 0, 1, 1, 0, 1])
        batch_norm = norm(gamma=gamma)
        batch_norm.bias.data[6] = 0.0
        with torch.no_grad():
            made = fold("c", conv(CHOICES[0]), batch_norm, SOURCE, None)
            got = made([codes(2, 6, 5, 5)], [SOURCE[1]])
        dead = gamma == 0
        assert made.constant == 3 and not made.codes[dead].any() and (made.scale > 0).all()
        expected = batch_norm.bias[dead].view(-1, 1, 1).expand_as(got[0, dead])
        assert torch.allclose(got[0, dead], expected, rtol=1e-6, atol=0)

    def test_a_gain_too_small_to_show_does_not_overflow_the_bias(self):
        """Such channels are common in trained networks: 1e-12 would ask for a bias of 10^13 steps."""
        gamma = torch.ones(8)
        gamma[2] = 1e-12
        batch_norm = norm(gamma=gamma)
        out = Grid(0.02, 0, 0, 255, 8)
        with torch.no_grad():
            made = fold("c", conv(CHOICES[-1]), batch_norm, SOURCE, out)
            made.grid = out
            got = made([codes(2, 6, 5, 5)], [SOURCE[1]])
        assert made.constant == 1
        assert torch.equal(got[:, 2], out.encode(batch_norm.bias[2]).expand_as(got[:, 2]))

    def test_a_channel_of_zeros(self):
        layer = conv(CHOICES[-1])
        layer.weight.data[3] = 0.0
        layer.weight_quantizer.start(layer.weight)
        with torch.no_grad():
            made = fold("c", layer, None, SOURCE, None)
            got = made([codes(2, 6, 5, 5)], [SOURCE[1]])
        assert torch.allclose(got[:, 3], layer.bias[3], rtol=1e-6)

    def test_a_bias_beyond_int32_is_an_error(self):
        batch_norm = norm()
        batch_norm.bias.data[0] = 1e9
        with pytest.raises(ValueError, match=r"the_layer needs sums up to .* more than an int32 holds"):
            fold("the_layer", conv(CHOICES[-1]), batch_norm, SOURCE, Grid(0.02, 0, 0, 255, 8))

    def test_padding_that_is_not_with_zeros_is_an_error(self):
        with pytest.raises(ValueError, match="padding_mode='reflect'"):
            fold("c", conv(CHOICES[0], padding=1, padding_mode="reflect"), None, SOURCE, None)


class TestPadding:
    @pytest.mark.parametrize(("padding", "kernel"), [("same", 3), ("same", 4), ("valid", 3), ((1, 2), 3)])
    def test_every_form(self, padding, kernel):
        torch.manual_seed(0)
        layer = QuantConv2d.from_float(nn.Conv2d(3, 4, kernel, padding=padding, bias=False))
        layer.quantize([CHOICES[-1]], [QuantConfig(Integer(8))]).weight_quantizer.start(layer.weight)
        x = codes(2, 3, 7, 8)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that it copies the input
            got = fold("c", layer, None, SOURCE, None)([x], [SOURCE[1]])
            expected = layer._conv_forward((x - 37) * 0.05, layer.weight_quantizer(layer.weight), None)
        assert torch.allclose(got, expected, atol=1e-4)


class TestParts:
    @pytest.mark.parametrize("bits", range(2, 9))
    def test_negation_is_exact_and_fits(self, bits):
        """Every pair of code and zero-point."""
        every = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
        q, z = (t.reshape(-1) for t in torch.meshgrid(every, every, indexing="ij"))
        codes_, zero = signed(q.view(-1, 1), z, -torch.ones(len(z)), bits)
        assert torch.equal(codes_[:, 0] - zero, z - q)
        for held in (codes_, zero):
            assert every[0] <= held.min() and held.max() <= every[-1]
        same, kept = signed(q.view(-1, 1), z, torch.ones(len(z)), bits)
        assert torch.equal(same[:, 0], q) and torch.equal(kept, z)

    @pytest.mark.parametrize(
        ("largest", "expected"), [(1, 64), (2, 32), (3, 16), (8, 8), (15, 4), (32, 2), (33, 1), (64, 1), (200, 1)]
    )
    def test_how_finely_a_bias_is_held(self, largest, expected):
        assert fine(torch.tensor([[0, -largest]])) == expected

    def test_grids_that_fit_an_int8(self):
        assert embedding(QuantConfig(PowersOfTwo(4))) == 1
        assert embedding(QuantConfig(_Grid((-1.5, -0.25, 0, 0.5, 1.5)))) == 4
        assert embedding(QuantConfig(_Grid((-1.0, 0, 0.3337, 1.0)))) == 0

    def test_another_grid_is_stored_in_int8(self):
        layer = conv(QuantConfig(_Grid((-1.5, -0.5, 0.0, 0.25, 1.5)), PerChannel(), True))
        with torch.no_grad():
            made = fold("c", layer, norm(), SOURCE, None)
        assert made.factor == 4 and made.width == 8
        assert set(made.codes.flatten().tolist()) <= {s * m for s in (-1, 1) for m in (-6, -2, 0, 1, 6)}


@dataclass(frozen=True)
class _Grid:
    points: tuple[float, ...]
    bits: int = 3

    def levels(self, symmetric):
        return self.points
