"""Quantized layers compute torch's own operators on quantized operands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.elastic.layers import QuantConv2d, QuantLinear
from supernet.formats.integer import Integer

WEIGHTS = (QuantConfig(Integer(3), PerChannel()), QuantConfig(Integer(8), PerTensor(), False))
INPUTS = (QuantConfig(Integer(4)), QuantConfig(Integer(6), PerTensor(), False))


@pytest.fixture
def conv() -> QuantConv2d:
    torch.manual_seed(0)
    layer = QuantConv2d.from_float(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)).quantize(WEIGHTS, INPUTS)
    layer.weight_quantizer.start(layer.weight)
    layer.input_quantizer.start(torch.randn(4, 50))
    return layer


@pytest.fixture
def linear() -> QuantLinear:
    torch.manual_seed(0)
    layer = QuantLinear.from_float(nn.Linear(5, 7)).quantize(WEIGHTS, INPUTS)
    layer.weight_quantizer.start(layer.weight)
    layer.input_quantizer.start(torch.randn(4, 50))
    return layer


@pytest.mark.parametrize("choice", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_convolution_is_that_of_quantized_operands(conv: QuantConv2d, choice: tuple[int, int]) -> None:
    x = torch.randn(2, 4, 7, 7)
    with conv.weight_quantizer.using(choice[0]), conv.input_quantizer.using(choice[1]):
        w, q = conv.weight_quantizer(conv.weight), conv.input_quantizer(x)
        assert len(q.unique()) <= 2 ** INPUTS[choice[1]].bits
        assert torch.equal(conv(x), F.conv2d(q, w, conv.bias, 2, 1, 1, 2))


@pytest.mark.parametrize("choice", [(0, 0), (1, 1)])
def test_a_linear_layer_is_that_of_quantized_operands(linear: QuantLinear, choice: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 5)
    with linear.weight_quantizer.using(choice[0]), linear.input_quantizer.using(choice[1]):
        w, q = linear.weight_quantizer(linear.weight), linear.input_quantizer(x)
        assert torch.equal(linear(x), q @ w.T + linear.bias) or torch.equal(linear(x), F.linear(q, w, linear.bias))


def test_dimensions_are_those_of_the_quantizers(conv: QuantConv2d) -> None:
    assert [(d.name, d.choices) for d in conv.dimensions("a.b")] == [("a.b.weight", WEIGHTS), ("a.b.input", INPUTS)]


def test_one_choice_is_kept_with_its_values(conv: QuantConv2d) -> None:
    x = torch.randn(2, 4, 7, 7)
    with conv.weight_quantizer.using(0), conv.input_quantizer.using(1):
        expected = conv(x)
    conv.fix(0, 1)
    assert torch.equal(conv(x), expected)
    assert [d.choices for d in conv.dimensions("c")] == [WEIGHTS[:1], INPUTS[1:]]


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, bias=False), nn.Linear(3, 4, bias=False)], ids=["conv", "linear"])
def test_a_layer_without_bias_stays_without(layer: nn.Module) -> None:
    kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    made = kind.from_float(layer.eval())  # type: ignore[arg-type]
    assert made.bias is None and made.weight is layer.weight and not made.training
