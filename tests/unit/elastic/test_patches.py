"""A convolution as a product of its patches is the convolution, gradients included, and is taken where it is faster."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.elastic import patches
from supernet.elastic.layers import QuantConv2d
from supernet.formats.integer import Integer

WEIGHTS = (QuantConfig(Integer(3), PerChannel()), QuantConfig(Integer(8), PerTensor(), False))
INPUTS = (QuantConfig(Integer(4)), QuantConfig(Integer(6), PerTensor(), False))

APART = [nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(3, 6, (2, 3), stride=(2, 3), bias=False)]
FEW = [
    nn.Conv2d(3, 64, 3, padding=1, stride=4),
    nn.Conv2d(3, 256, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(2, 1), bias=False),
    nn.Conv2d(3, 256, 1, stride=3),
]
OTHERS = [
    nn.Conv2d(3, 6, 3, stride=1),
    nn.Conv2d(3, 6, 2, stride=2, padding=1),
    nn.Conv2d(3, 6, 2, stride=2, dilation=2),
    nn.Conv2d(3, 6, 1),
    nn.Conv2d(3, 6, 2, stride=2, padding=1, padding_mode="circular"),
    nn.Conv2d(3, 256, 3, padding="same"),
    nn.Conv2d(3, 255, 3, stride=1, groups=3),
]


def outcomes(layer: QuantConv2d, x: Tensor, compiled: bool) -> tuple[list[Tensor], set[str]]:
    """What the layer gives and all gradients; and the operators that ran."""
    torch._dynamo.reset()  # a layer is compiled for each test: more often than one code may be
    run = torch.compile(layer.forward, backend="eager", fullgraph=True) if compiled else layer
    image = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    with torch.profiler.profile() as profile:
        out = run(image)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    assert image.grad is not None
    grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    return [out.detach(), image.grad, *grads], {e.key for e in profile.key_averages()}


@pytest.mark.parametrize(("size", "layout"), [(8, torch.contiguous_format), (11, torch.channels_last)])
@pytest.mark.parametrize("conv", APART + FEW, ids=str)
def test_in_a_compiled_graph_the_product_is_the_convolution(
    conv: nn.Conv2d, size: int, layout: torch.memory_format
) -> None:
    """With all gradients; what does not fill a patch at the border is left out as there."""
    torch.manual_seed(0)
    layer = QuantConv2d.from_float(conv).quantize(WEIGHTS, INPUTS)
    layer.weight_quantizer.start(layer.weight)
    layer.input_quantizer.start(torch.randn(4, 50))
    x = torch.randn(2, 3, size, size).contiguous(memory_format=layout)
    plain, ran = outcomes(layer, x, compiled=False)
    product, ran_compiled = outcomes(layer, x, compiled=True)
    assert "aten::conv2d" in ran and "aten::conv2d" not in ran_compiled
    assert len(plain) == len(product) == 2 + len(list(layer.parameters()))
    for one, two in zip(plain, product, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conv", OTHERS, ids=str)
def test_other_convolutions_stay_what_they_are(conv: nn.Conv2d) -> None:
    assert not patches.is_faster(conv, torch.empty(2, 3, 11, 11))


@pytest.mark.parametrize(("batch", "size", "faster"), [(16, 4, True), (32, 4, True), (33, 4, False), (16, 6, False)])
def test_few_are_half_as_many_positions_as_channels(batch: int, size: int, faster: bool) -> None:
    conv = nn.Conv2d(8, 256, 3, stride=2, padding=1)
    assert patches.is_faster(conv, torch.empty(batch, 8, size, size)) == faster


def test_an_exported_graph_has_the_convolution() -> None:
    layer = QuantConv2d.from_float(nn.Conv2d(3, 6, 4, stride=4)).quantize(WEIGHTS, INPUTS).eval()
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(1, 3, 8, 8),))
    assert any("conv2d" in str(node.target) for node in exported.graph.nodes)
