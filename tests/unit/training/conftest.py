"""A task of a few dozen images that can be learned, and a network with every kind of part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernet.backbones.cifar_resnet import BasicBlock
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet
from supernet.interfaces import Batch


class Spots:
    """Three classes of noise with one bright corner each.

    Args:
        n: images of each part.
        batch: images of a batch.
        fail_at: (epoch, batch) before which the data ends in an error, as if the process was killed.
        poison_at: (epoch, batch) that holds a NaN.
    """

    name, n_classes, in_channels = "spots", 3, 3

    def __init__(
        self,
        n: int = 24,
        batch: int = 8,
        fail_at: tuple[int, int] | None = None,
        poison_at: tuple[int, int] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(n) % 3
        self.images = torch.randn(n, 3, 8, 8, generator=generator)
        for k, corner in enumerate(((0, 0), (0, 4), (4, 0))):
            self.images[self.labels == k, :, corner[0] : corner[0] + 4, corner[1] : corner[1] + 4] += 2
        self.batch, self.fail_at, self.poison_at, self.epoch = batch, fail_at, poison_at, 0

    def example(self) -> Tensor:
        return self.images[:1]

    def train(self, rng: np.random.Generator) -> Iterator[Batch]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = torch.from_numpy(rng.permutation(len(self.labels)))
        shifts = torch.from_numpy(rng.normal(size=(len(order), 1, 1, 1)).astype(np.float32))
        for k in range(self.steps_per_epoch()):
            if (epoch, k) == self.fail_at:
                raise RuntimeError("killed")
            at = order[k * self.batch : (k + 1) * self.batch]
            images = self.images[at] + 0.1 * shifts[at]
            yield images * (torch.nan if (epoch, k) == self.poison_at else 1), self.labels[at]

    def steps_per_epoch(self) -> int:
        return len(self.labels) // self.batch

    def recalibrate(self, n: int | None = None) -> list[Tensor]:
        return list(self.images[:n].split(self.batch))

    def select(self, n: int | None = None) -> list[Batch]:
        return list(zip(self.images[:n].flip(-1).split(self.batch), self.labels[:n].split(self.batch), strict=True))

    def test(self, n: int | None = None) -> list[Batch]:
        return self.select(n)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def describe(self) -> dict[str, Any]:
        return {"train": len(self.labels)}


def model() -> nn.Module:
    """Six layers, two of which may be left out."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        Stage(BasicBlock(4, 4), BasicBlock(4, 4), min_depth=1),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


@pytest.fixture
def spots() -> type[Spots]:
    return Spots


@pytest.fixture
def net() -> SuperNet:
    """Calibrated, with 2, 4 and 8 bits."""
    made = SuperNet(model(), Spots().example(), bits=(2, 4, 8))
    made.calibrate(Spots().recalibrate())
    return made


@pytest.fixture
def another() -> Any:
    """Makes further networks, equal to `net`."""

    def make() -> SuperNet:
        made = SuperNet(model(), Spots().example(), bits=(2, 4, 8))
        made.calibrate(Spots().recalibrate())
        return made

    return make
