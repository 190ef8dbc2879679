"""A real supernet and task, tiny; and spaces without a network."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from supernet.config import Layer, PerChannel, PerTensor, QuantConfig
from supernet.cost import Costs, Factors, gated
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet
from supernet.formats.integer import Integer
from supernet.samplers.cost_first import CostFirst
from supernet.space import Dimension, SearchSpace


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x + self.norm(self.conv(x)))


class Tiny(nn.Module):
    """Stem, a stage of 1 to 3 residual blocks, a grouped convolution, a linear head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.stage = Stage(*[Residual(8) for _ in range(3)], min_depth=1)
        self.group = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4)
        self.pool, self.flat, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stage(self.relu(self.norm(self.stem(x))))
        return self.head(self.flat(self.pool(self.relu(self.group(x)))))


def images_of(n, rng):
    """Four classes by where the bright quarter is, with noise."""
    labels = rng.integers(0, 4, n)
    images = 0.7 * rng.standard_normal((n, 1, 8, 8))
    for image, label in zip(images, labels, strict=True):
        image[0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 1.0
    return torch.from_numpy(images.astype(np.float32)), torch.from_numpy(labels)


@pytest.fixture(scope="session")
def task():
    rng = np.random.default_rng(0)
    recalibrate, (x, y) = images_of(96, rng)[0], images_of(120, rng)

    def select(n=None):
        images, labels = x[:n], y[:n]
        return list(zip(images.split(50), labels.split(50), strict=True))

    return SimpleNamespace(recalibrate=lambda n=None: list(recalibrate[:n].split(48)), select=select)


@pytest.fixture(scope="session")
def make_net():
    """Function (**options) -> SuperNet of the tiny network, not calibrated."""

    def make(**options):
        torch.manual_seed(0)
        return SuperNet(Tiny(), torch.zeros(1, 1, 8, 8), **options)

    return make


@pytest.fixture(scope="session")
def calibrated(make_net, task):
    net = make_net(bits=(2, 3, 4, 8))
    net.calibrate(task.recalibrate())
    return net.eval()


@pytest.fixture
def net(calibrated):
    """A calibrated supernet of the tiny network, one's own."""
    return copy.deepcopy(calibrated)


WEIGHT = tuple(
    QuantConfig(Integer(b), g, s)
    for b, g, s in itertools.product(range(2, 9), (PerTensor(), PerChannel()), (True, False))
)
INPUT = tuple(QuantConfig(Integer(b), PerTensor(), s) for b, s in itertools.product(range(2, 9), (True, False)))


@pytest.fixture
def chain():
    """(space, costs) of 8 layers, three of which depend on a depth of 1 to 4."""
    dimensions, layers = [Dimension("s.depth", (1, 2, 3, 4))], []
    for k in range(8):
        gate = (("s.depth", tuple(range(k - 3, 5))),) if k > 4 else ()
        layers.append(Layer(f"l{k}", "conv", 1000 * (1 + 7 * k % 5), 64 * (1 + k), 8, True, False, (8, 8, 8), gate))
        dimensions += [Dimension(f"l{k}.weight", WEIGHT, gate), Dimension(f"l{k}.input", INPUT, gate)]
    space = SearchSpace(dimensions)
    return space, Costs(space, layers)


@pytest.fixture
def truth(chain):
    """(sensitivity, accuracy of rows): a falling curve of an additive error."""
    space, costs = chain
    rng = np.random.default_rng(11)
    terms = [((0,), np.array([0.4, 0.2, 0.1, 0.0]))]
    for layer in costs.layers:
        for gene in (layer.weight, layer.input):
            choices = space.dimensions[space.position[gene]].choices
            noise = np.array([4.0**-c.bits * (1.3 - 0.3 * c.symmetric) for c in choices])
            terms.append(gated(space, layer, (gene,), rng.lognormal(0, 1) * noise))
    sensitivity = Factors(tuple(terms))
    return sensitivity, lambda rows: 0.1 + 0.85 / (1 + (2 * sensitivity.value(rows)) ** 1.2)


@pytest.fixture
def measured(chain, truth):
    """Function (n, rng): n subnets flat over cost, measured on 400 images."""
    space, costs = chain

    def make(n, rng):
        rows = CostFirst(space, costs).ask(n, rng)
        halves = rng.binomial(200, truth[1](rows)[:, None], (n, 2)) / 200
        values = {kind: factors.value(rows) for kind, factors in costs.kinds.items()}
        return SimpleNamespace(indices=rows, scores=halves.mean(1), halves=halves, costs=values)

    return make
