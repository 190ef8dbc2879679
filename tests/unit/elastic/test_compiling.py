"""Which way to compile pays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from supernet.backbones.cifar_resnet import CifarResNet
from supernet.elastic.compiling import choose, quantized_elements
from supernet.elastic.supernet import SuperNet

IMAGE = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def fixed() -> SuperNet:
    return SuperNet(CifarResNet(8), IMAGE)


@pytest.fixture(scope="module")
def deep() -> SuperNet:
    return SuperNet(CifarResNet(14, min_depth=1), IMAGE)


def test_elements_are_those_that_enter_a_quantizer() -> None:
    """Image 3x8x8 and 4x8x8 at the convolutions, 4 at the linear layer, and no site: each has one consumer."""
    net = SuperNet(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 8), nn.Flatten(), nn.Linear(4, 2, bias=False)),
        torch.zeros(1, 3, 8, 8),
        sites=False,
    )
    assert quantized_elements(net) == 3 * 64 + 4 * 64 + 4


def test_elements_do_not_depend_on_the_active_subnet(deep: SuperNet) -> None:
    before = quantized_elements(deep)
    with deep.as_subnet(deep.space.smallest()):
        assert quantized_elements(deep) == before


@pytest.mark.parametrize("passes", ["training", "evaluation"])
def test_more_work_never_chooses_less_compilation(fixed: SuperNet, passes: str) -> None:
    order = ("off", "quantizers", "regional", "whole")
    chosen = [choose(fixed, 10**k, passes).mode for k in range(10)]
    assert chosen[0] == "off" and chosen[-1] != "off"
    assert [order.index(mode) for mode in chosen] == sorted(order.index(mode) for mode in chosen)


def test_elastic_depth_is_never_compiled_whole(deep: SuperNet) -> None:
    assert {choose(deep, 10**k).mode for k in range(11)} == {"off", "quantizers", "regional"}


def test_a_model_that_cannot_be_traced_gets_the_quantizers() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv(x)
            return y if y.sum() > 0 else -y

    net = SuperNet(Branching(), IMAGE, sites=False)
    assert choose(net, 10**9).mode == "quantizers"


def test_it_says_why_in_one_line(fixed: SuperNet) -> None:
    few, many = choose(fixed, 10), choose(fixed, 10**8)
    assert few.why.startswith("compile=off: ") and "save about 0 s" in few.why
    assert many.why.startswith(f"compile={many.mode}: ") and " h of training" in many.why
    assert "\n" not in few.why + many.why


def test_the_same_plan_decides_alike(fixed: SuperNet) -> None:
    assert len({choose(fixed, 5 * 10**6) for _ in range(3)}) == 1
