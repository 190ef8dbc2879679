"""AIMET and MCT as recorded, HAWQ by its published names, and our own plain form."""

import pytest

import elastibit as eb
from supernet.config import PerChannel, PerTensor, Stated
from supernet.export.assignments.aimet import Aimet
from supernet.export.assignments.hawq import Hawq
from supernet.export.assignments.mct import Mct
from supernet.export.assignments.names import Names
from supernet.export.assignments.plain import Plain

FILES = ("0.6.1 net.encodings", "0.6.1 net_torch.encodings", "1.0.0 net.encodings", "2.0.0 net.encodings")
# As tests/golden/record_bit_maps.py has set them: the weight, and what the layer reads.
SIMULATED = {
    "stem": (8, 8),
    "blocks.0.conv1": (4, 8),
    "blocks.0.conv2": (4, 4),
    "blocks.1.conv1": (4, 4),
    "blocks.1.conv2": (2, 8),
    "fc": (8, 8),
}


class TestAimet:
    @pytest.mark.parametrize("file", [*FILES, "2.1.0 net.encodings"])
    def test_bits_of_every_version(self, net, recorded, bits_of, file):
        content = recorded["aimet"]["encodings"][file]
        config = eb.import_bits(net, content, default="w8a8", loose=True)
        assert bits_of(net, config) == SIMULATED

    @pytest.mark.parametrize("file", FILES)
    def test_granularity_and_symmetry(self, net, recorded, file):
        said = Aimet().read(recorded["aimet"]["encodings"][file], Names(net))
        assert {said[n] for n in said if n.endswith(".weight")} == {Stated(b, PerChannel(), True) for b in (2, 4, 8)}
        assert {said[n] for n in said if n.endswith(".input")} == {Stated(b, PerTensor(), False) for b in (4, 8)}

    def test_the_networks_input_has_a_name_that_only_the_user_knows(self, net_of, recorded):
        content = recorded["aimet"]["encodings"]["1.0.0 net.encodings"]
        net = net_of(bits=(2, 4, 8), symmetries=[True, False])
        with pytest.raises(ValueError, match=r"says nothing of 1 tensors: stem\.input; give bits"):
            eb.import_bits(net, content)
        assert eb.import_bits(net, content, names={"t.1": "stem.input"})["stem.input"].bits == 8
        pinned = net_of(bits=(2, 4, 8), first_last_bits=8)
        assert eb.import_bits(pinned, content)["stem.input"].bits == 8

    def test_floats_and_biases_say_nothing(self, net):
        entry = {"bitwidth": 16, "dtype": "float"}
        content = {"param_encodings": {"fc.weight": [entry], "fc.bias": [{"bitwidth": 32, "dtype": "int"}]}}
        assert Aimet().recognises(content) and Aimet().read(content, Names(net)) == {}

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ({"param_encodings": {"nope.weight": [{"bitwidth": 4}]}}, "no layer here is called nope.weight"),
            ({"param_encodings": {"fc.weight": [{"scale": 1.0}]}}, "whole numbers from 1 on, fc.weight has None"),
            ({"param_encodings": [{"name": "fc.weight", "bw": 4, "enc_type": "LPBQ"}]}, "fc.weight is LPBQ in the map"),
            ({"encodings": [{"name": "fc.weight", "output_dtype": "int"}]}, "fc.weight has 'int'"),
        ],
    )
    def test_what_has_no_meaning_here(self, net, content, said):
        with pytest.raises(ValueError, match=said):
            Aimet().read(content, Names(net))


class TestMct:
    def test_bits_by_node(self, net, recorded, bits_of):
        """60 % of the bytes: MCT kept the first and last layer at 8 bits."""
        config = eb.import_bits(net, recorded["mct"]["nodes"])
        inner = {f"blocks.{i}.conv{k}": (4, 8) for i in (0, 1) for k in (1, 2)}
        assert bits_of(net, config) == {"stem": (8, 8), "fc": (8, 8)} | inner

    def test_indices_with_their_candidates(self, net, recorded):
        nodes, indices = recorded["mct"]["nodes"], recorded["mct"]["mixed_precision_cfg"]
        layers = [name for name, node in nodes.items() if "weights" in node]
        candidates = {name: [{"weights": bits, "activations": 32} for bits in (8, 4, 2)] for name in layers}
        content = {"mixed_precision_cfg": indices, "candidates": candidates}
        by_node = {name: nodes[name] for name in layers}
        assert Mct().read(content, Names(net)) == Mct().read(by_node, Names(net))

    def test_floats_say_nothing(self, net):
        nodes = {"fc": {"weights": 32, "inputs": 8}, "relu": {"activations": 32}}
        assert Mct().read(nodes, Names(net)) == {"fc.input": Stated(8)}

    def test_what_a_layer_reads_may_be_said_by_hand(self, net):
        said = Mct().read({"fc": {"weights": 4, "inputs": 3}, "pool": {"activations": 8}}, Names(net))
        assert said == {"fc.weight": Stated(4), "fc.input": Stated(3)}

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ({"mixed_precision_cfg": [0, 1]}, "has 2 indices and needs as many lists of candidates.* got none"),
            ({"mixed_precision_cfg": [0], "candidates": {}}, "got 0"),
            ({"mixed_precision_cfg": [2], "candidates": {"fc": [{"weights": 8}]}}, "beyond the candidates of fc"),
            ({"nope": {"weights": 4}}, "no layer here is called nope"),
            ({"fc": {"weights": "four"}}, "fc has 'four'"),
        ],
    )
    def test_what_has_no_meaning_here(self, net, content, said):
        assert Mct().recognises(content)
        with pytest.raises(ValueError, match=said):
            Mct().read(content, Names(net))


class TestHawq:
    def test_layers_by_our_names_are_tied(self, net, bits_of):
        config = eb.import_bits(net, dict.fromkeys(Names(net).kinds, 4) | {"fc": 8})
        assert bits_of(net, config) == dict.fromkeys(Names(net).kinds, (4, 4)) | {"fc": (8, 8)}

    def test_one_tensor_may_be_named(self, net):
        said = Hawq().read({"last_act": 3}, Names(net, {"last_act": "fc.input"}))
        assert said == {"fc.input": Stated(3, PerTensor(), True)}
        assert Hawq().read({"last_act": 3}, Names(net, {"last_act": None})) == {}

    @pytest.mark.parametrize("name", ["nope", "stage1.unit1.quant_convbn1", "stage1.quant_other"])
    def test_names_that_fit_nothing(self, net, name):
        with pytest.raises(ValueError, match=f"no layer here is called {name}"):
            Hawq().read({name: 4}, Names(net))


class TestPlain:
    def test_pairs_and_mappings(self, net):
        said = Plain().read({"fc": [4, 8], "stem": {"input": 3}}, Names(net))
        assert said == {"fc.weight": Stated(4), "fc.input": Stated(8), "stem.input": Stated(3)}

    def test_bits_are_whole_numbers(self, net):
        with pytest.raises(ValueError, match=r"whole numbers from 1 on, fc has 4\.5"):
            Plain().read({"fc": [4.5, 8]}, Names(net))
