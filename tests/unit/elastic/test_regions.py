"""Regions: a network cut into parts computes what the network computes, and equal parts are compiled once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from supernet.backbones.cifar_resnet import BasicBlock, CifarResNet
from supernet.backbones.timm_models import timm_model
from supernet.elastic.layers import QuantLayer
from supernet.elastic.regions import Regions
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Counting:
    """Stands in for compilation: remembers what was to be compiled and hands it back."""

    def __init__(self) -> None:
        self.functions: list[Callable[..., Any]] = []

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self.functions.append(function)
        return function


class Block(nn.Module):
    """A residual block of one convolution."""

    def __init__(self, channels: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, 1)
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool2d(stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x)) + self.pool(x)


class Branches(nn.Module):
    """Values that skip regions, a parameter of the network itself, a block used twice, two results of one region."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(8, 5)
        self.a, self.b, self.c = Block(), Block(), Block(stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        left, right = self.norm(y), torch.relu(y)
        z = self.b(self.a(left)) + self.gain * right
        z = self.c(self.a(z + y)) * self.gain
        return self.head(torch.cat([z.mean((2, 3)), y.amax((2, 3))], 1))


def plain_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, 2), nn.Flatten(), nn.Linear(196, 5)
    )


def resnet18() -> nn.Module:
    """Narrow after the first stage, so that scales are found in no time."""
    size = {"channels": (64, 8, 8, 8), "stages": ["layer1", "layer2", "layer3", "layer4"]}
    return timm_model("resnet18", n_classes=5, zero_init_last=False, **size)


def vit() -> nn.Module:
    size = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3}
    return timm_model("vit_tiny_patch16_224", n_classes=5, **size)


# Structures: what lies before, between and behind the blocks, and each kind of block; strides make none of their own.
NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int]] = {
    "plain": (plain_cnn, {}, 1),
    "resnet8": (lambda: CifarResNet(8, 5, channels=(4, 6, 8)), {}, 4),
    "resnet14 elastic": (lambda: CifarResNet(14, 5, channels=(4, 6, 8), min_depth=1), {}, 4),
    "resnet14 without sites": (lambda: CifarResNet(14, 5, channels=(4, 6, 8), min_depth=1), {"sites": False}, 4),
    "branches": (Branches, {"allow": ["*"]}, 4),
    "resnet18": (resnet18, {}, 4),
    "mobilenetv2": (lambda: timm_model("mobilenetv2_035", n_classes=5), {}, 5),
    "vit": (vit, {}, 3),
    "vit, attention in float": (vit, {"allow": ["*"]}, 3),
}


def network(name: str) -> SuperNet:
    make, options, _ = NETS[name]
    torch.manual_seed(0)
    net = SuperNet(make(), X[:1], bits=(2, 8), **options)
    net.calibrate([X])
    return net


def trained(net: SuperNet, run: Callable[[Tensor], Tensor], config: Any) -> dict[str, Tensor]:
    """Output, gradients and buffers after one step of one subnet, from a fixed state of the generator."""
    torch.manual_seed(7)
    net.zero_grad(set_to_none=True)
    with net.as_subnet(config), net.bank.selected():
        out = run(X)
    out.square().sum().backward()
    found = {f"gradient of {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
    return {"output": out.detach()} | found | {n: b.clone() for n, b in net.named_buffers()}


@pytest.mark.parametrize("name", NETS)
def test_it_is_the_network_exactly(name: str, rng: np.random.Generator) -> None:
    """Outputs, gradients and what BatchNorm counts, over a few steps of random subnets."""
    net = network(name)
    twin = copy.deepcopy(net)
    counting = Counting()
    regions = Regions(twin.model, counting)
    assert regions.structures == len(counting.functions) == NETS[name][2]
    for config in (net.space.largest(), net.space.smallest(), net.space.sample(rng)):
        expected, found = trained(net, net.model, config), trained(twin, regions, config)
        assert found.keys() == expected.keys() and len(expected) > 5
        assert not [n for n in expected if not torch.equal(found[n], expected[n])]


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_those_of_the_network(training: bool) -> None:
    net = network("resnet14 elastic")
    regions = Regions(net.model, Counting())
    net.train(training)
    norm = net.model.get_submodule("layer1.0.bn1")
    before = norm.running_mean.clone()
    with net.bank.selected():
        regions(X)
    assert torch.equal(norm.running_mean, before) != training


@pytest.mark.parametrize("depth", [8, 20])
def test_structures_do_not_grow_with_depth(depth: int) -> None:
    """Stem, block, block with a change of shape, head."""
    net = SuperNet(CifarResNet(depth, 5, channels=(4, 6, 8)), X[:1, :, :8, :8], bits=(8,))
    assert Regions(net.model, Counting()).structures == 4


class TestDepth:
    def ran(self, net: SuperNet, regions: Regions, depths: tuple[int, int, int]) -> set[str]:
        """Layers that ran."""
        rows = {f"layer{k + 1}.depth": depth for k, depth in enumerate(depths)}
        config = net.space.config(net.space.pin(rows).sample(np.random.default_rng(0)).row)
        seen = set[str]()
        layers = [(n, m) for n, m in net.model.named_modules() if isinstance(m, QuantLayer)]
        handles = [m.register_forward_hook(lambda *_, n=n: seen.add(n)) for n, m in layers]
        with net.as_subnet(config), net.bank.selected(), torch.no_grad():
            regions(X)
        for handle in handles:
            handle.remove()
        return seen

    @pytest.mark.parametrize("depths", [(1, 1, 1), (2, 1, 2), (1, 2, 1), (2, 2, 2)])
    def test_the_first_blocks_run(self, depths: tuple[int, int, int]) -> None:
        net = network("resnet14 elastic")
        blocks = {f"layer{s + 1}.{b}.conv{c}" for s in range(3) for b in range(depths[s]) for c in (1, 2)}
        assert self.ran(net, Regions(net.model, Counting()), depths) == {"conv1", "linear"} | blocks
        idle = [n for n, m in net.model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.num_batches_tracked]
        assert len(idle) == 2 * (6 - sum(depths))

    def test_stages_may_lie_in_stages(self) -> None:
        torch.manual_seed(0)
        inner = [Stage(BasicBlock(4, 4), BasicBlock(4, 4), min_depth=1) for _ in range(2)]
        outer = Stage(*[nn.Sequential(BasicBlock(4, 4), stage) for stage in inner], min_depth=1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), outer, nn.Flatten(), nn.Linear(4096, 2))
        net = SuperNet(model, X[:1], bits=(4, 8))
        net.calibrate([X])
        net.eval()
        regions = Regions(net.model, Counting())
        rng = np.random.default_rng(0)
        depths = set()
        for config in [net.space.sample(rng) for _ in range(8)]:
            with net.as_subnet(config), net.bank.selected():
                assert torch.equal(regions(X), net.model(X))
            depths.add(tuple(config.get(n) for n in ("1.depth", "1.0.1.depth", "1.1.1.depth")))
        assert len(depths) > 3


class TestSharing:
    def test_equal_blocks_have_weights_of_their_own(self) -> None:
        net = network("resnet14 elastic").eval()
        regions = Regions(net.model, Counting())
        for block in ("layer1.0", "layer1.1", "layer2.1"):
            with net.bank.selected(), torch.no_grad():
                before = regions(X)
                net.model.get_submodule(f"{block}.conv2").weight.mul_(-1)
                assert not torch.equal(regions(X), before), block
                assert torch.equal(regions(X), net.model(X))

    def test_weights_and_buffers_are_read_when_it_runs(self) -> None:
        net = network("branches").eval()
        regions = Regions(net.model, Counting())
        with torch.no_grad():
            net.model.get_parameter("gain").data = torch.tensor(-2.0)
            net.double()
            with net.bank.selected():
                assert torch.equal(regions(X.double()), net.model(X.double()))

    def test_what_differs_in_a_number_is_another_structure(self) -> None:
        class Shifted(nn.Module):
            def __init__(self, by: float) -> None:
                super().__init__()
                self.conv, self.by = nn.Conv2d(3, 3, 3, padding=1), by

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(x) + self.by

        for shifts, structures in (((1.0, 1.0, 1.0), 2), ((1.0, 2.0, 1.0), 3)):
            model = nn.Sequential(*[Shifted(by) for by in shifts], nn.Flatten())
            net = SuperNet(model, X[:1, :, :8, :8], bits=(8,))
            net.calibrate([X[..., :8, :8]])
            regions = Regions(net.model, Counting())
            assert regions.structures == structures
            with net.bank.selected():
                assert torch.equal(regions(X[..., :8, :8]), net.model(X[..., :8, :8]))


def test_a_model_that_cannot_be_traced_is_refused_and_stays_as_it_is() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else -self.conv(x)

    net = SuperNet(Moody(), X[:1], sites=False)
    with pytest.raises(ValueError, match="Moody cannot be traced"):
        Regions(net.model, Counting())
    with pytest.raises(ValueError, match="Moody cannot be traced"):
        net.compile("regional")
    assert net.compiled == "off" and not any(q.fuse for q in net.quantizers.values())
    assert torch.isfinite(net(X)).all()
