"""Data, networks and the weights' optimizer, equal for fp32, ours and the peers; torch and timm are all it needs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from benchmarks.timing.contestants import CHANNELS_LAST, Problem
from benchmarks.timing.resnet20 import ResNet20

CLASSES = 10
LEARNING_RATE = 1e-3
"""Small, so that no contestant leaves the range of normal numbers on random labels; it does not change the time."""
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
CALIBRATION_IMAGES = 512
"""What our supernet's scales start from, as conf/train.yaml has it."""


def arranged(x: Tensor, layout: str) -> Tensor:
    """`x` [n, c, h, w] in memory format `layout`."""
    return x.contiguous(memory_format=memory_format(layout))


def batch(problem: Problem, layout: str, seed: int) -> tuple[Tensor, Tensor]:
    """Random images [batch, 3, size, size] and labels [batch]; the same seed gives every contestant the same."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(problem.batch, 3, problem.size, problem.size, generator=rng)
    return arranged(images, layout), torch.randint(0, CLASSES, (problem.batch,), generator=rng)


def calibration(problem: Problem, layout: str, seed: int, images: int = CALIBRATION_IMAGES) -> list[Tensor]:
    """Random images to start scales from, at least `images` of them, in batches of the step's size."""
    rng = torch.Generator().manual_seed(seed + 1)
    shape = (problem.batch, 3, problem.size, problem.size)
    return [arranged(torch.randn(shape, generator=rng), layout) for _ in range(-(-images // problem.batch))]


def memory_format(layout: str) -> torch.memory_format:
    """torch's name of a layout."""
    return torch.channels_last if layout == CHANNELS_LAST else torch.contiguous_format


def network(problem: Problem) -> nn.Module:
    """The float network of a problem with random weights, the last BatchNorm of a block not at zero."""
    if problem.name == "resnet20":
        return ResNet20()
    import timm

    if problem.name == "resnet18":
        return timm.create_model("resnet18", num_classes=CLASSES, zero_init_last=False)
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, img_size=problem.size)


def sgd(parameters: Iterable[Tensor]) -> torch.optim.SGD:
    """SGD with Nesterov momentum, and weight decay on what has two or more axes, as SupernetModule makes it."""
    learned = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=MOMENTUM, nesterov=True)
