"""Which tensors lie in memory together: networks whose tensors can be counted by hand."""

import math

import pytest
import torch
from torch import nn

from supernet.backbones.cifar_resnet import CifarResNet
from supernet.elastic.flow import adding, flow, sharing
from supernet.elastic.supernet import SuperNet


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    net = CifarResNet(14, channels=(4, 6, 8), min_depth=1)
    return SuperNet(net, torch.randn(1, 3, 8, 8), bits=(2, 3, 4, 8), granularities=["per-tensor"])


def held_at_most(net, config):
    """Blocks of a ResNet for small images, tensor by tensor: sites at 8 bits, what conv2 alone reads at its bits."""
    sizes, peak = {1: 4 * 64, 2: 6 * 16, 3: 8 * 4}, 3 * 64 + 4 * 64  # the stem: 8-bit image and outcome
    for stage in (1, 2, 3):
        for block in range(config[f"layer{stage}.depth"]):
            x = sizes[stage - 1] if block == 0 and stage > 1 else sizes[stage]
            y = sizes[stage]
            inner = math.ceil(y * config[f"layer{stage}.{block}.conv2.input"].bits / 8)
            shortcut = [x + y + y] if block == 0 and stage > 1 else []  # the padded copy of x, beside conv2's outcome
            peak = max([peak, x + inner, x + inner + y, *shortcut])
    return max(peak, sizes[3] + 8)


def test_the_peak_of_residual_blocks_is_counted_by_hand(residual, rng):
    peaks = set()
    for row in residual.space.sample_indices(60, rng):
        peak = residual.cost(row)["peak_activation_bytes"]
        assert peak == held_at_most(residual, residual.space.config(row))
        peaks.add(peak)
    assert len(peaks) > 2


def test_a_plain_chain_holds_input_and_output():
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3, padding=1), nn.ReLU(),
        nn.Conv2d(7, 3, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip
    net = SuperNet(chain, torch.randn(1, 2, 8, 8), bits=(2, 4, 8), first_last_bits=None)
    for bits in (2, 4, 8):
        row = net.space.uniform(f"w8a{bits}").row
        held = [(2 + 5) * 64 * bits, (5 + 7) * 64 * bits, (7 * 64 + 48) * bits, 48 * bits + 10 * 32]
        assert net.cost(row)["peak_activation_bytes"] == max(math.ceil(h / 8) for h in held)


class Branches(nn.Module):
    """Two convolutions of one tensor, added; their sum read by three linear layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(c, 4, 3, padding=1) for c in (1, 4, 4))
        self.q, self.k, self.v = (nn.Linear(64, 4) for _ in range(3))

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.one(x) + self.two(x).relu()).relu().flatten(1)
        return self.q(x) * self.k(x) + self.v(x)


def test_who_reads_the_same_tensor_and_whose_outcomes_are_added():
    net = SuperNet(Branches(), torch.randn(1, 1, 4, 4), bits=(4, 8), first_last_bits=None)
    ops = flow(net.model, net.example)
    assert sharing(ops) == [["one", "two"], ["q", "k", "v"]]
    assert adding(ops) == [["one", "two"]]


def test_without_sites_there_is_no_peak(residual):
    net = SuperNet(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)), torch.randn(1, 1, 8, 8), sites=False)
    assert "peak_activation_bytes" not in net.cost(net.space.largest())
    assert "peak_activation_bytes" in residual.costs.kinds


def test_what_cannot_be_traced_is_said():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="Branching cannot be traced as a whole"):
        flow(Branching(), torch.ones(1, 2))
