"""The integer network against a plain statement of its arithmetic, in numpy and Python integers, bit by bit."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from supernet.backbones.cifar_resnet import CifarResNet
from supernet.calibration.batchnorm import recalibrate
from supernet.elastic.supernet import SuperNet
from supernet.export.deploy import deploy
from supernet.export.graph import Deployed, Op
from supernet.export.integer import integer
from supernet.export.integer_operators import INTEGERS, IntegerLayer
from supernet.export.operators import Add


def scaled(total, ratio):
    """floor(total b / 2^c + 1/2), b of 31 bits, from one ratio; by floor division instead of a shift."""
    mantissa, exponent = math.frexp(ratio)
    b, c = math.floor(mantissa * 2**31 + 0.5), 31 - exponent
    return (2 * total * b + 2**c) // 2 ** (c + 1)


def sums(op, x):
    """Exact sums of a layer, in float64 that never leaves the integers it can hold."""
    w = torch.from_numpy((op.codes.numpy().astype(np.float64).T - op.zero.numpy()).T * op.fine)
    x = torch.from_numpy(x.astype(np.float64))
    if op.kind == "Linear":
        total = x @ w.T
    else:
        top, left, bottom, right = op.padding
        total = F.conv2d(F.pad(x, (left, right, top, bottom)), w, None, op.stride, 0, op.dilation, op.groups)
    assert total.abs().max() < 2**52
    total = np.moveaxis(total.numpy().astype(np.int64), 1, 0)
    bias = np.zeros(len(total), np.int64) if op.bias is None else op.bias.numpy()
    return total + bias.reshape(-1, *[1] * (total.ndim - 1))


def plain(deployed, images, bits=16):
    """Codes by name and the logits' scale, as docs/export-integer.md says."""
    kept, grids, scale = {}, deployed.grids, None
    for op in deployed.operators():
        grid, sources = op.grid, [grids[n] for n in op.inputs]
        if op.inputs == (deployed.source,):
            q = np.rint(images.numpy() / np.float32(grid.scale)).astype(np.int64) + grid.zero
            kept[op.name] = np.clip(q, grid.low, grid.high)
            continue
        x = [kept[n] - g.zero if g else kept[n] for n, g in zip(op.inputs, sources, strict=True)]
        if op.kind in ("Slice", "Pad", "Reshape"):
            kept[op.name] = op([torch.from_numpy(kept[op.inputs[0]])], sources).numpy()
            continue
        if op.kind in ("Conv", "Linear"):
            unit = np.broadcast_to(op.scale.double().numpy() * sources[0].scale / op.fine, len(op.codes))
            total, own = sums(op, x[0]), grid is None and (unit == unit[0]).all()
            scale = grid.scale if grid else unit[0] if own else unit.max() * op.largest / 2**29
            rows = zip(total, unit, strict=True)
            total = np.stack([t if own else scaled(t, float(u / scale)) for t, u in rows], 1)
        elif op.kind == "Add":
            reach = sum(g.reach * g.scale for g in sources)
            k = next(k for k in range(-40, 40) if reach / (grid.scale * 2.0**k) <= 2 ** (bits - 1) - 2)
            meet = grid.scale * 2.0**k
            total = scaled(scaled(x[0], sources[0].scale / meet) + scaled(x[1], sources[1].scale / meet), 2.0**k)
        elif op.kind == "GlobalAverage":
            pixels = x[0].shape[2] * x[0].shape[3]
            total = scaled(x[0].sum((2, 3), keepdims=True), sources[0].scale / pixels / grid.scale)
        else:
            assert op.kind == "Quantize"
            total = scaled(x[0], sources[0].scale / grid.scale)
        kept[op.name] = np.clip(total + grid.zero, grid.low, grid.high) if grid else total
    return kept, scale


@pytest.fixture(scope="module")
def digits():
    """A ResNet-8 that has learned handwritten digits a little, elastic in bits, and 1,000 images of them."""
    torch.manual_seed(0)
    data = load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    y = torch.from_numpy(data.target)
    model = CifarResNet(8, in_channels=1, channels=(4, 8, 12))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(60):
        part = torch.arange(64 * step, 64 * step + 64) % 797 + 1000
        loss = F.cross_entropy(model(x[part]), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net = SuperNet(model.eval(), x[:1], bits=(2, 3, 4, 8)).eval()
    net.calibrate([x[1000:1128]])
    return net, x[:1000], y[:1000], x[1000:1512]


@pytest.fixture(scope="module")
def trained(digits):
    """Makes a subnet of it with its deployed form."""
    net, _, labels, rest = digits

    def make(bits):
        subnet = net.materialise(net.space.uniform(bits))
        recalibrate(subnet, [(rest, labels[:512])])
        return subnet.eval(), deploy(subnet.eval(), rest)

    return make


@pytest.mark.parametrize(("bits", "n"), [("w8a8", 200), ("w4a4", 1000), ("w2a3", 200)])
def test_logits_of_images_are_those_of_the_plain_statement(digits, trained, bits, n):
    images, labels = digits[1][:n], digits[2][:n]
    _, deployed = trained(bits)
    network = integer(deployed)
    expected, scale = plain(deployed, images)
    logits = network(images)
    assert torch.equal(logits.long(), torch.from_numpy(expected[deployed.result]))
    assert network.scale == pytest.approx(scale, rel=1e-15)
    right = [(who(images).argmax(1) == labels).double().mean() for who in (network, deployed)]
    assert right[0] > 0.6 and abs(right[0] - right[1]) < 0.03


def test_every_tensor_of_every_subnet_is_that_of_the_plain_statement(resnet, subnets):
    """Gains of 0 and below, layers with and without bias, cut stages, any mixture of bits, forms and symmetry."""
    _, x = resnet
    depths = set()
    for config, _, deployed in subnets:
        expected, _ = plain(deployed, x)
        for name, tensor in integer(deployed).tensors(x).items():
            if name != deployed.source:
                assert torch.equal(tensor.long(), torch.from_numpy(expected[name])), f"{name} of {config.id}"
        depths.add(len(deployed.operators()))
    assert len(depths) > 1


def test_totals_below_zero_are_among_them(subnets, resnet):
    _, deployed = subnets[0][1:]
    network, x = integer(deployed), resnet[1]
    kept = network.tensors(x)
    layers = [op for op in network.operators() if isinstance(op, IntegerLayer) and op.grid.low < op.grid.zero]
    assert layers and all((kept[op.name].int() < op.grid.zero).any() for op in layers)


def test_there_is_no_real_number_inside(subnets, resnet):
    network = integer(subnets[3][2])
    kept = network.tensors(resnet[1])
    kept.pop(network.source)
    assert {t.dtype for t in kept.values()} <= set(INTEGERS)
    constants = [t for t in [*network.buffers(), *network.parameters()] if t.is_floating_point()]
    inside = {id(t) for op in network.operators() if isinstance(op, IntegerLayer) for t in op.layer.buffers()}
    assert all(id(t) in inside for t in constants)  # of the layers that they were made of


def test_a_real_number_inside_is_noticed(subnets, resnet):
    network = integer(subnets[0][2])
    layer = next(op for op in network.operators() if isinstance(op, IntegerLayer))
    layer.forward = lambda inputs, grids: IntegerLayer.forward(layer, inputs, grids).float()
    with pytest.raises(AssertionError, match=f"{layer.name} sees real numbers"):
        network(resnet[1])


def sqnr(reference, other):
    return 10 * float(torch.log10(reference.pow(2).sum() / (reference - other).pow(2).sum()))


def test_sums_need_their_16_bits(digits, trained):
    """Section 3 of HAWQ-V3: fewer bits of the residual are what hurts."""
    images = digits[1][:200]
    _, deployed = trained("w8a8")
    reference = deployed(images)
    made = {bits: integer(deployed, bits) for bits in (16, 8, 4)}
    distance = {bits: sqnr(reference, net(images) * net.scale) for bits, net in made.items()}
    assert distance[16] > distance[8] + 5 > distance[4] + 10, distance


def test_classes_have_one_scale(trained, digits):
    """Per-channel weights of the last layer: its sums alone would not compare."""
    images = digits[1][:200]
    _, deployed = trained("w8a8")
    network, last = integer(deployed), deployed.operators()[-1]
    assert len(last.scale.unique()) > 1
    assert sqnr(deployed(images), network(images) * network.scale) > 25
    own = network.operators()[-1]
    kept = network.tensors(images)
    total = own.total([kept[own.inputs[0]].int()], [network.grids[own.inputs[0]].zero])
    real = total.double() * last.scale.double() * network.grids[own.inputs[0]].scale / last.fine
    assert (network(images).double() * network.scale - real).abs().max() <= 0.51 * network.scale


class Strange(Op):
    """An operator that the integer form does not know."""

    def compute(self, *values):
        return values[0]


def test_all_operators_without_an_integer_form_are_named(subnets, resnet):
    deployed = subnets[0][2]
    ops = list(deployed.operators())
    first = next(i for i, op in enumerate(ops) if isinstance(op, Add))
    strange = Strange("softmax", [ops[first].name])
    after = Add("sum", [ops[first].name, "softmax"])
    broken = Deployed([*ops, strange, after], deployed.source, "sum", resnet[1][:1], 0, (1,))
    with pytest.raises(
        ValueError, match=r"softmax \(Strange\) has no integer form; sum \(Add\) reads real numbers"
    ) as e:
        integer(broken)
    assert "profile=int8" in str(e.value)


@pytest.mark.parametrize("bits", [3, 17])
def test_bits_of_sums_are_checked(subnets, bits):
    with pytest.raises(ValueError, match=r"4\.\.16"):
        integer(subnets[0][2], bits)
