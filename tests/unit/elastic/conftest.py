"""A small calibrated supernet that the tests of this room share."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from supernet.backbones.cifar_resnet import CifarResNet
from supernet.config import SubnetConfig
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
