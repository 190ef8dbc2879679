"""Every rule of the table, what fits nothing or two things, and which layer reads what a module writes."""

import pytest
import torch
from torch import nn

from supernet.config import Stated
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet
from supernet.export.assignments.names import Names, onnx_path
from tests.golden.record_bit_maps import Block


class Twins(nn.Module):
    """Two layers that torch.fx would name alike."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
        self.a_0 = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        return self.a_0(self.a(x))


class TestRules:
    @pytest.mark.parametrize(
        "foreign",
        [
            "blocks.0.conv1",
            "module.blocks.0.conv1",
            "_orig_mod.module.blocks.0.conv1.weight",
            "model.blocks.0.conv1.weight_quantizer",
            "blocks.0.conv1.input_quantizer",
            "blocks.0.conv1.quant_recipe",
            "/blocks/blocks.0/conv1/Conv",
            "/blocks/blocks.0/conv1/Conv_output_0",
            "blocks_0_conv1",
            "blocks_0_conv1_bn",
        ],
    )
    def test_one_layer_by_many_names(self, net, foreign):
        assert Names(net).layer(foreign) == "blocks.0.conv1"

    @pytest.mark.parametrize("foreign", ["conv1", "blocks.0", "blocks.0.conv", "relu", ""])
    def test_no_layer(self, net, foreign):
        assert Names(net).layer(foreign) is None

    def test_paths_that_torch_writes(self, net):
        """Names of nodes in the file of torch's own exporter, for every layer inside nested containers."""
        assert onnx_path("/layer1/layer1.0/downsample/downsample.0/Conv_output_0") == "layer1.0.downsample.0"
        assert onnx_path("/a/b/Gemm") == "a.b"


class TestWhatDoesNotFit:
    def test_unknown_names_are_listed_with_the_way_out(self, net):
        with pytest.raises(ValueError, match=r"no layer here is called nope, neither; there are stem, .*names=\{"):
            Names(net).layers(["stem", "nope", "neither"])

    def test_they_may_be_renamed_or_left_out(self, net):
        names = Names(net, {"nope": "fc", "neither": None})
        assert names.layers(["stem", "nope", "neither"]) == {"stem": "stem", "nope": "fc"}

    def test_renaming_to_nothing_is_refused(self, net):
        with pytest.raises(ValueError, match=r"names= points to nowhere, which is no layer here; there are stem"):
            Names(net, {"nope": "nowhere"})
        with pytest.raises(ValueError, match=r"a tensor where a layer is meant: nope = fc\.input"):
            Names(net, {"nope": "fc.input"}).layers(["nope"])

    def test_two_names_for_one_layer(self, net):
        with pytest.raises(ValueError, match=r"several names mean one layer: fc = fc, module\.fc = fc"):
            Names(net).layers(["fc", "module.fc"])

    def test_one_name_for_two_layers(self):
        names = Names(SuperNet(Twins(), torch.zeros(1, 4)))
        assert names.layer("a.0.0") == "a.0.0" and names.layer("a_0.0") == "a_0.0"
        with pytest.raises(ValueError, match=r"a_0_0 may mean a\.0\.0 or a_0\.0; say what they mean"):
            names.layer("a_0_0")


class TestWriters:
    def test_a_layer_reads_what_the_module_before_it_writes(self, net):
        said = {name: Stated(bits) for bits, name in enumerate(["relu", "blocks.0.relu1", "blocks_0_relu2", "pool"], 2)}
        assert {name: stated.bits for name, stated in Names(net).inputs(said).items()} == {
            "blocks.0.conv1.input": 2,
            "blocks.0.conv2.input": 3,
            "blocks.1.conv1.input": 4,
            "fc.input": 5,  # through Flatten
        }

    def test_it_does_not_read_what_stands_before_an_operator(self, net):
        assert Names(net).inputs({"stem": Stated(2), "bn": Stated(3), "blocks.0.bn2": Stated(4)}) == {}

    def test_the_input_by_its_name_here_or_by_what_it_is_said_to_be(self, net):
        assert Names(net).inputs({"x_activation_holder_quantizer": Stated(3)}) == {"stem.input": Stated(3)}
        for meant in ("stem.input", "stem"):
            assert Names(net, {"t.1": meant}).inputs({"t.1": Stated(3)}) == {"stem.input": Stated(3)}
        assert Names(net, {"relu": None}).inputs({"relu": Stated(3)}) == {}

    def test_inside_stages_and_behind_a_folded_norm(self):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), Stage(Block(4), Block(4), min_depth=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        )
        names = Names(SuperNet(model, torch.zeros(1, 3, 8, 8)))
        said = names.inputs(
            {"1.1.relu1": Stated(3), "1.0.relu2": Stated(4), "/2/BatchNormalization_output_0": Stated(5)}
        )
        assert said == {"1.1.conv2.input": Stated(3), "1.1.conv1.input": Stated(4), "3.input": Stated(5)}
