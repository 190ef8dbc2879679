"""Integer arithmetic of the reference, against sums of Python integers and exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from supernet.config import PerChannel, QuantConfig
from supernet.export.graph import Grid
from supernet.export.operators import (
    POINTWISE,
    Add,
    AveragePool,
    Concat,
    Conv,
    GlobalAverage,
    Linear,
    MaxPool,
    Pad,
    Pointwise,
    Quantize,
    Reshape,
    Slice,
)
from supernet.formats.integer import Integer

CHOICE = QuantConfig(Integer(8), PerChannel(), False)


def random(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def filled(layer, shape, bias=True, fine=1, low=-128, high=128):
    k = shape[0]
    layer.fine = fine
    layer.hold(
        codes=random(*shape, low=low, high=high, seed=1).short(),
        zero=random(k, low=-9, high=9, seed=2).short(),
        scale=torch.rand(k, generator=torch.Generator().manual_seed(3)) * 0.01 + 0.001,
        bias=random(k, low=-5000, high=5000, seed=4) if bias else None,
        weight=torch.zeros(shape),
        shift=None,
    )
    return layer


def sums(layer, x, zero):
    """Convolution of centred codes by the definition, in Python integers of any size."""
    w = layer.codes.numpy().astype(object) - layer.zero.numpy().astype(object).reshape(-1, 1, 1, 1)
    top, left, bottom, right = layer.padding
    x = np.pad(x.numpy().astype(object) - zero, ((0, 0), (0, 0), (top, bottom), (left, right)))
    (sh, sw), (dh, dw), kernel = layer.stride, layer.dilation, w.shape[2:]
    out = [(x.shape[i + 2] - (layer.dilation[i] * (kernel[i] - 1) + 1)) // layer.stride[i] + 1 for i in (0, 1)]
    result = np.zeros((len(x), len(w), *out), dtype=object)
    per = len(w) // layer.groups
    for k, i, j in np.ndindex(len(w), *out):
        first = (k // per) * w.shape[1]
        part = x[:, first : first + w.shape[1]]
        rows, columns = (
            slice(s * p, s * p + d * (n - 1) + 1, d) for s, p, d, n in ((sh, i, dh, kernel[0]), (sw, j, dw, kernel[1]))
        )
        result[:, k, i, j] = (part[:, :, rows, columns] * w[k]).reshape(len(x), -1).sum(1)
    return result


CONVS = [
    pytest.param(6, (8, 6, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, id="plain"),
    pytest.param(6, (6, 1, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 6, id="depthwise"),
    pytest.param(6, (4, 3, 3, 2), (2, 1), (0, 1, 1, 2), (2, 1), 2, id="grouped, uneven"),
    pytest.param(150, (3, 150, 3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1, id="sums beyond 2^24"),
]


class TestLayers:
    @pytest.mark.parametrize(("channels", "shape", "stride", "padding", "dilation", "groups"), CONVS)
    @pytest.mark.parametrize("fine", [1, 8])
    def test_convolution_sums_exactly(self, channels, shape, stride, padding, dilation, groups, fine):
        grid = Grid(0.02, 7, 0, 255, 8)
        layer = filled(Conv("c", ["x"], CHOICE, 1, 248, stride, padding, dilation, groups), shape, fine=fine)
        x = random(2, channels, 6, 7)
        got = layer([x.float()], [grid])
        exact = (
            sums(layer, x, grid.zero) + layer.bias.numpy().astype(object).reshape(-1, 1, 1) * Fraction(1, fine)
        ).astype(float)
        unit = (layer.scale * grid.scale).double().view(-1, 1, 1).numpy()
        assert np.allclose(got.double().numpy(), exact * unit, rtol=1e-6, atol=0)

    def test_codes_round_the_exact_sum_once(self):
        grid, out = Grid(0.02, 7, 0, 255, 8), Grid(0.017, 100, 0, 255, 8)
        layer = filled(Conv("c", ["x"], CHOICE, 1, 248, (1, 1), (1, 1, 1, 1), (1, 1), 1), (8, 6, 3, 3))
        layer.grid = out
        x = random(8, 6, 6, 6)
        exact = (sums(layer, x, grid.zero) + layer.bias.numpy().astype(object).reshape(-1, 1, 1)).astype(float)
        ratio = layer.scale.double().view(-1, 1, 1).numpy() * grid.scale / out.scale
        expected = np.clip(np.rint(exact * ratio) + 100, 0, 255)
        assert (layer([x.float()], [grid]).numpy() == expected).all(), "none of these sums lies next to a tie"
        assert 0.01 < np.mean((expected == 0) | (expected == 255)) < 0.9, "some codes are clamped, others not"

    def test_linear(self):
        grid = Grid(0.02, 7, 0, 255, 8)
        layer = filled(Linear("l", ["x"], CHOICE, 1, 248), (5, 300), bias=False)
        x = random(9, 300)
        exact = (x - 7).numpy() @ (layer.codes.long() - layer.zero.long()[:, None]).numpy().T
        assert np.allclose(layer([x.float()], [grid]).numpy(), exact * (layer.scale * 0.02).numpy(), rtol=1e-6)

    def test_what_float32_cannot_hold_is_summed_in_float64(self):
        small = filled(Linear("l", ["x"], CHOICE, 1, 248), (5, 30))
        large = filled(Linear("l", ["x"], CHOICE, 1, 248), (5, 3000))
        assert small.largest < 2**24 < large.largest
        assert small.largest == int((small.centred.abs().sum(1)).max()) * 248 + int(small.bias.abs().max())


class TestAdd:
    @pytest.mark.parametrize("scales", [(0.031, 0.017, 0.029), (0.02, 0.02, 0.04), (0.058, 0.033, 0.0321)])
    def test_every_pair_of_codes(self, scales):
        """All 65,536 sums against exact fractions: at most one code off, and that only next to a tie."""
        a, b, out = (Grid(float(np.float32(s)), z, 0, 255, 8) for s, z in zip(scales, (13, 128, 60), strict=True))
        add = Add("s", ["a", "b"])
        add.grid = out
        left, right = (
            t.reshape(-1).float() for t in torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
        )
        got = add([left, right], [a, b]).numpy()
        exact = (
            (left.numpy().astype(np.float64) - a.zero) * a.scale + (right.numpy().astype(np.float64) - b.zero) * b.scale
        ) / out.scale
        expected = np.clip(np.rint(exact) + out.zero, 0, 255)
        off = np.abs(got - expected)
        assert off.max() <= 1
        assert (np.abs(np.abs(exact - np.floor(exact)) - 0.5)[off > 0] < 1e-4).all()

    def test_real_numbers_are_added_as_they_are(self):
        assert torch.equal(
            Add("s", ["a", "b"])([torch.ones(3), torch.arange(3.0)], [None, None]), torch.arange(3.0) + 1
        )


class TestOthers:
    def test_the_mean_of_codes(self):
        grid, out = Grid(0.5, 9, 0, 255, 8), Grid(0.3, 20, 0, 255, 8)
        mean = GlobalAverage("m", ["x"])
        mean.grid = out
        x = random(4, 8, 7, 5)
        exact = (x.numpy() - 9).sum((2, 3)) * 0.5 / (35 * 0.3)
        assert (mean([x.float()], [grid])[:, :, 0, 0].numpy() == np.clip(np.rint(exact) + 20, 0, 255)).all()

    @pytest.mark.parametrize("count", [True, False])
    def test_average_pooling(self, count):
        pool = AveragePool("p", ["x"], (3, 3), (2, 2), (1, 1), True, count)
        x, grid = random(2, 3, 7, 7), Grid(0.5, 9, 0, 255, 8)
        expected = F.avg_pool2d((x - 9) * 0.5, 3, 2, 1, True, count)
        assert torch.allclose(pool([x.float()], [grid]), expected)

    def test_joining_puts_all_on_one_grid(self):
        join = Concat("j", ["a", "b"], 1)
        join.grid = Grid(0.1, 0, 0, 255, 8)
        a, b = random(2, 3, 4), random(2, 5, 4, seed=9)
        grids = [Grid(0.2, 4, 0, 255, 8), Grid(0.05, 0, 0, 255, 8)]
        got = join([a.float(), b.float()], grids)
        assert torch.equal(got[:, :3], ((a - 4.0) * 2).clamp(0, 255)) and got.shape == (2, 8, 4)

    @pytest.mark.parametrize("name", sorted(POINTWISE))
    def test_functions_act_on_values(self, name):
        grid, x = Grid(0.05, 128, 0, 255, 8), random(50)
        inputs = [x.float()] * (2 if name == "mul" else 1)
        real = (x - 128) * torch.tensor(0.05)
        expected = POINTWISE[name](*[real] * len(inputs))
        assert torch.equal(Pointwise("f", ["x"] * len(inputs), name)(inputs, [grid] * len(inputs)), expected)

    @pytest.mark.parametrize(
        "move",
        [
            MaxPool("m", ["x"], (3, 2), (2, 2), (1, 1), (1, 1), True),
            Slice("m", ["x"], [(2, 1, None, 2), (3, 0, -1, 1)]),
            Pad("m", ["x"], (0, 1, 2, 0, 1, 1, 0, 0)),
            Reshape("m", ["x"], (3, 42)),
        ],
        ids=lambda m: m.kind,
    )
    def test_moving_codes_is_moving_values(self, move):
        grid, x = Grid(0.05, 77, 0, 255, 8), random(2, 3, 6, 7).float()
        assert torch.equal(grid.decode(move([x], [grid])), move([grid.decode(x)], [None]))

    def test_coarser_codes(self):
        step = Quantize("q", ["x"])
        step.grid = Grid(0.4, 8, 0, 15, 4)
        x = torch.arange(256.0)
        values = (np.arange(256, dtype=np.float32) - 100) * np.float32(0.05)
        expected = np.clip(np.rint(values / np.float32(0.4)) + 8, 0, 15)
        assert (step([x], [Grid(float(np.float32(0.05)), 100, 0, 255, 8)]).numpy() == expected).all()
