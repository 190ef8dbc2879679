"""Attention written out: the same numbers as fused attention, with products that are counted and quantized."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import LayerNorm
from timm.layers.attention import Attention as Fused
from torch import nn

from predictors.layer_outputs import relative_errors
from predictors.output_mse import OutputMSE
from supernet.backbones.timm_models import timm_model
from supernet.config import PerTensor, QuantConfig
from supernet.elastic.attention import Attention, MatMul, QuantMatMul, write_out
from supernet.elastic.audit import multiplications
from supernet.elastic.supernet import SuperNet
from supernet.elastic.wrap import discover
from supernet.formats.integer import Integer
from supernet.training.losses import WeightDistribution

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "num_heads": 3, "depth": 2, "n_classes": 5}
TOKENS = 17
IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PRODUCTS = [f"blocks.{b}.attn.{name}" for b in (0, 1) for name in ("scores", "mix")]


def vit(**options: Any) -> nn.Module:
    """A ViT of two blocks whose attention is not uniform."""
    torch.manual_seed(0)
    model = timm_model("vit_tiny_patch16_224", **TINY | options).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def net() -> SuperNet:
    """Calibrated; not to be changed."""
    made = SuperNet(vit(), IMAGES[:1], bits=(4, 8)).eval()
    made.calibrate([IMAGES])
    return made


class TestWrittenOut:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"qkv_bias": True, "qk_norm": True, "norm_layer": LayerNorm},
            {"scale_norm": True, "norm_layer": LayerNorm, "gated": True, "attn_drop": 0.5, "proj_drop": 0.5},
            {"attn_head_dim": 5, "dim_out": 7},
        ],
        ids=["plain", "normed heads", "gated", "other sizes"],
    )
    def test_it_computes_what_fused_attention_computes(self, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        fused = nn.Sequential(Fused(12, 2, **options)).eval()
        x = 2 * torch.randn(3, 6, 12)
        expected, names = fused(x), set(fused.state_dict())
        made = write_out(fused)
        assert isinstance(made[0], Attention) and not made.training and set(made.state_dict()) == names
        torch.testing.assert_close(made(x), expected)

    def test_what_is_allowed_in_float_stays(self) -> None:
        model = write_out(vit(), ["blocks.1.*"])
        assert isinstance(model.blocks[0].attn, Attention) and isinstance(model.blocks[1].attn, Fused)

    def test_attention_alone_and_shared(self) -> None:
        one = Fused(12, 2)
        assert isinstance(write_out(one), Attention)
        both = write_out(nn.ModuleList([one, one]))
        assert both[0] is both[1] and isinstance(both[0], Attention)

    def test_a_mask_is_refused(self) -> None:
        made = write_out(Fused(12, 2))
        with pytest.raises(ValueError, match="attention with a mask is not quantized"):
            made(torch.randn(1, 4, 12), is_causal=True)

    def test_unknown_parts_are_refused(self) -> None:
        with pytest.raises(ValueError, match="no parts called rope"):
            Attention(2, 1.0, rope=nn.Identity())


class TestProducts:
    def test_they_are_found_and_counted(self) -> None:
        model = write_out(vit())
        found = {f.name: f for f in discover(model, IMAGES[:1])}
        assert [name for name, f in found.items() if f.kind == "matmul"] == PRODUCTS
        for name in PRODUCTS:
            assert found[name].macs == TOKENS * TOKENS * 24 and found[name].weights == 0
        assert {name: f.macs for name, f in found.items()} == multiplications(model, IMAGES[:1])

    def test_nothing_is_left_in_float(self, net: SuperNet) -> None:
        audit = net.audit()
        assert audit["covered"] == 1.0 and audit["left_in_float"] == {} and audit["sites"] == 1
        assert [layer.name for layer in net.layers if layer.kind == "matmul"] == PRODUCTS

    def test_both_operands_are_inputs(self, net: SuperNet) -> None:
        config = net.space.uniform("w4a8")
        for name in PRODUCTS:
            assert [config[f"{name}.{side}.input"].bits for side in ("left", "right")] == [8, 8]
        rows = {row.name: row for row in net.layer_costs(net.space.uniform("w8a4"))}
        assert (rows[PRODUCTS[0]].weight_bits, rows[PRODUCTS[0]].input_bits) == (4, 4)

    def test_costs_hold_them(self, net: SuperNet) -> None:
        macs = {layer.name: layer.macs for layer in net.layers}
        names = list(macs)
        bits = {name: 16 if name in PRODUCTS else 64 if name in (names[0], names[-1]) else 32 for name in names}
        cost = net.cost(net.space.uniform("w8a4"))
        assert cost["bitops"] == sum(macs[name] * bits[name] for name in names)
        assert cost["macs"] == sum(macs.values()) == net.audit()["macs"]

    def test_a_product_is_one_of_quantized_operands(self) -> None:
        torch.manual_seed(0)
        choices = [QuantConfig(Integer(bits), PerTensor(), True) for bits in (4, 8)]
        made = QuantMatMul.from_float(MatMul(0.5)).quantize(choices, choices[1:])
        left, right = torch.rand(2, 3, 4), torch.randn(2, 4, 5)
        made.left_quantizer.start(left)
        made.right_quantizer.start(right)
        assert made.left_quantizer.unsigned and not made.right_quantizer.unsigned
        a, b = made.left_quantizer(left), made.right_quantizer(right)
        assert torch.equal(made(left, right), (a @ b) * 0.5) and len(b.unique()) <= 16
        made.fix(1, 0)
        assert made.right_quantizer.choices == (choices[1],) and repr(made).startswith("QuantMatMul(\n  factor=0.5")

    def test_changing_one_operand_changes_the_output(self, net: SuperNet) -> None:
        largest = net.space.largest()
        with net.as_subnet(largest), torch.no_grad():
            before = net(IMAGES)
        for name in PRODUCTS:
            for side in ("left", "right"):
                row = np.array(largest.row)
                row[net.space.position[f"{name}.{side}.input"]] = 0
                with net.as_subnet(row), torch.no_grad():
                    assert not torch.equal(net(IMAGES), before)


class TestNetwork:
    def test_a_materialised_subnet_computes_the_same(self, net: SuperNet, rng: np.random.Generator) -> None:
        for config in (net.space.smallest(), net.space.uniform("w4a8"), net.space.sample(rng)):
            subnet = net.materialise(config).eval()
            with net.as_subnet(config), torch.no_grad():
                assert torch.equal(subnet(IMAGES), net(IMAGES))

    def test_in_float_it_is_the_model(self, net: SuperNet) -> None:
        with net.floating(), torch.no_grad():
            torch.testing.assert_close(net(IMAGES), vit()(IMAGES))

    @pytest.mark.parametrize("mode", ["off", pytest.param("quantizers", marks=pytest.mark.slow)])
    def test_every_parameter_gets_a_gradient(self, mode: str, rng: np.random.Generator) -> None:
        made = SuperNet(vit(), IMAGES[:1], bits=(4, 8))
        made.calibrate([IMAGES])
        made.compile(mode)
        with made.as_subnet(made.space.sample(rng)):
            made(IMAGES).square().sum().backward()
        assert not [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()]

    def test_left_in_float_on_request(self) -> None:
        made = SuperNet(vit(), IMAGES[:1], bits=(8,), allow=["blocks.*.attn"])
        assert not [layer for layer in made.layers if layer.kind == "matmul"]
        assert set(made.audit()["left_in_float"]) == {"blocks.0.attn", "blocks.1.attn"}


class TestOutsiders:
    def test_a_sensitivity_prices_products(self, net: SuperNet) -> None:
        factors = OutputMSE(images=8)(net, [IMAGES])
        row = np.array(net.space.largest().row)
        best = factors.value(row[None])
        for side in ("left", "right"):
            worse = row.copy()
            worse[net.space.position[f"{PRODUCTS[0]}.{side}.input"]] = 0
            assert factors.value(worse[None]) > best

    def test_a_price_is_the_relative_error_of_the_product(self) -> None:
        torch.manual_seed(0)
        choices = [QuantConfig(Integer(bits), PerTensor(), True) for bits in (2, 8)]
        made = QuantMatMul().quantize(choices, choices)
        left, right = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
        made.left_quantizer.start(left)
        made.right_quantizer.start(right)
        of_right, of_left = relative_errors(made, (left, right))
        exact = left @ right
        spread = (exact - exact.mean(1, keepdim=True)).square().sum()
        with made.right_quantizer.using(0):
            expected = (left @ made.right_quantizer(right) - exact).square().sum() / spread
        assert of_right[0] == pytest.approx(expected.item(), rel=1e-4) and of_right[1] < of_right[0]
        assert of_left[1] < of_left[0]

    def test_penalties_on_weights_skip_what_has_none(self, net: SuperNet) -> None:
        layers = [net.model.get_submodule(layer.name) for layer in net.layers[1:]]
        penalty = WeightDistribution()
        expected = torch.stack([penalty.of(m.weight) for m in layers if not isinstance(m, QuantMatMul)]).mean()
        torch.testing.assert_close(penalty(net), expected)
