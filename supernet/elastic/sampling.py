"""What start scales are set from: samples of the activations of a float pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SAMPLES_PER_BATCH = 1 << 16


@contextmanager
def batch_statistics(norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Inside, layers whose statistics are still those of initialisation use the batch's, and learn nothing from it.

    With mean 0 and variance 1 throughout, a fresh network's activations lie far from where training will put them.
    """
    fresh = [
        norm
        for norm in norms
        if norm.running_mean is not None
        and norm.running_var is not None
        and not norm.running_mean.any()
        and bool((norm.running_var == 1).all())
    ]
    momenta = [norm.momentum for norm in fresh]
    try:
        for norm in fresh:
            norm.training, norm.momentum = True, 0.0
        yield
    finally:
        for norm, momentum in zip(fresh, momenta, strict=True):
            norm.training, norm.momentum = False, momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.zero_()


def catching(kept: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A forward pre-hook that keeps an even sample of its input, smallest and largest value among it."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        flat = inputs[0].reshape(-1)
        step = max(1, flat.numel() // SAMPLES_PER_BATCH)
        while math.gcd(step, flat.numel()) > 1:  # else only some columns of the images would be met
            step += 1
        kept.append(torch.cat([flat[::step], flat.min()[None], flat.max()[None]]))

    return hook
