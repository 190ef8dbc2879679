"""Noise against signal at the network's output when one choice of one tensor is quantized: the list of AIMET's AMP.

Pandey et al., A Practical Mixed Precision Algorithm for Post-Training Quantization, 2023, arXiv:2302.05397:
no labels, forward passes only.
"""

from __future__ import annotations

from torch import Tensor

from predictors.sensitivity import Table, Tensorwise
from predictors.single_changes import checked, single_changes
from supernet.elastic.supernet import SuperNet


class SQNR(Tensorwise):
    """Power of the error of the logits over the power of the logits, one choice of one tensor quantized.

    That is 10 ** (-SQNR / 10), so that scores add up (the paper's list is sorted by the dB, never summed).

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
        """The noise-to-signal ratio of each choice; labels are not used."""
        return single_changes(net, images, noise, "SQNR of single choices", self.runs)


def noise(exact: Tensor, changed: Tensor) -> float:
    """Noise-to-signal ratio of logits, a plain number."""
    return float((changed - exact).double().square().sum() / exact.double().square().sum().clamp_min(1e-20))
