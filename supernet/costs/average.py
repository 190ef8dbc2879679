"""Average bits: a quotient of two sums, both of which depend on what runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from supernet.config import Layer
from supernet.factors import Factors, Table, Term, bits_of, gated
from supernet.space import Indices, SearchSpace


@dataclass(frozen=True)
class Average:
    """total / count, 0 where nothing is counted.

    total / count <= limit exactly if total + limit (most - count) <= limit most; both addends are sums of lookups.

    Attributes:
        total: what is averaged, times its count.
        count: how often it counts.
        most: the largest value of `count`, above 0.
    """

    total: Factors
    count: Factors
    most: float

    def value(self, indices: Indices) -> Table:
        """[n] averages of canonical rows [n, d]."""
        count = self.count.value(indices)
        return self.total.value(indices) / np.where(count > 0, count, 1.0)

    @property
    def parts(self) -> tuple[Factors, ...]:
        """The total, and what the count lacks of its largest value."""
        return self.total, Factors((((), np.array(self.most)),)) + self.count * -1.0

    def linear(self, limit: float) -> tuple[Table, Table]:
        """One sum; see the head of the class."""
        return np.array([[1.0, limit]]), np.array([limit * self.most])


def average_weight_bits(space: SearchSpace, layers: Sequence[Layer]) -> Average:
    """Bits of a weight, averaged over the weights of the layers that run, without the first and the last layer.

    "3 MP" in EQ-Net (Xu et al., ICCV 2023, arXiv:2308.07650). Scales and biases are not counted; `bytes` counts them.
    """
    return _average(space, [(layer, layer.weight, layer.weights) for layer in inner(layers) if layer.weights])


def average_input_bits(space: SearchSpace, layers: Sequence[Layer]) -> Average:
    """Bits of an input element, averaged over the inputs of the layers that run, without the first and the last layer.

    An input counts with its number of elements, as in EQ-Net; one that two layers read counts twice. A product of two
    activations has two inputs.
    """
    read = []
    for layer in inner(layers):
        read.append((layer, layer.input, math.prod(layer.shape)))
        if layer.kind == "matmul":  # [.., m, k] x [.., k, n]: macs = .. m k n
            read.append((layer, layer.weight, layer.macs // layer.shape[-2]))
    return _average(space, read)


def inner(layers: Sequence[Layer]) -> Sequence[Layer]:
    """All but the first and the last layer; all where nothing else is left."""
    return layers[1:-1] or layers


def _average(space: SearchSpace, read: Sequence[tuple[Layer, str, int]]) -> Average:
    total: list[Term] = [gated(space, layer, (gene,), n * bits_of(space, gene)) for layer, gene, n in read]
    count: list[Term] = [gated(space, layer, (), np.array(float(n))) for layer, _, n in read]
    return Average(Factors(tuple(total)), Factors(tuple(count)), max(1.0, sum(float(n) for _, _, n in read)))
