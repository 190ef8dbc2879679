"""HAWQ: layer -> bits, as its published bit configurations are.

    {"stage1.unit1.quant_act": 8, "stage1.unit1.quant_convbn1": 4, ..., "quant_output": 8}

HAWQ's modules are those of pytorchcv's residual networks; ours those of timm and torchvision:

| HAWQ                                           | here                                                      |
|------------------------------------------------|-----------------------------------------------------------|
| `quant_input`                                  | `conv1.input`                                             |
| `quant_init_block_convbn`, `quant_init_convbn` | `conv1.weight`                                            |
| `stageI.unitJ.quant_convbnK`                   | `layerI.{J-1}.convK.weight`                               |
| `stageI.unitJ.quant_identity_convbn`           | `layerI.{J-1}.downsample.0.weight`                        |
| `stageI.unitJ.quant_act`                       | `.input` of `layerI.{J-1}.conv1` and of `.downsample.0`   |
| `stageI.unitJ.quant_actK`                      | `layerI.{J-1}.conv{K+1}.input`                            |
| `quant_act_output`, `quant_output`             | `fc.input`, `fc.weight`                                   |
| `*quant_act_int32`                             | nothing: the sum of a block, wider than any choice here   |

A name without `quant_` is a layer, whose weight and input have these bits both: HAWQ ties them. Weights are symmetric
per channel, activations symmetric per tensor (Yao et al., HAWQ-V3, ICML 2021, arXiv:2011.10680, section 3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from supernet.config import PerChannel, PerTensor, Stated
from supernet.export.assignments.names import WAY_OUT, Names, few
from supernet.export.assignments.tensors import whole

SUMS = "quant_act_int32"
WHOLE = {
    "quant_input": ("conv1", "input"),
    "quant_init_block_convbn": ("conv1", "weight"),
    "quant_init_convbn": ("conv1", "weight"),
    "quant_act_output": ("fc", "input"),
    "quant_output": ("fc", "weight"),
}


class Hawq:
    """Bit configurations of HAWQ."""

    def recognises(self, content: Any) -> bool:
        """Whether it maps names to whole numbers."""
        return isinstance(content, Mapping) and bool(content) and all(type(bits) is int for bits in content.values())

    def read(self, content: Mapping[str, int], names: Names) -> dict[str, Stated]:
        """What it says, by our dimension.

        Raises:
            ValueError: names that fit no layer here.
        """
        said: dict[str, Stated] = {}
        strange = []
        for theirs, bits in content.items():
            if theirs.endswith(SUMS):
                continue
            meant = _meant(theirs, names)
            strange += [] if meant or theirs in names.renamed else [theirs]
            said |= {name: _stated(name, whole(bits, theirs)) for name in meant}
        if strange:
            raise ValueError(f"no layer here is called {few(strange)}; there are {few(names.kinds)}: {WAY_OUT}")
        return said


def _meant(theirs: str, names: Names) -> list[str]:
    """Our dimensions that a name of theirs is about."""
    if theirs in names.renamed or "quant_" not in theirs:
        layer = names.layer(theirs)
        if layer is None or layer not in names.kinds:
            return [layer] if layer else []
        return [f"{layer}.weight", f"{layer}.input"]
    found = [(names.layer(path), what) for path, what in _paths(theirs)]
    return [f"{layer}.{what}" for layer, what in found if layer is not None]


def _paths(theirs: str) -> list[tuple[str, str]]:
    """Paths in timm's networks, and `weight` or `input`."""
    if theirs in WHOLE:
        return [WHOLE[theirs]]
    match = re.fullmatch(r"stage(\d+)\.unit(\d+)\.quant_(convbn|identity_convbn|act)(\d*)", theirs)
    if not match:
        return []
    block, kind, number = f"layer{match[1]}.{int(match[2]) - 1}", match[3], match[4]
    if kind == "convbn":
        return [(f"{block}.conv{number}", "weight")]
    if kind == "identity_convbn":
        return [(f"{block}.downsample.0", "weight")]
    if number:
        return [(f"{block}.conv{int(number) + 1}", "input")]
    return [(f"{block}.conv1", "input"), (f"{block}.downsample.0", "input")]


def _stated(name: str, bits: int) -> Stated:
    return Stated(bits, PerChannel() if name.endswith(".weight") else PerTensor(), True)
