"""Costs that are sums over the layers that run: BitOps in three conventions, bytes, MACs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from supernet.config import Layer, PerChannel, QuantConfig
from supernet.factors import Factors, bits_of, gated
from supernet.space import SearchSpace


def bitops(space: SearchSpace, layers: Sequence[Layer], first_last: str = "true") -> Factors:
    """Sum of MACs x weight bits x input bits over the layers that run.

    Three conventions are in print and differ by 20 % for a ResNet-18 at 4 bits: all layers at their true bits ("true"),
    first and last counted at 8 bits ("8"), first and last left out ("out").
    """
    terms = []
    for k, layer in enumerate(layers):
        edge = k in (0, len(layers) - 1)
        if edge and first_last == "out":
            continue
        if edge and first_last == "8":
            terms.append(gated(space, layer, (), np.array(64.0 * layer.macs)))
        else:
            product = bits_of(space, layer.weight)[:, None] * bits_of(space, layer.input)
            terms.append(gated(space, layer, (layer.weight, layer.input), layer.macs * product))
    return Factors(tuple(terms))


def stored_bytes(space: SearchSpace, layers: Sequence[Layer]) -> Factors:
    """Bytes of what a file has to hold: packed weight codes, scales (4 B), zero-points (1 B), biases (4 B).

    Behind a BatchNorm the scale is per channel and there is a bias in the file, whatever the granularity in training
    was; the input's own scale and zero-point count 5 B.
    """
    terms = []
    for layer in layers:
        table = []
        for choice in space.dimensions[space.position[layer.weight]].choices:
            assert isinstance(choice, QuantConfig)
            per_channel = layer.behind_norm or isinstance(choice.granularity, PerChannel)
            scales = layer.outputs if per_channel else 1
            codes = math.ceil(layer.weights * choice.bits / 8)
            bias = 4 * layer.outputs if layer.bias or layer.behind_norm else 0
            table.append(codes + scales * (4 if choice.symmetric else 5) + bias + 5)
        terms.append(gated(space, layer, (layer.weight,), np.array(table, dtype=float)))
    return Factors(tuple(terms))


def macs(space: SearchSpace, layers: Sequence[Layer]) -> Factors:
    """Multiply-accumulates of one example, bits left aside."""
    return Factors(tuple(gated(space, layer, (), np.array(float(layer.macs))) for layer in layers))
