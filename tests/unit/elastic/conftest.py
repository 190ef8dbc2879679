"""A small calibrated supernet that the tests of this room share."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from supernet.backbones.cifar_resnet import BasicBlock, CifarResNet
from supernet.config import SubnetConfig
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def backbone() -> CifarResNet:
    """Two blocks a stage, each of which may be left out; statistics that are not those of a fresh BatchNorm."""
    torch.manual_seed(0)
    model = CifarResNet(14, n_classes=5, channels=(4, 6, 8), min_depth=1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(-1, 2)
                module.bias.normal_()
    return model


@pytest.fixture(scope="module")
def calibrated() -> SuperNet:
    net = SuperNet(backbone(), X[:1], bits=(2, 3, 8))
    net.calibrate([X])
    return net.eval()


@pytest.fixture
def net(calibrated: SuperNet) -> Iterator[SuperNet]:
    """The same one for every test, put back as it was."""
    state = copy.deepcopy(calibrated.state_dict())
    before = calibrated.active
    yield calibrated
    calibrated.load_state_dict(state)
    calibrated.zero_grad(set_to_none=True)
    assert calibrated.active == before and not calibrated.training


def some(net: SuperNet, n: int) -> list[SubnetConfig]:
    rng = np.random.default_rng(3)
    return [net.space.sample(rng) for _ in range(n)]


def small(blocks: int = 1) -> SuperNet:
    """Calibrated, with as little to compile as there may be: a stem, blocks of which one or all run, and a head."""
    torch.manual_seed(0)
    stage = Stage(*[BasicBlock(4, 4) for _ in range(blocks)], min_depth=1)
    stem = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    made = SuperNet(
        nn.Sequential(*stem, stage, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)), X[:1], bits=(2, 4, 8)
    )
    made.calibrate([X])
    return made


def step(net: SuperNet, config: SubnetConfig, x: Tensor = X) -> Tensor:
    """Output of one subnet, after forward and backward."""
    with net.as_subnet(config):
        out = net(x)
    out.square().mean().backward()
    return out.detach()
