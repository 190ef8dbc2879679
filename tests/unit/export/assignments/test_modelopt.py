"""Against what ModelOpt itself made of the same configurations (recorded)."""

import copy

import pytest

import elastibit as eb
from supernet.config import PerChannel, PerTensor, Stated
from supernet.export.assignments.modelopt import ModelOpt
from supernet.export.assignments.names import Names

CASES = ("precedence", "classes", "toggles", "unmatched", "replaced", "mapping")


def theirs(quantizers, net):
    """What ModelOpt's own quantizers have, by our dimension; those of other modules and of outputs left out."""
    granularity = {None: PerTensor(), 0: PerChannel()}
    said = {name.removesuffix("_quantizer"): q for name, q in quantizers.items()}
    return {n: Stated(q["num_bits"], granularity[q["axis"]], True) for n, q in said.items() if n in net.space.position}


class TestRead:
    @pytest.mark.parametrize("case", CASES)
    def test_every_quantizer_as_modelopt_sets_it(self, net, recorded, case):
        found = recorded["modelopt"]["cases"][case]
        assert ModelOpt().recognises(found["config"])
        said = ModelOpt().read(found["config"], Names(net))
        assert said == theirs(found["quantizers"], net) and said

    @pytest.mark.parametrize("what", ["config", "best", "recipe"])
    def test_what_a_search_returns(self, net, recorded, what):
        found = recorded["modelopt"]["auto"]
        content = found["best"]["recipe"] if what == "recipe" else found[what]
        assert ModelOpt().recognises(content)
        assert ModelOpt().read(content, Names(net)) == theirs(found["quantizers"], net)

    def test_layers_that_were_searched_together(self, net, recorded):
        """Only the first of a group has a recipe; the state says who the others are."""
        best = recorded["modelopt"]["auto"]["best"]
        recipe = {name: r for name, r in best["recipe"].items() if not name.startswith("blocks.0.conv2")}
        groups = {"blocks.0.conv1.quant_recipe": {"module_names": ["blocks.0.conv1", "blocks.0.conv2"]}}
        said = ModelOpt().read({"best": {"recipe": recipe}, "candidate_stats": groups}, Names(net))
        assert said["blocks.0.conv2.weight"] == said["blocks.0.conv1.weight"]
        assert "blocks.0.conv2.weight" not in ModelOpt().read({"recipe": recipe}, Names(net))

    def test_a_layer_that_was_left_in_float_says_nothing(self, net, recorded):
        found = recorded["modelopt"]["auto"]
        off = {f"{n}.weight" for n in Names(net).kinds} - set(theirs(found["quantizers"], net))
        assert off, "the recorded search leaves no layer in float: record another"
        assert not off & set(ModelOpt().read(found["config"], Names(net)))

    def test_names_of_a_wrapped_network(self, net, recorded):
        config = copy.deepcopy(recorded["modelopt"]["written"][1]["config"])
        for entry in config["quant_cfg"][1:]:
            entry["quantizer_name"] = f"module.{entry['quantizer_name']}"
        plain = recorded["modelopt"]["written"][1]["config"]
        assert ModelOpt().read(config, Names(net)) == ModelOpt().read(plain, Names(net))

    @pytest.mark.parametrize(
        ("entry", "said"),
        [
            (
                {"quantizer_name": "nope.weight_quantizer", "cfg": {"num_bits": 4}},
                "no layer here is called nope.weight",
            ),
            ({"quantizer_name": "fc.weight_quantizer", "cfg": {"num_bits": (4, 3)}}, "fc.weight has a floating-point"),
            ({"quantizer_name": "fc.weight_quantizer", "cfg": [{"num_bits": 4}, {"num_bits": 8}]}, "2 times in a row"),
            ({"quantizer_name": "fc.weight_quantizer", "cfg": {"block_sizes": {-1: 32}}}, "shares scales in blocks"),
            ({"quantizer_name": "fc.weight_quantizer", "cfg": {"axis": 1}}, "fc.weight has scales along axis 1"),
            ({"quantizer_name": "fc.input_quantizer", "cfg": {"axis": 0}}, "inputs may not"),
        ],
    )
    def test_what_has_no_meaning_here(self, net, entry, said):
        with pytest.raises(ValueError, match=said):
            ModelOpt().read({"quant_cfg": [entry]}, Names(net))

    def test_other_modules_and_outputs_are_passed_over(self, net):
        names = ["pool.input_quantizer", "fc.output_quantizer", "nope.weight_quantizer"]
        entries = [{"quantizer_name": n, "cfg": {"num_bits": 4}} for n in names[:2]]
        entries += [{"quantizer_name": names[2], "enable": False}]
        said = ModelOpt().read(entries, Names(net))
        assert said["fc.input"] == Stated(8, PerTensor(), True) and {stated.bits for stated in said.values()} == {8}

    def test_a_recipe_must_be_a_configuration(self, net):
        with pytest.raises(ValueError, match=r"give what mtq\.get_auto_quantize_config returns"):
            ModelOpt().read({"fc.quant_recipe": "CUSTOM_1(effective-bits: 8.0)"}, Names(net))


class TestWrite:
    @pytest.mark.parametrize("k", range(3))
    def test_modelopt_sets_what_the_subnet_has(self, net_of, recorded, k):
        """The recorded quantizers are what mtq.quantize made of what was written; it is still written so."""
        net, found = net_of(symmetries=[True]), recorded["modelopt"]["written"][k]
        config = net.space.config(found["row"])
        assert eb.export_bits(net, config, "modelopt") == found["config"]
        granularity = {"per-tensor": None, "per-channel": 0}
        assert found["quantizers"] == {
            f"{name}_quantizer": {"num_bits": choice.bits, "axis": granularity[str(choice.granularity)]}
            for name, choice in config.items()
        }

    def test_zero_points_are_dropped_only_if_asked(self, net):
        config = net.space.uniform("w4a4", (PerChannel(), False), (PerTensor(), True))
        with pytest.raises(ValueError, match=r"no zero-point, this subnet has 6: stem.weight, .*loose=true"):
            eb.export_bits(net, config, "modelopt")
        loosely = eb.export_bits(net, config, "modelopt", loose=True)
        assert eb.import_bits(net, loosely) == net.space.uniform("w4a4")
