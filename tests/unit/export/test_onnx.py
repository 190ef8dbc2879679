"""The file: which kernels run it, that it computes the reference, and what lies in it."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.elastic.supernet import SuperNet
from supernet.export.deploy import deploy
from supernet.export.onnx import container, packed, stored, write, write_float
from supernet.export.operators import Add, Conv, GlobalAverage, Layer, Linear
from supernet.export.runtime import counts, run, session, unfused
from supernet.export.verify import operators
from supernet.formats.integer import Integer
from supernet.formats.powers import PowersOfTwo


def layers(net):
    return [op for op in net.operators() if isinstance(op, Layer)]


def same(model, net, x):
    """Whether the file gives the reference's logits, bit for bit."""
    made, _ = session(model)
    return np.array_equal(run(made, {net.source: x}), net(x).double().numpy())


class TestKernels:
    def test_everything_is_fused(self, subnets):
        """Every convolution, sum and pooling runs on integers, also below 8 bits, behind slices and padding."""
        for _, _, net in subnets:
            _, kernels = session(write(net))
            fused = {"QLinearConv": Conv, "QLinearAdd": Add, "QLinearGlobalAveragePool": GlobalAverage, "QGemm": Linear}
            for kind, op in fused.items():
                assert counts(kernels)[kind] == sum(isinstance(o, op) for o in net.operators()), kind
            assert not unfused(kernels)

    def test_it_is_the_reference_bit_for_bit(self, resnet, subnets):
        _, x = resnet
        for _, _, net in subnets:
            assert same(write(net), net, x)

    def test_packed_weights_are_computed_in_float(self, resnet, subnets):
        _, x = resnet
        for _, _, net in subnets:
            model = write(net, (2, 4, 8))
            _, kernels = session(model)
            convs = [op for op in layers(net) if isinstance(op, Conv)]
            narrow = sum(op.choice.bits <= 4 for op in convs)
            assert counts(kernels)["QLinearConv"] == len(convs) - narrow and len(unfused(kernels)) == narrow
            assert {row["verdict"] for row in operators(model, net, x)} == {"ok"}


class TestWitness:
    def test_the_onnx_reference_evaluator_agrees(self, resnet, subnets):
        """Another runtime, with nothing fused; it computes in float, so codes next to a tie may differ."""
        _, x = resnet
        for _, _, net in subnets[:4]:
            for containers in ((8,), (2, 4, 8)):
                (got,) = ReferenceEvaluator(write(net, containers)).run(None, {net.source: x[:4].numpy()})
                expected = net(x[:4]).numpy()
                assert np.abs(got - expected).max() <= 0.05 * np.abs(expected).max()

    def test_the_float_twin_is_the_float_network(self, resnet):
        net, x = resnet
        for config in (net.space.largest(), net.space.smallest()):
            twin = write_float(deploy(net.materialise(config).eval(), x))
            with net.as_subnet(config), net.floating(), torch.no_grad():
                expected = net(x)
            made, kernels = session(twin)
            assert np.allclose(run(made, {"x": x}), expected.numpy(), atol=1e-4)
            assert not [kind for kind, _ in kernels if "Quantize" in kind or kind.startswith("Q")]


class TestContent:
    def test_weights_are_integers_and_biases_int32(self, subnets):
        for _, _, net in subnets:
            model = write(net)
            for tensor in model.graph.initializer:
                if tensor.name.endswith((".weight", ".bias")):
                    assert tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.INT32), tensor.name
                elif tensor.data_type == onnx.TensorProto.FLOAT:
                    assert tensor.name.endswith(".scale") and len(tensor.dims) <= 1

    def test_bias_units_are_those_of_the_sums(self, subnets):
        """Integer kernels take scale_x scale_w for granted, whatever the file says of the bias."""
        for _, _, net in subnets:
            tensors = {t.name: numpy_helper.to_array(t) for t in write(net).graph.initializer}
            for op in layers(net):
                weight, data = tensors[f"{op.name}.weight.scale"], tensors[f"{op.inputs[0]}.scale"]
                assert np.allclose(tensors[f"{op.name}.bias.scale"], weight * data, rtol=1e-6)

    def test_packed_integers_are_the_codes(self, subnets):
        widths = set()
        for _, _, net in subnets:
            tensors = {t.name: t for t in write(net, (2, 4, 8)).graph.initializer}
            for op in layers(net):
                bits = container(op, (2, 4, 8))
                widths.add(bits)
                if bits < 8:
                    tensor = tensors[f"{op.name}.weight"]
                    assert len(tensor.raw_data) == -(-op.codes.numel() * bits // 8)
                    assert np.array_equal(numpy_helper.to_array(tensor).astype(int), op.codes.numpy())
                    zero = numpy_helper.to_array(tensors[f"{op.name}.weight.zero"]).astype(int)
                    assert np.array_equal(zero.reshape(-1), op.zero.numpy())
        assert widths == {2, 4, 8}

    def test_versions_that_other_runtimes_know(self, subnets):
        _, _, net = subnets[2]  # w2a2
        files = [write(net, containers) for containers in ((8,), (4, 8), (2, 4, 8))]
        versions = [(file.opset_import[0].version, file.ir_version) for file in files]
        assert versions[:2] == [(21, 10)] * 2
        assert versions[2][0] == 25, "two-bit integers came with opset 25"

    def test_metadata_is_kept(self, subnets):
        model = write(subnets[0][2], metadata={"elastibit.layers": json.dumps([1])})
        assert {p.key: p.value for p in model.metadata_props} == {"elastibit.layers": "[1]"}

    @pytest.mark.parametrize("bits", [2, 4])
    def test_packing(self, bits):
        values = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
        raw = packed(values[:-1], bits)
        assert raw == {2: bytes([0b00_00_11_10]), 4: bytes.fromhex("98badcfe10325406")}[bits]


class TestContainers:
    def layer(self, codes, zero, fine=1, bits=8):
        made = Linear("l", ["x"], QuantConfig(Integer(bits), PerChannel(), False), 1, 255)
        made.fine = fine
        codes, zero = torch.tensor(codes).short(), torch.tensor(zero).short()
        made.hold(codes=codes, zero=zero, scale=torch.ones(len(zero)), bias=None, weight=codes.float(), shift=None)
        return made

    @pytest.mark.parametrize(
        ("codes", "zero", "fine", "expected", "common"),
        [
            ([[-8, 7], [0, 3]], [0, -8], 4, [[-32, 28], [32, 44]], 0),
            ([[-128, 99], [-100, 127]], [-28, 0], 1, [[-100, 127], [-100, 127]], 0),
            ([[-128, 127], [-100, 127]], [-40, -40], 1, [[-128, 127], [-100, 127]], -40),
            ([[-128, 127], [-128, 127]], [-100, 100], 1, [[-128, 127], [-128, 127]], None),
        ],
        ids=["finer", "centred", "one zero-point", "one for each channel"],
    )
    def test_codes_in_int8(self, codes, zero, fine, expected, common):
        layer = self.layer(codes, zero, fine)
        held, zeros, factor = stored(layer)
        assert np.array_equal(held, expected)
        assert (held.min() >= -128) and (held.max() <= 127)
        assert zeros.tolist() == (zero if common is None else [common] * 2)
        assert np.array_equal(held - zeros[:, None], layer.centred.numpy() * factor)

    def test_the_smallest_that_fits(self):
        sizes = {bits: container(self.layer([[0]], [0], bits=bits), (2, 4, 8)) for bits in range(2, 9)}
        assert sizes == {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
        with pytest.raises(ValueError, match="l has 5-bit weights, the containers are \\[2, 4\\]"):
            container(self.layer([[0]], [0], bits=5), (4, 2))


class Branches(nn.Module):
    """Everything that the exporter knows beside residual blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.mixed = nn.Conv2d(8, 8, 1, groups=2, bias=False)
        self.average = nn.AvgPool2d(2)
        self.gate = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(16, 4, (1, 3), padding=(0, 1))

    def forward(self, x):
        x = self.pool(nn.functional.relu6(self.norm(self.stem(x))))
        a = nn.functional.hardswish(self.wide(x))
        b = self.mixed(x) * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.last(self.average(torch.cat([a, b], 1))).mean((2, 3))


class TestOtherNetworks:
    @pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
    def test_branches(self, bits, awkward, deployed_of):
        _, net, x = deployed_of(awkward(Branches()), (3, 16, 16), bits)
        model = write(net)
        rows = operators(model, net, x)
        assert [row for row in rows if row["verdict"] != "ok"] == []
        kernels = {row["name"]: row["kernel"] for row in rows}
        assert kernels["stem"] == kernels["wide"] == "QLinearConv"
        assert {row["kernel"] for row in rows} >= {"QLinearConcat", "QLinearGlobalAveragePool", "QLinearAveragePool"}
        assert np.abs(run(session(model)[0], {"x": x}) - net(x).numpy()).max() < 0.05 * float(net(x).abs().max())

    def test_linear_layers_only(self, awkward, deployed_of):
        """Biasless layers, per-tensor scales, 4 bits: QGemm with and without requantization."""
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(27, 16, bias=False),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Linear(16, 8),
            nn.ReLU(),
            nn.Linear(8, 4, bias=False),
        )
        for granularity in (PerTensor(), PerChannel()):
            subnet, net, x = deployed_of(awkward(model), (3, 3, 3), "w4a4", granularities=[granularity])
            file = write(net)
            assert counts(session(file)[1])["QGemm"] == 3
            assert same(file, net, x)
            assert (net(x).argmax(1) == subnet(x).argmax(1)).double().mean() > 0.9
            assert {row["verdict"] for row in operators(write(net, (4, 8)), net, x)} == {"ok"}

    def test_per_tensor_weights_without_a_norm(self, deployed_of):
        convs = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False)]
        model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(16, 2))
        _, net, x = deployed_of(model, (3, 6, 6), granularities=[PerTensor()])
        file = write(net)
        assert counts(session(file)[1])["QLinearConv"] == 2 and same(file, net, x)
        assert all(len(op.scale) == 1 for op in layers(net))

    def test_another_number_format(self, residual):
        """Powers of two fit an int8 as they are."""
        net = SuperNet(residual(), torch.randn(1, 3, 8, 8), bits=[8], formats=[PowersOfTwo(4)]).eval()
        x = torch.randn(16, 3, 8, 8)
        net.calibrate([x])
        pick = dict(net.space.largest())
        for name in pick:
            if name.endswith(".weight"):
                choices = net.space.dimensions[net.space.position[name]].choices
                pick[name] = next((c for c in choices if isinstance(c.format, PowersOfTwo)), pick[name])
        made = deploy(net.materialise(net.space.indices(pick)[0]), x)
        inner = layers(made)[1]
        assert set(inner.codes.abs().flatten().tolist()) <= {0, 1, 2, 4, 8, 16, 32, 64}
        assert same(write(made), made, x) and not unfused(session(write(made))[1])

    def test_a_network_whose_last_tensor_sits_on_a_grid(self, deployed_of, awkward):
        """A network that ends in a Stage gives codes; the file dequantizes them."""
        from supernet.elastic.stage import Stage

        block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        _, net, x = deployed_of(nn.Sequential(nn.Conv2d(3, 3, 1), Stage(block)), (3, 4, 4))
        assert net.grids[net.result] is not None
        assert np.array_equal(run(session(write(net))[0], {net.source: x}), net(x).double().numpy())
