"""Our own form, the plainest: layer -> bits of its weight and of its input.

    {"conv1": {"weight": 8, "input": 8}, "layer1.0.conv1": [4, 8]}

A pair is weight bits, input bits. Granularity and symmetry are not said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from supernet.config import Stated, SubnetConfig
from supernet.elastic.supernet import SuperNet
from supernet.export.assignments.names import Names
from supernet.export.assignments.tensors import quantized, whole

KEYS = ("weight", "input")


class Plain:
    """Layer -> bits of weight and input."""

    def recognises(self, content: Any) -> bool:
        """Whether it is a mapping of pairs, or of mappings with `weight` and `input`."""
        return isinstance(content, Mapping) and bool(content) and all(_fits(value) for value in content.values())

    def read(self, content: Mapping[str, Any], names: Names) -> dict[str, Stated]:
        """What it says, by our dimension.

        Raises:
            ValueError: names that fit no layer, bits that are not whole numbers.
        """
        said = {}
        for theirs, ours in names.layers(content).items():
            value = content[theirs]
            pairs = value.items() if isinstance(value, Mapping) else zip(KEYS, value, strict=True)
            for what, bits in pairs:
                said[f"{ours}.{what}"] = Stated(whole(bits, theirs))
        return said

    def write(self, net: SuperNet, config: SubnetConfig, loose: bool = False) -> dict[str, Any]:
        """Bits of every layer that runs; granularity and symmetry cannot be said, which `loose` permits.

        Raises:
            ValueError: number formats that are not integer.
        """
        return {layer.name: {"weight": w.bits, "input": x.bits} for layer, w, x in quantized(net, config, "this form")}

    def beside(self, subnet: nn.Module, net: SuperNet) -> dict[str, bytes]:
        """No further file."""
        return {}


def _fits(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and set(value) <= set(KEYS)
    return isinstance(value, list | tuple) and len(value) == 2
