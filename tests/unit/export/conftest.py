"""Small networks with random statistics, and how to make a subnet of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernet.config import SubnetConfig
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet
from supernet.export.deploy import deploy
from supernet.export.graph import Deployed

Make = Callable[..., nn.Module]


class Block(nn.Module):
    """Residual block with a shortcut that slices and pads where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=True), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return F.relu(x + y)


class ResNet(nn.Module):
    """Two stages; the second may be cut. Convolutions in front of BatchNorm with and without a bias."""

    def __init__(self, width: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.one = Stage(Block(width, width, 1))
        self.two = Stage(Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1), min_depth=1)
        self.pool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(F.relu(self.bn(self.conv(x)))))
        return self.linear(torch.flatten(self.pool(x), 1))


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Lopsided weights, random BatchNorm statistics; of each four gains one is 0 and some are negative."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            n = module.num_features
            sign = torch.where(torch.arange(n) % 3 == 1, -1.0, 1.0)
            module.weight.data = sign * (0.5 + torch.rand(n, generator=random))
            module.weight.data[3::4] = 0.0
            module.bias.data = 0.5 * torch.randn(n, generator=random)
            module.running_mean = 0.3 * torch.randn(n, generator=random)
            module.running_var = 0.2 + torch.rand(n, generator=random)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            lopsided = torch.randn(len(module.weight), *[1] * (module.weight.dim() - 1), generator=random)
            module.weight.data += 0.5 * module.weight.data.abs() * lopsided
    return model.eval()


def supernet(model: nn.Module, shape: tuple[int, ...], n: int = 32, **options: Any) -> tuple[SuperNet, Tensor]:
    """A calibrated supernet of a float model, and a batch of random inputs."""
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    last = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)][-1]
    if last.bias is not None:  # so that random networks do not give one class to all images
        with torch.no_grad():
            logits = model.eval()(x)
            last.bias -= logits.mean([d for d in range(logits.dim()) if d != 1])
    net = SuperNet(model, x[:1], **options).eval()
    net.calibrate([x])
    return net, x


def deployed(
    model: nn.Module, shape: tuple[int, ...], bits: str = "w8a8", **options: Any
) -> tuple[nn.Module, Deployed, Tensor]:
    """A uniform subnet of a float model, its deployed form, and inputs."""
    net, x = supernet(model.eval(), shape, **{"bits": (4, 8)} | options)
    subnet = net.materialise(net.space.uniform(bits)).eval()
    return subnet, deploy(subnet, x), x


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random networks, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def residual() -> Make:
    """Makes a small residual network with awkward weights and statistics."""
    return lambda seed=0: shake(ResNet(), seed)


@pytest.fixture(scope="session")
def awkward() -> Callable[[nn.Module], nn.Module]:
    """Gives a network awkward weights and statistics."""
    return shake


@pytest.fixture(scope="session")
def supernet_of() -> Callable[..., tuple[SuperNet, Tensor]]:
    """See `supernet`."""
    return supernet


@pytest.fixture(scope="session")
def deployed_of() -> Callable[..., tuple[nn.Module, Deployed, Tensor]]:
    """See `deployed`."""
    return deployed


@pytest.fixture(scope="session")
def resnet() -> tuple[SuperNet, Tensor]:
    """A calibrated supernet and a batch of images; not to be changed. The same, whatever ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return supernet(shake(ResNet()), (3, 8, 8))


@pytest.fixture(scope="session")
def subnets(resnet: tuple[SuperNet, Tensor]) -> list[tuple[SubnetConfig, nn.Module, Deployed]]:
    """Uniform and random subnets of it (everything mixed), with their deployed forms; not to be changed."""
    net, x = resnet
    rng = np.random.default_rng(3)
    uniform = [net.space.uniform(bits) for bits in ("w8a8", "w4a4", "w2a2")]
    made = []
    for config in [*uniform, *(net.space.sample(rng) for _ in range(5)), net.space.smallest()]:
        subnet = net.materialise(config).eval()
        made.append((config, subnet, deploy(subnet, x)))
    return made
