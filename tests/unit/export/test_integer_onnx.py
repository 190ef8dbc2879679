"""Files of integer operators: onnxruntime gives the executor's integers, bit by bit."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import nn

from supernet.config import PerChannel, QuantConfig
from supernet.export.dyadic import Dyadic
from supernet.export.graph import Deployed, Grid
from supernet.export.integer import integer
from supernet.export.integer_onnx import limits, real_nodes, weights, write_integer
from supernet.export.integer_operators import IntegerLayer
from supernet.export.operators import (
    Add,
    AveragePool,
    Concat,
    Conv,
    GlobalAverage,
    Linear,
    Pointwise,
    Quantize,
    Reshape,
)
from supernet.export.runtime import run, session
from supernet.formats.integer import Integer


def random(*shape, low=0, high=256, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def equal(network, x):
    """Whether the file computes the network, every logit of it."""
    made, _ = session(write_integer(network))
    expected = network(x)
    assert len(expected.unique()) > 2, "constant outputs prove nothing"
    return np.array_equal(run(made, {network.source: x}), expected.numpy())


def network_of(ops, shape, result, n=3):
    """An integer network of operators behind an entrance, and real images."""
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(7))
    entrance = Quantize("in", ["x"])
    entrance.grid = Grid(0.02, 117, 0, 255, 8)
    shape = Deployed([entrance, *ops], "x", result, x[:1], 0, ()).outcome(x).shape[1:]
    return integer(Deployed([entrance, *ops], "x", result, x[:1], 0, shape)), x


def layer(kind, name, source, shape, *rest, reach=138, zeros=(-9, 9), low=-128, high=128, grid=None):
    made = kind(name, [source], QuantConfig(Integer(8), PerChannel(), False), 1, reach, *rest)
    k = shape[0]
    made.hold(
        codes=random(*shape, low=low, high=high, seed=1).short(),
        zero=random(k, low=zeros[0], high=zeros[1], seed=2).short(),
        scale=torch.rand(k, generator=torch.Generator().manual_seed(3)) * 0.01 + 0.001,
        bias=random(k, low=-5000, high=5000, seed=4),
        weight=torch.zeros(shape),
        shift=None,
    )
    made.grid = grid
    return made


def test_files_of_subnets_give_the_same_integers(subnets, resnet):
    """Negative and zero gains, all mixtures, cut stages; the only node with real numbers quantizes the image."""
    x = resnet[1]
    for _, _, deployed in subnets:
        network = integer(deployed)
        model = write_integer(network)
        made, kernels = session(model)
        assert np.array_equal(run(made, {network.source: x}), network(x).numpy())
        assert [kind for kind, _ in kernels].count("QuantizeLinear") == len(real_nodes(model)) == 1
        assert not any("Dequantize" in kind or "Float" in kind for kind, _ in kernels)


def test_another_runtime_gives_them_too(subnets, resnet):
    """The onnx reference evaluator shares no kernel with onnxruntime."""
    x, network = resnet[1][:4], integer(subnets[3][2])
    made = ReferenceEvaluator(write_integer(network))
    assert np.array_equal(made.run(None, {network.source: x.numpy()})[0], network(x).numpy())


GRID = Grid(0.5, 120, 0, 255, 8)


@pytest.mark.parametrize(
    ("groups", "dilation", "padding", "stride"),
    [
        (1, (1, 1), (1, 1, 1, 1), (1, 1)),
        (2, (1, 1), (1, 0, 2, 1), (2, 1)),
        (4, (1, 1), (0, 0, 0, 0), (1, 1)),
        (1, (2, 2), (2, 2, 2, 2), (1, 2)),
    ],
)
@pytest.mark.parametrize("zeros", [(0, 1), (-128, -60), (-128, 128)])
def test_convolutions(groups, dilation, padding, stride, zeros):
    """Grouped, depthwise, dilated, padded unevenly; weights that fit one zero-point, and those that do not."""
    shape = (8, 4 // groups, 3, 3)
    conv = layer(Conv, "conv", "in", shape, stride, padding, dilation, groups, zeros=zeros, grid=GRID)
    network, x = network_of([conv], (4, 9, 8), "conv")
    assert equal(network, x)


def test_weights_of_a_wide_spread_are_two_tensors():
    conv = layer(Conv, "c", "in", (4, 2, 3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1, zeros=(-128, 128))
    parts = weights(IntegerLayer(conv, GRID, None))
    assert len(parts) == 2 and all(w.min() >= 0 and w.max() <= 255 for w, _ in parts)
    assert np.array_equal(sum(w - zero for w, zero in parts), conv.centred.numpy())


@pytest.mark.parametrize("grid", [None, GRID], ids=["totals", "codes"])
def test_results_of_every_kind(grid):
    """What a network may end in, with a grid and without one."""
    conv = layer(Conv, "conv", "in", (6, 4, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, grid=Grid(0.4, 99, 99, 255, 8))
    ends = [
        GlobalAverage("end", ["conv"]),
        Add("end", ["conv", "conv"]),
        Concat("end", ["conv", "in"], 1),
        AveragePool("end", ["in"], (3, 2), (2, 2), (1, 1), True, True),
        AveragePool("end", ["in"], (3, 3), (2, 2), (1, 1), True, False),
        Pointwise("end", ["conv", "conv"], "mul"),
        layer(Conv, "end", "conv", (5, 6, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, reach=156),
    ]
    for end in ends:
        end.grid = grid
        network, x = network_of([conv, end], (4, 9, 8), "end")
        assert equal(network, x), end.kind


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("counting", [False, True])
def test_average_pools_are_those_of_torch(ceil, counting):
    pool = AveragePool("end", ["in"], (3, 2), (2, 2), (1, 1), ceil, counting)
    pool.grid = Grid(0.02, 117, 0, 255, 8)
    network, x = network_of([pool], (2, 8, 9), "end")
    value = (network.tensors(x)["in"].double() - 117) * 0.02
    expected = F.avg_pool2d(value, (3, 2), (2, 2), (1, 1), ceil, counting)
    assert (network(x) * 0.02 - expected).abs().max() <= 0.0101
    assert equal(network, x)


@pytest.mark.parametrize("function", ["sigmoid", "silu", "hardswish", "gelu", "tanh", "relu6"])
def test_functions_are_tables(function):
    """Each of 256 codes leads to the code that the deployed network has for it."""
    op = Pointwise("end", ["in"], function)
    op.grid = Grid(0.013, 60, 10, 250, 8)
    network, x = network_of([op], (4, 40, 40), "end")
    entrance = Quantize("in", ["x"])
    entrance.grid = network.grids["in"]
    deployed = Deployed([entrance, op], "x", "end", x[:1], 0, ())
    assert torch.equal(network.tensors(x)["end"].float(), deployed.tensors(x)["end"])
    assert equal(network, x)


@pytest.mark.parametrize("scale", [0.0001, 0.004, 0.02, 0.3, 4.0])
def test_codes_change_their_grid(scale):
    """Factors below and above 1."""
    op = Quantize("end", ["in"])
    op.grid = Grid(scale, 130, 122, 137, 4)
    network, x = network_of([op], (4, 40, 40), "end")
    value = (network.tensors(x)["in"].double() - 117) * 0.02
    assert (
        network.tensors(x)["end"] == (torch.floor(value / scale + 0.5) + 130).clamp(122, 137)
    ).double().mean() > 0.99
    made, _ = session(write_integer(network))
    assert np.array_equal(run(made, {"x": x}), network(x).numpy())


@pytest.mark.parametrize("bits", [4, 7, 16])
def test_sums_in_fewer_bits(bits, subnets, resnet):
    network = integer(subnets[0][2], bits)
    made, _ = session(write_integer(network))
    assert np.array_equal(run(made, {network.source: resnet[1]}), network(resnet[1]).numpy())


def test_clamping_totals_is_clamping_codes(rng):
    """By brute force over all totals, for random factors and grids."""
    totals, seen = torch.arange(-3000, 3001), 0
    for _ in range(200):
        zero, low, high = (int(v) for v in rng.integers(0, 256, 3))
        grid = Grid(1.0, zero, min(low, high), max(low, high), 8)
        factor = Dyadic.of(float(np.exp2(rng.uniform(-12, 1))))
        span = limits(factor, grid, 3000)
        if span is not None:
            seen += 1
            expected = (factor(totals) + zero).clamp(grid.low, grid.high)
            assert torch.equal(factor(totals.clamp(*span)) + zero, expected)
        else:
            assert factor.b > 1 << factor.c or not grid.low <= zero <= grid.high
    assert seen > 30


class Mobile(nn.Module):
    """Depthwise convolution, hardswish, a gate, a joined branch, a max-pool: what MobileNetV3 and Inception have."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.act = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Hardswish()
        self.gate, self.side = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.pool, self.last = nn.MaxPool2d(3, 2, 1), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu6(self.norm(self.stem(x)))
        y = self.act(self.deep(x))
        y = y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        z = torch.cat([y, self.side(x)], 1)
        return self.last(torch.flatten(F.adaptive_avg_pool2d(self.pool(z), 1), 1))


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_a_network_of_many_operators(awkward, deployed_of, bits):
    torch.manual_seed(0)
    _, deployed, x = deployed_of(awkward(Mobile()), (3, 12, 12), bits)
    network = integer(deployed)
    kinds = {op.kind for op in network.operators()}
    assert {"Pointwise", "Concat", "MaxPool", "GlobalAverage", "Conv"} <= kinds
    assert equal(network, x)
    reference = deployed(x)
    noise = (reference - network(x).double() * network.scale).pow(2).sum() / reference.pow(2).sum()
    assert noise < 0.02


def test_the_file_says_what_its_logits_are_worth(subnets):
    network = integer(subnets[0][2])
    model = write_integer(network, {"elastibit.profile": "integer"})
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert float(found["elastibit.logit_scale"]) == network.scale and found["elastibit.profile"] == "integer"
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.INT32


def test_linear_layers_and_shapes():
    linear = layer(Linear, "end", "flat", (7, 48), zeros=(-128, 128))
    network, x = network_of([Reshape("flat", ["in"], (48,)), linear], (3, 4, 4), "end", n=20)
    assert equal(network, x)
