"""Into a subnet and out of it: what is taken as it is said, what is refused, and that nothing is lost on the way."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import elastibit as eb
from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet
from supernet.export.bit_maps import import_bits
from supernet.formats.integer import Integer
from supernet.formats.powers import PowersOfTwo
from tests.golden.record_bit_maps import Block


def small(**options):
    """Three layers outside of a stage of three blocks of two, of which one or more run."""
    blocks = Stage(Block(4), Block(4), Block(4), min_depth=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), blocks, nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 5))
    return SuperNet(model.eval(), torch.zeros(1, 3, 8, 8), **{"bits": range(2, 9), "first_last_bits": None} | options)


NET = small()
SYMMETRIC = small(symmetries=[True])
LAYERS = {layer.name for layer in NET.layers}


def all_at(weight, data, names=LAYERS):
    """One pair for many layers."""
    return {name: [weight, data] for name in names}


def bits_of(net, config):
    return {row.name: (row.weight_bits, row.input_bits) for row in net.layer_costs(config)}


class TestThereAndBack:
    @given(st.integers(0, 2**32 - 1))
    @settings(deadline=None, max_examples=25)
    def test_modelopt_loses_nothing_of_a_symmetric_subnet(self, seed):
        """Depth too: blocks that the map leaves out do not run."""
        config = SYMMETRIC.space.sample(np.random.default_rng(seed))
        content = json.loads(json.dumps(eb.export_bits(SYMMETRIC, config, "modelopt")))
        assert import_bits(SYMMETRIC, content) == config

    @given(st.integers(0, 2**32 - 1), st.sampled_from(["modelopt", "plain"]))
    @settings(deadline=None, max_examples=25)
    def test_bits_come_back_from_every_form(self, seed, form):
        config = NET.space.sample(np.random.default_rng(seed))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "map.json"
            path.write_text(json.dumps(eb.export_bits(NET, config, form, loose=True)))
            assert bits_of(NET, import_bits(NET, path)) == bits_of(NET, config)


class TestForms:
    def test_the_usual_form_where_the_map_is_silent(self):
        config = import_bits(NET, all_at(4, 5))
        assert config == NET.space.uniform("w4a5")

    def test_what_the_map_says(self):
        entries = [
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "axis": None}},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 4, "bias": {"type": "static"}}},
        ]
        config = import_bits(NET, entries)
        assert config["3.weight"] == QuantConfig(Integer(4), PerTensor(), True)
        assert config["3.input"] == QuantConfig(Integer(4), PerTensor(), False)

    def test_a_form_outside_the_space(self):
        net = small(granularities=["per-tensor"], symmetries=[True])
        content = eb.export_bits(SYMMETRIC, SYMMETRIC.space.uniform("w4a4"), "modelopt")
        with pytest.raises(
            ValueError, match=r"not have: 0\.weight per-channel symmetric at 4 bits \(offered int4 per-t"
        ):
            import_bits(net, content)
        assert import_bits(net, content, loose=True) == net.space.uniform("w4a4")

    def test_an_input_that_a_site_has_quantized_keeps_the_form_of_the_site(self):
        """Of its choices at 8 bits, all alike, the space keeps one; a map may name either."""
        at = NET.space.position["2.0.conv1.input"]
        (only,) = (choice for choice in NET.space.dimensions[at].choices if choice.bits == 8)
        for bias in (None, {"type": "static"}):
            config = import_bits(NET, [{"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "bias": bias}}])
            assert config["2.0.conv1.input"] == only

    def test_other_number_formats_are_not_integers(self):
        net = small(bits=(4, 8), formats=[PowersOfTwo(4)])
        config = import_bits(net, all_at(4, 8))
        assert {config[f"{name}.weight"].format for name in LAYERS} == {Integer(4)}
        powers = dict(config.items()) | {"3.weight": QuantConfig(PowersOfTwo(4), PerChannel())}
        for form in ("modelopt", "plain", "ort"):
            with pytest.raises(ValueError, match=r"integers only, this subnet has 3\.weight = pow2-4"):
                eb.export_bits(net, net.space.config(net.space.indices(powers)[0]), form)


class TestBits:
    def test_never_the_nearest(self):
        net = small(bits=(2, 4, 8), first_last_bits=8)
        with pytest.raises(
            ValueError, match=r"0\.weight 5 bits \(offered 8\), 0\.input .*2\.0\.conv1\.weight 5 bits \(of"
        ):
            import_bits(net, all_at(5, 5), loose=True)

    def test_what_has_no_choice_need_not_be_said(self):
        net = small(bits=(2, 4, 8), first_last_bits=8)
        inner = all_at(4, 4, LAYERS - {"0", "5"})
        assert import_bits(net, inner) == net.space.uniform("w4a4")

    def test_layers_left_out(self):
        some = all_at(4, 4, LAYERS - {"3"})
        with pytest.raises(
            ValueError, match=r"says nothing of 2 tensors: 3\.weight, 3\.input; give bits .*default=w8a8"
        ):
            import_bits(NET, some)
        assert bits_of(NET, import_bits(NET, some, default="w6a7"))["3"] == (6, 7)


class TestDepth:
    def test_a_stage_is_as_deep_as_what_is_named(self):
        one = {name: [4, 4] for name in LAYERS if not name.startswith(("2.1", "2.2"))}
        assert import_bits(NET, one)["2.depth"] == 1
        assert import_bits(NET, one | {"2.1.conv1": [4, 4], "2.1.conv2": [4, 4]})["2.depth"] == 2

    def test_a_block_in_between_is_not_left_out(self):
        gap = {name: [4, 4] for name in LAYERS if not name.startswith("2.1")}
        with pytest.raises(ValueError, match=r"nothing of 4 tensors: 2\.1\.conv1\.weight"):
            import_bits(NET, gap)

    def test_with_a_default_everything_runs(self):
        config = import_bits(NET, {"3": [4, 4]}, default="w8a8")
        assert config["2.depth"] == 3 and bits_of(NET, config)["2.2.conv2"] == (8, 8)


class TestWhichForm:
    @pytest.mark.parametrize("form", ["auto", "plain"])
    def test_recognised_or_named(self, form):
        assert import_bits(NET, all_at(4, 4), form) == NET.space.uniform("w4a4")

    @pytest.mark.parametrize(
        ("content", "form", "said"),
        [
            ({"a": "b"}, "auto", r"a bit map of no known form: \{'a': 'b'\}; name its form, one of aimet, hawq, mct"),
            ({"quant_cfg": [], "encodings": []}, "auto", "of aimet and modelopt at once"),
            ({"3": [4, 4]}, "aimet", "this is no bit map of aimet: .*leave the form out"),
            ({"3": [4, 4]}, "nncf", "no form of bit maps 'nncf'; choose one of aimet, hawq, mct, modelopt, ort, plain"),
            ({"3": [4, 4]}, "ort", "bit maps of ort are only written; read one of aimet, hawq, mct, modelopt, plain"),
        ],
    )
    def test_refused(self, content, form, said):
        with pytest.raises(ValueError, match=said):
            import_bits(NET, content, form)

    def test_what_is_only_read(self):
        with pytest.raises(ValueError, match="bit maps of hawq are only read; write one of modelopt, ort, plain"):
            eb.export_bits(NET, NET.space.largest(), "hawq")

    def test_files(self, tmp_path):
        with pytest.raises(OSError, match="nowhere"):
            import_bits(NET, tmp_path / "nowhere.json")
        (tmp_path / "cut.json").write_text('{"quant_cfg": [')
        with pytest.raises(ValueError, match="is not valid JSON"):
            import_bits(NET, str(tmp_path / "cut.json"))
