"""The laws of the SuperNet: one set of weights, many subnets, and none of them leaves a trace."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from supernet.backbones.cifar_resnet import BasicBlock
from supernet.config import LayerCost, PerChannel, PerTensor, QuantConfig, SubnetConfig
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet
from supernet.formats.integer import Integer
from supernet.quant.quantizer import Quantizer
from tests.unit.elastic.conftest import X, backbone, some


class TestSubnets:
    def test_floating_is_the_float_model_exactly(self, net: SuperNet) -> None:
        with net.as_subnet(net.space.largest()), net.floating():
            assert torch.equal(net(X), backbone().eval()(X))

    def test_floating_keeps_the_depth_that_is_active(self, net: SuperNet) -> None:
        shallow = backbone().eval()
        for stage in (shallow.layer1, shallow.layer2, shallow.layer3):
            stage.depth = 1
        with net.as_subnet(net.space.smallest()), net.floating():
            assert torch.equal(net(X), shallow(X))

    def test_floating_may_be_nested(self, net: SuperNet) -> None:
        quantized = net(X)
        with net.floating():
            plain = net(X)
            with net.floating():
                assert torch.equal(net(X), plain)
            assert torch.equal(net(X), plain)
        assert torch.equal(net(X), quantized) and not torch.equal(plain, quantized)

    def test_a_materialised_subnet_computes_the_same(self, net: SuperNet) -> None:
        for config in [*some(net, 12), net.space.smallest(), net.space.largest(), net.space.uniform("w2a3")]:
            with net.as_subnet(config):
                expected = net(X)
            subnet = net.materialise(config).eval()
            assert torch.equal(subnet(X), expected)
            assert not [m for m in subnet.modules() if isinstance(m, Stage)]
            assert all(len(m.choices) == 1 for m in subnet.modules() if isinstance(m, Quantizer))

    def test_it_has_weights_of_its_own(self, net: SuperNet) -> None:
        before = net(X)
        subnet = net.materialise(net.space.smallest())
        with torch.no_grad():
            for p in subnet.parameters():
                p.zero_()
        assert torch.equal(net(X), before)

    def test_it_is_no_larger_than_its_depth(self, net: SuperNet) -> None:
        subnet = net.materialise(net.space.smallest())
        blocks = [len(subnet.get_submodule(f"layer{s}")) for s in (1, 2, 3)]  # type: ignore[arg-type]
        assert blocks == [1, 1, 1]

    def test_rows_and_configurations_are_taken_alike(self, net: SuperNet) -> None:
        config = some(net, 1)[0]
        outputs = []
        for given in (config, config.row, np.array(config.row), net.space.config(config.row)):
            with net.as_subnet(given):
                outputs.append(net(X))
        assert all(torch.equal(outputs[0], o) for o in outputs[1:])

    def test_equal_subnets_hash_equal_and_compute_the_same(self, net: SuperNet) -> None:
        """Rows that differ in genes of blocks that do not run are one subnet."""
        shallow = np.array(net.space.smallest().row)
        other = shallow.copy()
        other[net.space.position["layer1.1.conv1.weight"]] = 3
        assert net.space.config(shallow) == net.space.config(other)
        assert hash(net.space.config(shallow)) == hash(net.space.config(other))
        with net.as_subnet(shallow):
            expected = net(X)
        with net.as_subnet(other):
            assert torch.equal(net(X), expected)

    def test_a_configuration_of_another_space_is_refused(self, net: SuperNet) -> None:
        other = SuperNet(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), X[:1])
        for use in (net.materialise, net.cost, net.layer_costs, lambda c: net.as_subnet(c).__enter__()):
            with pytest.raises(ValueError, match="is of another space"):
                use(other.space.largest())

    def test_every_choice_of_every_tensor_changes_the_output(self, net: SuperNet) -> None:
        """No dead site: with all else at the top, 2 bits anywhere are felt."""
        largest = np.array(net.space.largest().row)
        with net.as_subnet(largest):
            top = net(X)
        for at, dimension in enumerate(net.space.dimensions):
            if isinstance(dimension.choices[0], QuantConfig) and dimension.choices[0].bits == 8:
                continue  # pinned
            lower = largest.copy()
            lower[at] = 0
            with net.as_subnet(lower):
                assert not torch.equal(net(X), top), dimension.name


class TestContext:
    def test_leaving_restores_what_was_active_also_when_nested(self, net: SuperNet) -> None:
        a, b = some(net, 2)
        outside = net(X)
        with net.as_subnet(a):
            inside = net(X)
            with net.as_subnet(b):
                assert net.active == b.row
            assert net.active == a.row and torch.equal(net(X), inside)
        assert torch.equal(net(X), outside)

    def test_and_after_an_error(self, net: SuperNet) -> None:
        before, outside = net.active, net(X)
        with pytest.raises(RuntimeError, match="inside"), net.as_subnet(net.space.smallest()):
            raise RuntimeError("inside")
        assert net.active == before and torch.equal(net(X), outside)
        with pytest.raises(RuntimeError, match="inside"), net.floating():
            raise RuntimeError("inside")
        assert torch.equal(net(X), outside)

    def test_a_row_that_is_none_changes_nothing(self, net: SuperNet) -> None:
        before = net.active
        with pytest.raises(ValueError, match="indices"), net.as_subnet([0, 1]):
            pass
        assert net.active == before


def gradients(net: SuperNet) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


class TestBackward:
    def separate(self, net: SuperNet, configs: list[SubnetConfig]) -> list[dict[str, Tensor]]:
        found = []
        for config in configs:
            net.zero_grad(set_to_none=True)
            with net.as_subnet(config):
                net(X).square().sum().backward()
            found.append(gradients(net))
        net.zero_grad(set_to_none=True)
        return found

    def test_it_works_after_the_context_has_closed_and_after_another_subnet_ran(self, net: SuperNet) -> None:
        configs = some(net, 3)
        separate = self.separate(net, configs)
        losses = []
        for config in configs:
            with net.as_subnet(config):
                losses.append(net(X).square().sum())
        for k in (2, 0, 1):
            net.zero_grad(set_to_none=True)
            losses[k].backward()
            found = gradients(net)
            assert found.keys() == separate[k].keys()
            assert all(torch.equal(found[n], separate[k][n]) for n in found)

    def test_the_sum_of_three_is_that_of_the_summed_loss(self, net: SuperNet) -> None:
        configs = some(net, 3)
        total: dict[str, Tensor] = {}
        for part in self.separate(net, configs):
            for n, g in part.items():
                total[n] = total.get(n, torch.zeros_like(g)) + g
        losses = []
        for config in configs:
            with net.as_subnet(config):
                losses.append(net(X).square().sum())
        torch.stack(losses).sum().backward()
        for n, g in gradients(net).items():
            torch.testing.assert_close(g, total[n], rtol=1e-4, atol=1e-4 * float(g.abs().max() + 1))

    def test_only_the_active_choice_of_the_bank_learns(self, net: SuperNet) -> None:
        config = net.space.uniform("w3a2")
        with net.as_subnet(config):
            net(X).square().sum().backward()
        for layer in net.layers:
            for gene, what in ((layer.weight, "weight"), (layer.input, "input")):
                quantizer = net.quantizers[f"{layer.name}.{what}_quantizer"]
                at, n = quantizer.spans[quantizer.choices.index(config[gene])]  # type: ignore[arg-type]
                outside = torch.ones(len(quantizer.scale), dtype=torch.bool)
                outside[at : at + n] = False
                span = net.bank.spans[f"{layer.name}.{what}_quantizer"]
                by_scale, by_zero = (p.grad[span] for p in (net.bank.scale, net.bank.zero_point))
                assert not by_scale[outside].any() and not by_zero[outside].any()
                used = not (quantizer.bypass and config[gene].bits >= quantizer.bypass)  # type: ignore[union-attr]
                assert bool(by_scale.any()) == used, gene

    def test_blocks_that_do_not_run_have_no_gradient(self, net: SuperNet) -> None:
        with net.as_subnet(net.space.smallest()):
            net(X).sum().backward()
        idle = {n for n, p in net.named_parameters() if p.grad is None}
        assert idle == {n for n, _ in net.named_parameters() if ".1." in n and n.startswith("model.layer")}
        for name, span in net.bank.spans.items():
            skipped = name.startswith("layer") and ".1." in name
            bypassed = net.quantizers[name].bypass and net.quantizers[name].choices[0].bits >= 8
            assert bool(net.bank.scale.grad[span].any()) == (not skipped and not bypassed), name
            assert not (skipped and net.bank.zero_point.grad[span].any()), name


class TestSpace:
    def test_first_and_last_layer_are_pinned(self, net: SuperNet) -> None:
        for name, dimension in ((d.name, d) for d in net.space.dimensions if d.quantizes):
            edge = name.startswith(("conv1.", "linear."))
            assert {c.bits for c in dimension.choices if isinstance(c, QuantConfig)} == ({8} if edge else {2, 3, 8}), (
                name
            )

    def test_options_make_the_choices(self) -> None:
        model = nn.Sequential(*[m for _ in range(3) for m in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())], nn.Flatten())
        net = SuperNet(
            model,
            X[:1],
            bits=iter((4,)),
            weight_bits=(2, 5),
            granularities=["per-channel"],
            symmetries=(True,),
            first_last_bits=None,
        )
        expected = [
            (QuantConfig(Integer(2), PerChannel()), QuantConfig(Integer(5), PerChannel())),
            (QuantConfig(Integer(4)),),
        ]
        assert [d.choices for d in net.space.dimensions] == expected * 3

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"bits": ()}, "one or more of each: bits, granularities and symmetries"),
            ({"granularities": ()}, "one or more of each"),
            ({"symmetries": ()}, "one or more of each"),
            ({"granularities": ["per-group"]}, "per-tensor, per-channel, got 'per-group'"),
            ({"bits": (1, 2)}, "2 to 8 bits, got 1"),
            ({"first_last_bits": 16}, "2 to 8 bits, got 16"),
        ],
    )
    def test_options_that_make_no_space_are_refused(self, options: dict[str, object], message: str) -> None:
        model = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])
        with pytest.raises(ValueError, match=message):
            SuperNet(model, X[:1], **options)  # type: ignore[arg-type]

    def test_a_model_by_name_is_timms(self) -> None:
        with pytest.raises(ValueError, match="a module or as timm/<name>, got 'resnet18'"):
            SuperNet("resnet18", X[:1])

    def test_the_model_given_is_left_alone(self) -> None:
        model = backbone()
        before = copy.deepcopy(model.state_dict())
        net = SuperNet(model, X[:1])
        net.calibrate([X])
        assert not [m for m in model.modules() if isinstance(m, Quantizer)] and model.training
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())

    def test_names_in_the_state_are_those_of_the_model(self, net: SuperNet) -> None:
        names = set(net.state_dict())
        assert {f"model.{n}" for n in backbone().state_dict()} <= names
        assert names - {n for n in names if n.startswith("model.")} == {"bank.scale", "bank.zero_point"}
        ours = names - {f"model.{n}" for n in backbone().state_dict()} - {"bank.scale", "bank.zero_point"}
        assert ours == {f"model.{n}.signed" for n in net.quantizers}

    def test_depth_gates_the_genes_of_its_blocks(self, net: SuperNet) -> None:
        smallest, largest = net.space.smallest(), net.space.largest()
        assert "layer1.1.conv1.weight" in largest and "layer1.1.conv1.weight" not in smallest
        assert [largest[f"layer{s}.depth"] for s in (1, 2, 3)] == [2, 2, 2]

    def test_stages_within_blocks_depend_on_the_outer_depth(self) -> None:
        def block(*inner: nn.Module) -> nn.Module:
            return nn.Sequential(BasicBlock(4, 4), Stage(*inner, min_depth=1))

        torch.manual_seed(0)
        outer = Stage(*[block(BasicBlock(4, 4), BasicBlock(4, 4)) for _ in range(2)], min_depth=1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), outer, nn.Flatten(), nn.Linear(256, 2))
        net = SuperNet(model, X[:1], bits=(4, 8))
        net.calibrate([X])
        net.eval()
        gated = net.space.dimensions[net.space.position["1.1.1.depth"]]
        assert gated.active_if == (("1.depth", (2,)),)
        for config in [*some(net, 6), net.space.smallest(), net.space.largest()]:
            with net.as_subnet(config):
                assert torch.equal(net.materialise(config).eval()(X), net(X))


class TestStages:
    def test_a_block_that_changes_the_shape_cannot_be_left_out(self) -> None:
        model = nn.Sequential(Stage(BasicBlock(3, 4), BasicBlock(4, 6), min_depth=1), nn.Flatten(), nn.Linear(384, 2))
        with pytest.raises(
            ValueError, match=r"must keep the shape .* 0.1 turns \(4, 8, 8\) into \(6, 8, 8\): raise min_depth"
        ):
            SuperNet(model, X[:1])
        model[0].min_depth = 2
        assert not [n for n in SuperNet(model, X[:1]).space.position if n.endswith("depth")]

    @pytest.mark.parametrize("low", [0, 3])
    def test_min_depth_is_a_number_of_blocks(self, low: int) -> None:
        with pytest.raises(ValueError, match=rf"min_depth must lie in 1..2 .* got {low}"):
            Stage(nn.Identity(), nn.Identity(), min_depth=low)

    def test_the_first_blocks_run(self) -> None:
        stage = Stage(*[nn.Linear(3, 3) for _ in range(3)], min_depth=1)
        x = torch.randn(2, 3)
        assert torch.equal(stage(x), stage[2](stage[1](stage[0](x))))
        stage.depth = 2
        assert torch.equal(stage(x), stage[1](stage[0](x)))
        assert [(d.name, d.choices) for d in stage.dimensions("s")] == [("s.depth", (1, 2, 3))]
        assert Stage(nn.Identity()).dimensions("s") == []


class TestCosts:
    def test_the_table_of_layers_adds_up(self, net: SuperNet) -> None:
        for config in some(net, 8):
            rows = net.layer_costs(config)
            cost = net.cost(config)
            assert sum(row.bitops for row in rows) == cost["bitops"] and sum(row.macs for row in rows) == cost["macs"]
            assert [row.name for row in rows] == [n.removesuffix(".weight") for n in config if n.endswith(".weight")]

    def test_macs_are_those_of_the_float_model_at_full_depth(self, net: SuperNet) -> None:
        assert net.cost(net.space.largest())["macs"] == net.audit()["macs"]
        first = net.layer_costs(net.space.uniform("w2a3"))[0]
        assert first == LayerCost("conv1", "conv", 64 * 4 * 27, 108, 8, 8, (3, 8, 8))


def test_per_tensor_is_the_default_of_inputs(net: SuperNet) -> None:
    inputs = [d for d in net.space.dimensions if d.name.endswith(".input")]
    assert all(isinstance(c, QuantConfig) and c.granularity == PerTensor() for d in inputs for c in d.choices)
