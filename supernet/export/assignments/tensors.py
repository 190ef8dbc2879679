"""What a subnet says of its layers, in the order in which they run; and what counts as a number of bits."""

from __future__ import annotations

from typing import Any

from supernet.config import Layer, QuantConfig, SubnetConfig
from supernet.elastic.supernet import SuperNet
from supernet.export.assignments.names import few
from supernet.formats.integer import Integer


def quantized(net: SuperNet, config: SubnetConfig, form: str) -> list[tuple[Layer, QuantConfig, QuantConfig]]:
    """Layers that run, each with the choices of its weight and of its input.

    Args:
        net: the supernet.
        config: the subnet.
        form: what it is to be written as, for the message.

    Raises:
        ValueError: a number format that is not integer, or a configuration of another space.
    """
    subnet = net.space.config(net.row(config))
    found, strange = [], []
    for layer in (layer for layer in net.layers if layer.weight in subnet):
        weight, data = subnet[layer.weight], subnet[layer.input]
        assert isinstance(weight, QuantConfig) and isinstance(data, QuantConfig)
        found.append((layer, weight, data))
        strange += [] if isinstance(weight.format, Integer) else [f"{layer.weight} = {weight}"]
    if strange:
        raise ValueError(f"{form} has integers only, this subnet has {few(strange)}; choose a subnet without them")
    return found


def whole(bits: Any, name: str) -> int:
    """Bits as a whole number; ValueError names the layer else."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits < 1:
        raise ValueError(f"bits are whole numbers from 1 on, {name} has {bits!r}; write e.g. 4")
    return bits
