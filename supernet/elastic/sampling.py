"""What start scales are set from: samples of the activations of a float pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SAMPLES_PER_BATCH = 1 << 14


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


class Sample:
    """What a quantizer's input looked like: an even sample of each batch, smallest and largest value of all.

    A forward pre-hook. Values are taken in the order of memory, so that nothing is copied whatever the layout. The
    extremes are kept apart: among the sample each would count as if it were as frequent as what one value stands for.

    Attributes:
        count: values met, of which the sample holds a part.
    """

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.limits: list[Tensor] = []
        self.count = 0

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        strides = x.stride()
        flat = x.permute(sorted(range(x.dim()), key=lambda axis: -strides[axis])).reshape(-1)
        step = max(1, flat.numel() // SAMPLES_PER_BATCH)
        while math.gcd(step, flat.numel()) > 1:  # else only some columns of the images would be met
            step += 1
        self.kept.append(flat[::step].clone())  # a view would keep the whole tensor
        self.limits.append(torch.stack(flat.aminmax()))
        self.count += flat.numel()

    @property
    def values(self) -> Tensor:
        """[m] the sample."""
        return torch.cat(self.kept)

    @property
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest value of all batches."""
        least, most = torch.stack(self.limits).unbind(1)
        return float(least.min()), float(most.max())
