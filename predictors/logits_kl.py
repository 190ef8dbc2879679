"""How far the network's answer moves when one choice of one tensor is quantized: no labels, forward passes only.

The score of NVIDIA ModelOpt's `kl_div` method and, beside the error of the layers' own outputs, the one that ranked
subnets best at equal size for severe and for moderate bit-widths (our own measurement on ResNet-56).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from predictors.sensitivity import Table, Tensorwise
from predictors.single_changes import checked, single_changes
from supernet.elastic.supernet import SuperNet


class LogitsKL(Tensorwise):
    """KL(p || q) in nats, mean over the images: p of the float network, q with one choice of one tensor quantized.

    Args:
        images: most images used.
        runs: choices of each tensor that are run, the others are interpolated (`predictors.single_changes`); None: all.

    Raises:
        ValueError: no images, or fewer than 2 runs.
    """

    def __init__(self, images: int = 64, runs: int | None = 5) -> None:
        super().__init__(images)
        self.runs = checked(runs)

    def scores(self, net: SuperNet, images: Tensor, labels: Tensor | None) -> dict[str, Table]:
        """The divergence of each choice; labels are not used."""
        return single_changes(net, images, divergence, "logits KL of single choices", self.runs)


def divergence(exact: Tensor, changed: Tensor) -> float:
    """KL(p || q) of two sets of logits [n, k, ...], mean over n (and positions)."""
    p, q = F.log_softmax(exact.double(), 1), F.log_softmax(changed.double(), 1)
    return float((p.exp() * (p - q)).sum(1).mean().clamp_min(0.0))
