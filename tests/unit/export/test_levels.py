"""Products with packed weights: what onnxruntime computes by default stands beside what the file says."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from supernet.export.bundle import _default, _latency
from supernet.export.deploy import deploy
from supernet.export.onnx import write
from supernet.export.profile import layers
from supernet.export.runtime import latency, session
from supernet.export.verify import verify


def weight_only(model, name):
    """The layer `name` of a written file as a product that onnxruntime fuses with its packed weights.

    A Clip that clips nothing keeps it from seeing that the input was quantized.
    """
    nodes = {node.output[0]: node for node in model.graph.node}
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm" and node.input[1] == f"{name}.weight.value")
    (weight,) = [t for t in model.graph.initializer if t.name == f"{name}.weight"]
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(weight).T), weight.name))
    assert not numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == f"{name}.weight.zero")).any()
    del nodes[f"{name}.weight.value"].attribute[:], nodes[f"{name}.weight.value"].input[2:]
    nodes[f"{name}.weight.value"].attribute.append(helper.make_attribute("axis", 1))
    ends = [numpy_helper.from_array(np.float32(v), f"{name}.{k}") for k, v in (("least", -1e30), ("most", 1e30))]
    model.graph.initializer.extend(ends)
    at = list(model.graph.node).index(gemm)
    made = [
        helper.make_node("Clip", [gemm.input[0], f"{name}.least", f"{name}.most"], ["wide"]),
        helper.make_node("MatMul", ["wide", gemm.input[1]], [gemm.output[0]], name="product"),
    ]
    rest = list(model.graph.node)
    rest[at : at + 1] = made
    del model.graph.node[:]
    model.graph.node.extend(rest)
    onnx.checker.check_model(model, full_check=True)
    return model


def test_both_levels_are_reported(supernet_of):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 5, bias=False))
    net, x = supernet_of(model, (64,), weight_bits=(4,), input_bits=(8,), symmetries=(True,), first_last_bits=None)
    subnet = net.materialise(net.space.largest()).eval()
    made = deploy(subnet, x)
    labels = made(x).argmax(1)
    plain, file = write(made, (4, 8)), weight_only(write(made, (4, 8)), "4")
    assert "MatMulNBits" in {kind for kind, _ in session(file)[1]}
    proof = verify(file, made, [(x, labels)], subnet)
    assert proof["passed"] and proof["agreement"] == 1.0
    assert 0.8 < proof["default_agreement"] <= 1.0 and set(proof["accuracy"]) >= {"file", "file_default"}
    assert _default(proof)[0][1].endswith(f"accuracy {proof['accuracy']['file_default']:.2%}")
    exact, default = (session(file, exact=exact)[0].run(None, {made.source: x.numpy()})[0] for exact in (True, False))
    assert np.abs(exact - made(x).numpy()).max() < np.abs(default - made(x).numpy()).max()
    times = latency({"file": file, "float": plain}, made.example, 20)
    assert set(times) == {"file", "file_default", "float"}
    speed = {f"{name}_ms": ms for name, ms in times.items()} | {"speedup": 1.0, "rounds": 20}
    assert "with the runtime's defaults" in _latency(speed)[0][1]


def test_where_they_do_not_matter_nothing_is_said(subnets, resnet):
    _, x = resnet
    _, subnet, made = subnets[1]
    proof = verify(write(made, (4, 8)), made, [(x, torch.arange(32) % 5)], subnet)
    assert proof["default_agreement"] is None and "file_default" not in proof["accuracy"] and _default(proof) == []


@pytest.mark.parametrize(
    ("bits", "expected"), [(2, (2, 4, 8)), (3, (4, 4, 8)), (5, (8, 8, 8)), (6, (8, 8, 8)), (7, (8, 8, 8))]
)
def test_bits_without_a_container_sit_in_the_next(supernet_of, bits, expected):
    """And the file says how many they truly are."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    net, x = supernet_of(model, (3, 6, 6), weight_bits=(bits,), input_bits=(8,))
    made = deploy(net.materialise(net.space.largest()).eval(), x)
    for containers, wanted in zip(((2, 4, 8), (4, 8), (8,)), expected, strict=True):
        row = layers(made, containers)[1]
        assert (row["weight_bits"], row["stored_bits"]) == (bits, wanted)
        assert (row["nominal_bytes"], row["stored_bytes"]) == (144 * bits // 8, 144 * wanted // 8)
        (tensor,) = [t for t in write(made, containers).graph.initializer if t.name == "2.weight"]
        assert len(tensor.raw_data) == row["stored_bytes"]
