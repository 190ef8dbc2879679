"""How much the loss rises when one choice of one tensor is quantized: labels, forward passes only.

The plain baseline, MQBench's default. It may be negative for what does no harm; single losses are noisy where the
change is small, so it wants more images than the divergence of the logits.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from predictors.sensitivity import Loss, Table, Tensorwise, float_targets
from predictors.single_changes import checked, single_changes
from supernet.elastic.supernet import SuperNet


class LossChange(Tensorwise):
    """Loss with one choice of one tensor quantized, minus that of the float network.

    Args:
        images: most images used.
        runs: choices of each tensor that are run, the others are interpolated (`predictors.single_changes`); None: all.
        loss: (logits, labels) -> mean over a batch; None: cross-entropy.

    Raises:
        ValueError: no images, or fewer than 2 runs.
    """

    def __init__(self, images: int = 64, runs: int | None = 5, loss: Loss | None = None) -> None:
        super().__init__(images)
        self.runs, self.loss = checked(runs), loss or F.cross_entropy

    def scores(self, net: SuperNet, images: Tensor, labels: Tensor | None) -> dict[str, Table]:
        """The change of each choice, repaired later."""
        wanted = float_targets(net, images, labels)

        def judge(exact: Tensor, changed: Tensor) -> float:
            return float(self.loss(changed.double(), wanted) - self.loss(exact.double(), wanted))

        return single_changes(net, images, judge, "loss change of single choices", self.runs)
