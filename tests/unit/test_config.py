"""Values hash and print as they should; `build` makes what conf/ names and nothing else."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from omegaconf import OmegaConf

from supernet.config import (
    Layer,
    LayerCost,
    NumberFormat,
    PerChannel,
    PerTensor,
    QuantConfig,
    SubnetConfig,
    build,
    locate,
    plain,
    registered,
    si,
)
from supernet.formats.integer import Integer
from supernet.samplers.sandwich import Sandwich
from supernet.samplers.uniform import Uniform
from supernet.space import Dimension, SearchSpace
from supernet.training.losses import GroupProgressive, Plain, WeightDistribution

W4 = QuantConfig(Integer(4), PerChannel(), symmetric=False)
W2 = QuantConfig(Integer(2))


class TestValues:
    @pytest.mark.parametrize("shape", [(6, 3, 2, 2), (5, 4)])
    def test_blocks_of_a_granularity(self, shape: tuple[int, ...]) -> None:
        assert PerTensor().block(shape) == shape
        assert PerChannel().block(shape) == (1, *shape[1:])

    def test_equal_values_are_one_key(self) -> None:
        twin = QuantConfig(Integer(4), PerChannel(), symmetric=False)
        assert {W4: "a"}[twin] == "a" and len({W4, twin, W2}) == 2
        with pytest.raises(AttributeError):
            W4.symmetric = True  # type: ignore[misc]

    def test_a_config_reads_as_what_it_is(self) -> None:
        assert (str(W4), str(W2)) == ("int4 per-channel asymmetric", "int2 per-tensor symmetric")
        assert W4.bits == 4 and W4.form == (PerChannel(), False)
        assert isinstance(Integer(3), NumberFormat)

    def test_plain_is_json_and_says_the_kind(self) -> None:
        expected = {
            "kind": "QuantConfig",
            "format": {"kind": "Integer", "bits": 4},
            "granularity": {"kind": "PerChannel"},
            "symmetric": False,
        }
        assert json.loads(json.dumps(plain(W4))) == expected
        assert plain(3) == 3

    @pytest.mark.parametrize(
        ("bits", "symmetric", "ends"),
        [(2, True, (-2, 1)), (7, False, (-64, 63)), (8, True, (-127, 127)), (8, False, (-128, 127))],
    )
    def test_integer_levels(self, bits: int, symmetric: bool, ends: tuple[int, int]) -> None:
        levels = Integer(bits).levels(symmetric)
        assert list(levels) == [float(v) for v in range(ends[0], ends[1] + 1)]

    @pytest.mark.parametrize("bits", [1, 9, 0, -4])
    def test_integers_have_two_to_eight_bits(self, bits: int) -> None:
        with pytest.raises(ValueError, match=f"2 to 8 bits, got {bits}"):
            Integer(bits)

    def test_bitops_of_a_layer(self) -> None:
        assert LayerCost("a", "conv", 1000, 9, 3, 5, (1,)).bitops == 15_000
        layer = Layer("a.b", "conv", 1000, 9, 1, True, False, (1,))
        assert (layer.weight, layer.input) == ("a.b.weight", "a.b.input")

    @pytest.mark.parametrize(
        ("value", "unit", "text"),
        [
            (2.5e6, "B", "2.5 MB"),
            (0, "B", "0 B"),
            (999.99, "", "1 k"),
            (999.4, "B", "999.4 B"),
            (1.234567e9, "BitOps", "1.235 GBitOps"),
            (0.0021, "s", "2.1 ms"),
            (3e-12, "s", "0.003 ns"),
            (-4000, "B", "-4 kB"),
            (float("inf"), "s", "inf s"),
        ],
    )
    def test_si_prefixes(self, value: float, unit: str, text: str) -> None:
        assert si(value, unit) == text


class TestSubnetConfig:
    DIMENSIONS = (
        Dimension("depth", (1, 2)),
        Dimension("a.weight", (W2, W4)),
        Dimension("b.weight", (W2, W4), (("depth", (2,)),)),
    )

    def made(self, row: tuple[int, ...], *names: str) -> SubnetConfig:
        return SubnetConfig(self.DIMENSIONS, row, names or ("depth", "a.weight"))

    def test_only_active_dimensions_are_keys(self) -> None:
        config = self.made((0, 1, 0))
        assert dict(config) == {"depth": 1, "a.weight": W4}
        assert "b.weight" not in config
        with pytest.raises(KeyError):
            config["b.weight"]

    def test_equal_subnets_are_equal_and_hash_equal(self) -> None:
        one, two = self.made((0, 1, 0)), self.made((0, 1, 0))
        assert one == two and hash(one) == hash(two) and one.id == two.id
        assert one != self.made((0, 0, 0))
        assert one == {"depth": 1, "a.weight": W4}
        other = SubnetConfig(self.DIMENSIONS[:1] * 3, (0, 1, 0), ("depth", "a.weight"))
        assert one != other

    def test_the_id_is_the_same_in_every_process(self) -> None:
        assert self.made((0, 1, 0)).id == "63ccdbbeea"  # sha256 of "(0, 1, 0)"
        assert repr(self.made((0, 1, 0))) == "SubnetConfig(63ccdbbeea: depth=1, a.weight=int4 per-channel asymmetric)"

    def test_plain_is_json(self) -> None:
        assert json.loads(json.dumps(self.made((0, 1, 0)).plain())) == {"depth": 1, "a.weight": plain(W4)}


class TestBuild:
    def test_it_calls_the_target_depth_first(self) -> None:
        made = build(
            {
                "_target_": "supernet.training.losses.GroupProgressive",
                "temperature": 2.0,
                "distribution": {"_target_": "supernet.training.losses.WeightDistribution", "kurtosis": 0.5},
            }
        )
        assert isinstance(made, GroupProgressive) and made.temperature == 2.0
        assert isinstance(made.distribution, WeightDistribution) and made.distribution.kurtosis == 0.5

    def test_values_in_a_list_keep_their_type(self) -> None:
        node = OmegaConf.create(
            {"formats": [{"_target_": "supernet.formats.integer.Integer", "bits": 3}], "bits": [2, 4], "name": "x"}
        )
        assert build(node) == {"formats": [Integer(3)], "bits": [2, 4], "name": "x"}
        assert type(build(node)["bits"]) is list

    @pytest.mark.parametrize("value", [None, 3, "text", 2.5, True])
    def test_a_plain_value_stays(self, value: Any) -> None:
        assert build(value) is value

    def test_partial_gives_a_function_of_the_rest(self) -> None:
        space = SearchSpace([Dimension("d", (1, 2))])
        node = {
            "_target_": "supernet.samplers.sandwich.Sandwich",
            "inner": {"_target_": "supernet.samplers.uniform.Uniform", "_partial_": True},
        }
        made = build(node, space=space, costs=None)
        assert isinstance(made, Sandwich) and isinstance(made.inner, Uniform)
        assert made.space is space and made.inner.space is space, "arguments are passed on, not copied"

    def test_interpolations_of_a_configuration_are_resolved(self) -> None:
        node = OmegaConf.create({"n": 5, "it": {"_target_": "supernet.formats.integer.Integer", "bits": "${n}"}})
        assert build(node.it) == Integer(5)

    def test_what_the_target_refuses_is_said_in_its_words(self) -> None:
        with pytest.raises(ValueError, match=r"^Integer takes 2 to 8 bits, got 11"):
            build({"_target_": "supernet.formats.integer.Integer", "bits": 11})
        with pytest.raises(ValueError, match=r"Integer does not take these settings: .*'bitz'"):
            build({"_target_": "supernet.formats.integer.Integer", "bitz": 4})

    def test_every_registered_target_is_found(self) -> None:
        assert "supernet.samplers.cost_first.CostFirst" in registered()
        for target in registered():
            assert callable(locate(target))

    def test_the_user_may_trust_more(self) -> None:
        node = {"_target_": "collections.OrderedDict", "a": 1}
        with pytest.raises(ValueError, match=r"trust=\[\.\.\.\]"):
            build(node)
        assert build(node, trusted=["collections.OrderedDict"]) == {"a": 1}


HOSTILE = [
    "supernet.config.os.system",
    "supernet.config.importlib.import_module",
    "supernet.config.importlib",
    "supernet.run.torch.load",
    "supernet.artefacts.os.system",
    "os.system",
    "posix.system",
    "builtins.eval",
    "builtins.exec",
    "subprocess.run",
    "functools.partial",
    "hydra.utils.get_method",
    "hydra.utils.get_class",
    "hydra.utils.instantiate",
    "hydra.utils.call",
    "torch.load",
    "torch.hub.load",
    "pickle.loads",
    "supernet.cost.si",  # ours, but defined elsewhere
    "supernet.space.QuantConfig",
    "supernet.elastic.supernet.nn.Module",
    "supernet.config.OUR_PACKAGES",  # not a class, not a function
    "supernet.config",
    "supernet",
    "supernet.nowhere.Nothing",
    "supernet.formats.integer.Integer.levels",
    "supernetwork.Evil",
    "",
    "Integer",
    3,
    None,
    ["os.system"],
    # functions of ours that write files, call what they are told to, or build with a list of trusted names of their own
    "supernet.artefacts.write_text",
    "supernet.artefacts.write_bytes",
    "supernet.config.build",
    "supernet.config.locate",
    "supernet.run.load",
    "supernet.training.fit.train",
]


class TestHostileTargets:
    @pytest.mark.parametrize("target", HOSTILE, ids=str)
    @pytest.mark.parametrize("where", ["top", "nested", "list", "_args_", "partial", "config"])
    def test_are_refused(self, target: Any, where: str) -> None:
        evil = {"_target_": target}
        outer = "supernet.training.losses.Plain"
        node: Any = {
            "top": evil,
            "nested": {"_target_": outer, "distribution": {"deeper": [evil]}},
            "list": [1, [evil]],
            "_args_": {"_target_": outer, "_args_": [evil]},
            "partial": evil | {"_partial_": True},
            "config": OmegaConf.create({"x": evil}),
        }[where]
        with pytest.raises(ValueError, match=r"^_target_ "):
            build(node)

    def test_are_not_even_imported(self) -> None:
        sys.modules.pop("this", None)
        with pytest.raises(ValueError, match="_target_"):
            build({"_target_": "this.s"})
        assert "this" not in sys.modules

    @pytest.mark.parametrize(
        "text", ["${oc.create:{_target_: os.mkdir, path: made}}", r"\${oc.create:{_target_: os.mkdir, path: made}}"]
    )
    @pytest.mark.parametrize("wrap", [dict, OmegaConf.create], ids=["mapping", "config"])
    def test_do_not_hide_in_text_that_is_resolved_later(
        self, text: str, wrap: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=r"_target_|resolved"):
            build(wrap({"_target_": "supernet.training.losses.Plain", "distribution": text}))
        assert not list(tmp_path.iterdir())

    def test_an_escaped_interpolation_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"must be resolved .*, got '\$\{oc.env:HOME\}'"):
            build({"_target_": "supernet.training.losses.Plain", "distribution": "${oc.env:HOME}"})

    def test_the_same_node_without_harm_is_built(self) -> None:
        assert isinstance(build({"_target_": "supernet.training.losses.Plain"}), Plain)
