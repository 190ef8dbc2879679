"""onnxruntime quantizes as it is told: its own file is read back, type by type."""

import copy
import json
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

import elastibit as eb
from supernet.config import PerChannel, PerTensor
from supernet.elastic.supernet import SuperNet
from supernet.export.bit_maps import write_maps
from tests.golden.record_bit_maps import network

PREFIX = {QuantType.QInt4: "INT4", QuantType.QUInt4: "UINT4", QuantType.QInt8: "INT8", QuantType.QUInt8: "UINT8"}


class Images(CalibrationDataReader):
    """Four random images."""

    def __init__(self, name, shape):
        rng = np.random.default_rng(0)
        self.left = [{name: rng.standard_normal(shape, dtype=np.float32)} for _ in range(4)]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.fixture(scope="module")
def net():
    made = SuperNet(network(), torch.zeros(1, 3, 8, 8), bits=(4, 8), first_last_bits=None)
    made.calibrate([torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))])
    return made.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The network as torch exports it, BatchNorm folded by torch."""
    return by_torch(network(), tmp_path_factory.mktemp("ort") / "net.onnx")


def by_torch(model, path):
    """Opset 21, the first with 4-bit integers."""
    with warnings.catch_warnings():  # torch announces its other exporter, which needs a package more
        warnings.simplefilter("ignore")
        x = (torch.zeros(1, 3, 8, 8),)
        torch.onnx.export(model.eval(), x, str(path), input_names=["x"], dynamo=False, opset_version=21)
    return path


def overrides(content):
    """From JSON to what onnxruntime takes; docs/bit-maps.md says the same."""
    content = json.loads(json.dumps(content))
    return {n: [e | {"quant_type": QuantType[e["quant_type"]]} for e in entries] for n, entries in content.items()}


def quantized(model, told, tmp_path):
    """Type and number of scales of every tensor that onnxruntime quantizes, by its name in the float model."""
    shape = [d.dim_value or 1 for d in onnx.load(model).graph.input[0].type.tensor_type.shape.dim]
    source, out = onnx.load(model).graph.input[0].name, tmp_path / "quantized.onnx"
    extra = {"TensorQuantOverrides": copy.deepcopy(told)}
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(model, out, Images(source, shape), quant_format=QuantFormat.QDQ, extra_options=extra, **types)
    options = SessionOptions()  # its fusions take 4-bit inputs for 8-bit ones, and refuse the file then
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_BASIC
    InferenceSession(out, options).run(None, {source: np.zeros(shape, np.float32)})
    graph = onnx.load(out).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero, scale = constants[node.input[2]], constants[node.input[1]]
            name = node.input[0].removesuffix("_quantized").removesuffix("_QuantizeLinear_Output")
            found[name] = onnx.TensorProto.DataType.Name(zero.data_type), tuple(scale.dims), zero
    return found


class TestHonoured:
    @pytest.mark.parametrize("seed", range(4))
    def test_every_tensor_has_the_type_that_the_subnet_says(self, net, exported, tmp_path, seed):
        config = net.space.sample(np.random.default_rng(seed))
        content = eb.export_bits(net, config, "ort", model=exported)
        found = quantized(exported, overrides(content), tmp_path)
        nodes = {n.name: n for n in onnx.load(exported).graph.node}
        paths = {"stem": "/stem/Conv", "fc": "/fc/Gemm"}
        for layer in net.layers:
            node = nodes[paths.get(layer.name) or f"/blocks/blocks.{layer.name[7:8]}/{layer.name[9:]}/Conv"]
            weight, data = config[layer.weight], config[layer.input]
            kind, scales, zero = found[node.input[1]]
            assert kind == f"INT{weight.bits}"
            assert scales == ((layer.outputs,) if weight.granularity == PerChannel() else ())
            assert not weight.symmetric or not onnx.numpy_helper.to_array(zero).any()
            assert found[node.input[0]][0].removeprefix("U") == f"INT{data.bits}"

    @pytest.mark.parametrize("seed", range(3))
    def test_the_float_twin(self, net, tmp_path, seed):
        """Beside a map that is about our own float file."""
        config = net.space.sample(np.random.default_rng(seed))
        (path,) = write_maps(net, config, net.materialise(config).eval(), tmp_path, ["ort"])
        content = json.loads(path.read_text())
        found = quantized(tmp_path / "float.onnx", overrides(content), tmp_path)
        for name, [entry] in content.items():
            assert found[name][0] == PREFIX[QuantType[entry["quant_type"]]], name
        assert {f"{layer.name}.weight" for layer in net.layers} < set(content)

    def test_onnxruntime_copies_the_type_through_flatten(self, net, exported):
        """So it is told of both tensors."""
        content = eb.export_bits(net, net.space.uniform("w8a4"), "ort", model=exported)
        flat, pool = content["/flat/Flatten_output_0"], content["/pool/GlobalAveragePool_output_0"]
        assert flat == pool == [{"quant_type": "QUInt4", "symmetric": False}]

    def test_unsigned_inputs_start_at_zero(self, net, exported):
        content = eb.export_bits(net, net.space.uniform("w4a4"), "ort", model=exported)
        assert content["x"] == [{"quant_type": "QInt4", "symmetric": True}]
        assert content["/relu/Relu_output_0"] == [{"quant_type": "QUInt4", "symmetric": False}]


class Fork(nn.Module):
    """Two layers read one tensor, one of them through a pool."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.pool = nn.MaxPool2d(1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.one(x) + self.two(self.pool(x))


class TestRefusals:
    def test_bits_without_a_type(self, net_of, exported):
        net = net_of(bits=(3, 4, 8))
        config = net.space.uniform("w3a8")
        with pytest.raises(ValueError, match=r"integers of 4 and 8 bits, stem\.weight has 3; loose=true writes"):
            eb.export_bits(net, config, "ort", model=exported)
        loosely = eb.export_bits(net, config, "ort", model=exported, loose=True)
        assert loosely == eb.export_bits(net, net.space.uniform("w4a8"), "ort", model=exported)

    def test_readers_that_disagree(self, tmp_path):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        net, model = (
            SuperNet(Fork(), x[:1], bits=(4, 8), first_last_bits=None),
            by_torch(Fork(), tmp_path / "fork.onnx"),
        )
        net.calibrate([x])
        config = eb.import_bits(net, {"stem": [8, 8], "one": [8, 8], "two": [8, 4]})
        with pytest.raises(ValueError, match="one and two read one tensor, as QUInt8 and as QUInt4, but"):
            eb.export_bits(net, config, "ort", model=model)
        loosely = eb.export_bits(net, config, "ort", model=model, loose=True)
        assert loosely == eb.export_bits(net, net.space.uniform("w8a8"), "ort", model=model)

    def test_a_model_of_another_network(self, net, exported):
        model = onnx.load(exported)
        del model.graph.node[:]
        with pytest.raises(ValueError, match=r"has no node for 6 layers: stem, .*export it from this network"):
            eb.export_bits(net, net.space.uniform("w8a8"), "ort", model=model)

    def test_names_that_the_rules_do_not_find(self, net, exported):
        model = onnx.load(exported)
        for node in model.graph.node:
            node.name = {"/stem/Conv": "first"}.get(node.name, node.name)
        config = net.space.uniform("w8a8", (PerTensor(), True))
        with pytest.raises(ValueError, match="no node for 1 layers: stem; "):
            eb.export_bits(net, config, "ort", model=model)
        renamed = eb.export_bits(net, config, "ort", model=model, names={"first": "stem"})
        assert renamed == eb.export_bits(net, config, "ort", model=exported)
