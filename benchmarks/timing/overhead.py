"""Python time of a step that grows with the number of layers, outside the network's own arithmetic.

Two supernets of tiny convolutions, a short and a long one; the difference of the medians over the difference of the
layers is the slope, in milliseconds for each 1,000 layers. Parts: `bind` enters and leaves `as_subnet` with a fresh
random row, `draw` samples a configuration, `update` is the optimizers' step with its zeroing of gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from supernet.elastic.supernet import SuperNet
from supernet.samplers.sandwich import Sandwich
from supernet.training.losses import GroupProgressive
from supernet.training.module import Schedule, SupernetModule

SHORT, LONG = 50, 450
REPEATS = 200


def chain(layers: int) -> SuperNet:
    """A supernet of `layers` 1x1 convolutions with four channels, deployment sites on."""
    model = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(layers)))
    return SuperNet(model, torch.randn(1, 4, 2, 2))


def times(net: SuperNet, repeats: int, seed: int) -> dict[str, float]:
    """Median seconds of each part."""
    rng = np.random.default_rng(seed)
    rows = iter(net.space.sample_indices(repeats + 1, rng))
    optimizers = _optimizers(net)
    net(net.example).sum().backward()
    grads = {p: p.grad.clone() for p in net.parameters() if p.grad is not None}

    def bind() -> None:
        with net.as_subnet(next(rows)):
            pass

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def refill() -> None:
        for p, grad in grads.items():
            p.grad = grad

    return {
        "bind": _median(bind, repeats),
        "draw": _median(lambda: net.space.sample(rng), repeats),
        "update": _median(update, repeats, refill),
    }


def slopes(short: Mapping[str, float], long: Mapping[str, float], layers: int) -> dict[str, float]:
    """Milliseconds for each 1,000 layers, from the seconds of two chains that differ by `layers`."""
    return {part: 1e6 * (long[part] - short[part]) / layers for part in short}


def python_time(seed: int, repeats: int = REPEATS, short: int = SHORT, long: int = LONG) -> dict[str, float]:
    """The slope of each part in milliseconds for each 1,000 layers."""
    few, many = (times(chain(layers), repeats, seed) for layers in (short, long))
    return slopes(few, many, long - short)


def _optimizers(net: SuperNet) -> list[torch.optim.Optimizer]:
    task: Any = None  # the optimizers do not look at it
    sampler = Sandwich(net.space, net.costs)
    return SupernetModule(
        net, task, sampler, GroupProgressive(), subnets=1, schedule=Schedule(), seed=0, total_steps=1
    ).configure_optimizers()


def _median(part: Callable[[], Any], repeats: int, before: Callable[[], None] | None = None) -> float:
    """Median seconds of `part`; `before` is run each time and not counted. The first run is not counted either."""
    taken = []
    for _ in range(repeats + 1):
        if before is not None:
            before()
        start = time.perf_counter()
        part()
        taken.append(time.perf_counter() - start)
    return median(taken[1:])
