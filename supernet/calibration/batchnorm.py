"""BatchNorm statistics of one subnet: a shared supernet has none that fit it, so they are measured before it is judged.

Statistics are reset and become the cumulative mean over the recalibration batches (Yu et al., BigNAS, ECCV 2020);
EQ-Net does not reset and takes a moving average, which keeps a part of what other subnets left.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """All BatchNorm layers of a model that track statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, Any]]) -> None:
    """Set the statistics of every BatchNorm to the mean over `batches`; all else evaluates, and nothing learns.

    Args:
        model: a module, or a supernet with the wanted subnet active.
        batches: inputs [n, ...] or (inputs, labels), at least one.

    Raises:
        ValueError: no batches; the statistics are then as before.
    """
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise ValueError(
            "BatchNorm recalibration needs at least one batch; raise the number of recalibration images above 0"
        )
    layers = norms(model)
    modes = [(m, m.training) for m in model.modules()]
    momenta = [layer.momentum for layer in layers]
    sums = [(torch.zeros_like(mean), torch.zeros_like(var)) for mean, var in map(_statistics, layers)]
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = 1.0  # each batch's own, added up below; None would be data-dependent in a compiled graph
            layer.training = True
        count = 0
        for batch in itertools.chain([first], remaining):
            count += 1
            model(batch if isinstance(batch, Tensor) else batch[0])
            for layer, parts in zip(layers, sums, strict=True):
                for total, part in zip(parts, _statistics(layer), strict=True):
                    total += part
        for layer, parts in zip(layers, sums, strict=True):
            for total, part in zip(parts, _statistics(layer), strict=True):
                part.copy_(total / count)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode


def _statistics(layer: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """Mean and variance that a layer tracks."""
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var


@contextmanager
def recalibrated(model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, Any]]) -> Iterator[nn.Module]:
    """Inside, the statistics are those of the active subnet on `batches`; afterwards as before, also after an error."""
    layers = norms(model)
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    try:
        recalibrate(model, batches)
        yield model
    finally:
        for layer, buffers in zip(layers, before, strict=True):
            for name, buffer in buffers.items():
                getattr(layer, name).copy_(buffer)
