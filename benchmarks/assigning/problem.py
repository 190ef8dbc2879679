"""What every tool is given: the same network, images, candidate bits and limits; torch is all it needs.

The driver writes `network.pt` and one `images-<seed>.pt` for each seed into a folder; a worker in a tool's own
environment reads them, so that nothing of ours has to be installed there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing.resnet20 import ResNet20

BITS = (2, 3, 4, 5, 6, 7, 8)
"""Of weights and of inputs; the supernet's."""
CHAIN = tuple((w, a) for w in BITS for a in (w, w + 1) if a <= BITS[-1])
"""(weight, input) bits offered jointly where a tool takes only such pairs. Both grow along the chain, so that dearer
never is worse, as ModelOpt takes for granted."""
FIXED = ("conv1", "linear")
"""First and last layer, at 8 bits here as in the supernet."""
FIXED_BITS = 8
IMAGES = 256
"""Drawn by each seed from the recalibration images, for calibration and scores of every tool."""
BATCH = 64
RESOLUTION = {"layer1": 32, "layer2": 16, "layer3": 8}
"""Height and width of a stage's outputs: a weight of a convolution is used at each of them."""


def network(folder: Path) -> nn.Module:
    """The trained float network."""
    net = ResNet20()
    net.load_state_dict(torch.load(folder / "network.pt", weights_only=True))
    return net.eval()


def batches(folder: Path, seed: int) -> Batches:
    """Images [64, 3, 32, 32] and labels [64] that a seed has drawn."""
    kept = torch.load(folder / f"images-{seed}.pt", weights_only=True)
    return list(zip(kept["images"].split(BATCH), kept["labels"].split(BATCH), strict=True))


def layers(net: nn.Module) -> dict[str, Any]:
    """Convolutions and the linear layer by path, in order of execution."""
    return {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def uses(name: str) -> int:
    """Multiplications with each weight of a layer, for one image of 32 x 32 pixels."""
    if name == "linear":
        return 1
    return RESOLUTION.get(name.split(".")[0], RESOLUTION["layer1"]) ** 2


Batches = list[tuple[Tensor, Tensor]]
Entry = dict[str, Any]
"""One assignment of a tool: `asked`, its own budget, and `map`, as eb.import_bits reads it."""
Sweep = list[Entry]
