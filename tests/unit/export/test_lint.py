"""Bytes against counts made by hand, and the reason of every node that computes in float."""

import math

import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from supernet.elastic.supernet import SuperNet
from supernet.export.deploy import deploy
from supernet.export.kernels import spare
from supernet.export.lint import floating, ideal_bytes, without_metadata
from supernet.export.onnx import container, write
from supernet.export.profile import layers, layers_of, sizes
from supernet.export.runtime import session


def stored(net, containers):
    return {row["name"]: row["stored_bits"] for row in layers(net, containers)}


class Depthwise(nn.Module):
    """A depthwise, a grouped and a pointwise convolution; SiLU between them."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16, bias=False)
        self.bn, self.grouped = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1, groups=4, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.silu(self.bn(self.depthwise(F.relu(self.stem(x)))))
        return self.head(self.grouped(x).mean((2, 3)))


@pytest.fixture(scope="module")
def depthwise(deployed_of, awkward):
    return deployed_of(awkward(Depthwise()), (3, 8, 8), "w3a8", weight_bits=(3, 8))[1]


class TestBytes:
    def test_by_hand(self, depthwise):
        """stem and head are pinned to 8 bits; 3-bit weights sit in 4."""
        assert stored(depthwise, (2, 4, 8)) == {"stem": 8, "depthwise": 4, "grouped": 4, "head": 8}
        scales = {layer.name: len(layer.scale) for layer in layers_of(depthwise)}
        assert scales["stem"] in (1, 16) and scales["depthwise"] == 16 and scales["grouped"] in (1, 8)
        zeros = scales["stem"] + 16 // 2 + math.ceil(scales["grouped"] / 2) + scales["head"]
        codes = 16 * 3 * 9 + 16 * 9 // 2 + 8 * 4 // 2 + 3 * 8
        expected = codes + zeros + 4 * sum(scales.values()) + 4 * (16 + 16 + 3)
        assert ideal_bytes(layers_of(depthwise), stored(depthwise, (2, 4, 8))) == expected

    @pytest.mark.parametrize("containers", [(8,), (4, 8), (2, 4, 8)])
    def test_a_file_holds_the_ideal_bytes_once(self, subnets, depthwise, containers):
        """What is in the file beyond them is counted out of the file itself."""
        for net in [made for _, _, made in subnets[:3]] + [depthwise]:
            model = write(net, containers)
            names = {f"{layer.name}.{what}" for layer in layers_of(net) for what in ("weight", "bias")}
            held = [f"{name}{part}" for name in names for part in ("", ".zero")]
            held += [f"{layer.name}.weight.scale" for layer in layers_of(net)]
            found = sum(len(t.raw_data) for t in model.graph.initializer if t.name in held)
            added = [spare(op) * op.codes[:, 0].numel() for op in layers_of(net) if container(op, containers) == 8]
            assert found == ideal_bytes(layers_of(net), stored(net, containers)) + sum(added)

    def test_metadata_do_not_count(self, depthwise):
        bare = write(depthwise)
        said = write(depthwise, metadata={"who": "x" * 1000})
        assert without_metadata(said) == bare.ByteSize() == without_metadata(bare)
        assert len(said.metadata_props) == 1

    @pytest.mark.slow
    def test_a_resnet_18_is_packed_to_three_percent(self):
        """At the size that matters names and nodes weigh nothing; measured: 1.2 % at most."""
        torch.manual_seed(0)
        model, x = timm.create_model("resnet18", num_classes=10, zero_init_last=False), torch.randn(4, 3, 64, 64)
        net = SuperNet(model, x[:1], bits=(2, 3, 4, 6, 8))
        net.calibrate([x])
        for bits in (2, 3, 4, 6, 8):
            made = deploy(net.materialise(net.space.uniform(f"w{bits}a{bits}")), x)
            for containers in ((8,), (4, 8), (2, 4, 8)):
                file = write(made, containers)
                size = sizes(file.ByteSize(), without_metadata(file), made, stored(made, containers))
                assert size["bare"] <= 1.03 * size["ideal"], (bits, containers, size)
                assert size["nominal"] <= size["ideal"] * 1.001 and size["ideal"] < size["float"]


class TestFloating:
    def test_what_is_packed_is_dequantized(self, subnets):
        _, _, net = subnets[1]
        rows = floating(session(write(net, (4, 8)))[1], net, stored(net, (4, 8)))
        packed = {layer.name for layer in layers_of(net) if container(layer, (4, 8)) == 4}
        assert {row["node"] for row in rows} == packed and packed
        assert {row["kernel"] for row in rows} == {"Conv"} and all("in 4 bits" in row["why"] for row in rows)

    def test_everything_fused_needs_no_reason(self, subnets):
        _, _, net = subnets[0]
        assert floating(session(write(net))[1], net, stored(net, (8,))) == []

    def test_functions_and_tensors_without_a_site(self, depthwise, deployed_of, awkward):
        (row,) = [
            row
            for row in floating(session(write(depthwise))[1], depthwise, stored(depthwise, (8,)))
            if row["kernel"] == "Sigmoid"
        ]
        assert "silu is computed on real numbers" in row["why"]
        free = deployed_of(awkward(Depthwise()), (3, 8, 8), "w8a8", sites=False)[1]
        reasons = {row["node"]: row["why"] for row in floating(session(write(free))[1], free, stored(free, (8,)))}
        assert "no site quantizes it" in reasons["grouped"]

    def test_a_node_that_nobody_wrote(self, depthwise):
        (row,) = floating([("Conv", "something else"), ("QLinearConv", "stem")], depthwise, {})
        assert row == {"node": "something else", "kernel": "Conv", "why": "a node of the runtime's own"}


def test_names_in_the_file_are_found_in_the_runtime(depthwise):
    """The lint's only handle is the node's name, and what the runtime makes of it."""
    names = {node.name for node in write(depthwise, (4, 8)).graph.node if node.op_type == "Conv"}
    assert {name.removesuffix(".value") for name in names} == {"stem", "depthwise", "grouped"}
    assert onnx.checker.check_model(write(depthwise), full_check=True) is None
