"""What every layer of the float network reads, as tensors of its own that can be differentiated by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from predictors.sensitivity import Table, operands, sites
from supernet.elastic.supernet import SuperNet


@contextmanager
def reading(net: SuperNet) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, a pass leaves what every layer reads: a tensor for each call, by the name of the gene that it belongs to.

    Each is the layer's own, so that a derivative by it is by what this layer reads, even where others read the same.
    """
    seen: dict[str, list[Tensor]] = {gene: [] for _, gene, operand in sites(net) if operand.argument is not None}

    def hook_of(genes: tuple[str, str]) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            own = tuple(argument.view_as(argument) for argument in arguments)
            for gene, operand in zip(genes, operands(module), strict=True):
                if operand.argument is not None:
                    seen[gene].append(operand.of(own))
            return own

        return hook

    handles = [
        net.model.get_submodule(x.name).register_forward_pre_hook(hook_of((x.weight, x.input))) for x in net.layers
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def weights(net: SuperNet) -> dict[str, Tensor]:
    """The weight of every layer that has one, by its gene's name."""
    return {gene: operand.module.weight for _, gene, operand in sites(net) if operand.argument is None}


@contextmanager
def differentiable(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, gradients can be taken by these parameters, also by those that are frozen."""
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


def thinned(tensor: Tensor, elements: int, rng: np.random.Generator) -> Tensor:
    """Flat positions of at most so many elements of a tensor."""
    n = tensor.numel()
    kept = np.arange(n) if n <= elements else np.sort(rng.choice(n, elements, replace=False))
    return torch.from_numpy(kept).to(tensor.device)


def squares(changes: Iterable[Tensor], factor: Tensor | float = 1.0) -> Table:
    """Sum of the squares of each of some changes, every element times `factor`."""
    return np.array([float((change.double().square() * factor).sum()) for change in changes])
