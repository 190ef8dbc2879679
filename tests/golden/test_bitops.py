"""BitOps of three networks everybody quotes, in the three conventions in print, against published figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from supernet.elastic.supernet import SuperNet

GOLDEN = json.loads((Path(__file__).parent / "bitops.json").read_text())
PUBLISHED = {
    # G at uniform 4/4: every layer (FLIQS), first and last at 8/8 (RFQuant and LSQ tables), without them (EQ-Net)
    "resnet18": {"macs": 1.81, "bitops": 29.0, "bitops_first_last_8": 34.7, "bitops_inner": 27.1},
    "resnet50": {"macs": 4.09},
    "mobilenetv2_100": {"macs": 0.30},
}


@pytest.fixture(scope="module", params=sorted(GOLDEN["models"]))
def counted(request: pytest.FixtureRequest) -> tuple[str, dict[str, float], SuperNet]:
    torch.manual_seed(0)
    example = torch.randn(1, 3, 224, 224)
    net = SuperNet(f"timm/{request.param}", example, bits=(2, 4), first_last_bits=None, sites=False)
    return request.param, net.cost(net.space.uniform("w4a4")), net


def test_counts_are_exact(counted: tuple[str, dict[str, float], SuperNet]) -> None:
    name, cost, net = counted
    assert {kind: cost[kind] for kind in GOLDEN["models"][name]} == GOLDEN["models"][name]
    assert net.audit()["covered"] == 1.0 and net.audit()["macs"] == cost["macs"]


def test_they_round_to_what_is_published(counted: tuple[str, dict[str, float], SuperNet]) -> None:
    name, cost, _ = counted
    for kind, published in PUBLISHED[name].items():
        digits = 2 if kind == "macs" else 1
        assert round(cost[kind] / 1e9, digits) == published, kind


def test_the_conventions_are_closed_forms_of_the_macs(counted: tuple[str, dict[str, float], SuperNet]) -> None:
    _, cost, net = counted
    edges = net.layers[0].macs + net.layers[-1].macs
    assert cost["bitops"] == 16 * cost["macs"]
    assert cost["bitops_inner"] == 16 * (cost["macs"] - edges)
    assert cost["bitops_first_last_8"] == cost["bitops_inner"] + 64 * edges


def test_weights_are_those_of_the_network(counted: tuple[str, dict[str, float], SuperNet]) -> None:
    """Parameters of convolutions and the classifier: 11.7 M less BatchNorm and bias for a ResNet-18."""
    name, _, net = counted
    weights = sum(layer.weights for layer in net.layers)
    assert round(weights / 1e6, 1) == {"resnet18": 11.7, "resnet50": 25.5, "mobilenetv2_100": 3.5}[name]
    assert [layer.behind_norm for layer in net.layers] == [True] * (len(net.layers) - 1) + [False]
