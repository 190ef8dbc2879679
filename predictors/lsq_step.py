"""The learned steps themselves: LIMPQ. No labels and no pass; a trained supernet has them for nothing.

Tang et al., ECCV 2022, arXiv:2203.08368: steps of all bit-widths are trained jointly, and the integer program minimises
the sum over the layers of the input's step and alpha times the weight's. A wide step is a coarse grid on a tensor that
could not do with a finer one at these bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from predictors.sensitivity import Table, Tensorwise, sites
from supernet.elastic.supernet import SuperNet
from supernet.formats.integer import Integer
from supernet.quant.quantizer import Quantizer


class LSQStep(Tensorwise):
    """Mean distance between neighbouring levels of each choice, as the supernet has learned it.

    That is the step itself of an integer grid, the mean over the channels where each has one; an input that passes
    through, because a site before it has quantized it already, has none (0). Images serve for the prices of depth only.
    Before training, the steps are those of calibration, which say how wide a tensor is and no more.

    Args:
        alpha: factor of a weight's step against an input's; the paper's 2.
        images: most images used where the depth is elastic.

    Raises:
        ValueError: a number that is too small.
    """

    def __init__(self, alpha: float = 2.0, images: int = 64) -> None:
        super().__init__(images)
        if alpha <= 0:
            raise ValueError(f"alpha must be positive, got {alpha}; the paper's is 2")
        self.alpha = alpha

    def scores(self, net: SuperNet, images: Tensor, labels: Tensor | None) -> dict[str, Table]:
        """The step of each choice."""
        with net.as_subnet(net.active):  # the quantizers hold what the bank has now
            return {
                gene: steps(operand.quantizer) * (self.alpha if operand.argument is None else 1.0)
                for _, gene, operand in sites(net)
            }


@torch.no_grad()
def steps(quantizer: Quantizer) -> Table:
    """Mean distance between neighbouring levels of each choice."""
    found = []
    for choice, (start, size) in enumerate(quantizer.spans):
        config, (low, high) = quantizer.choices[choice], quantizer.limits(choice)
        integer = isinstance(config.format, Integer)
        gaps = high - low if integer else len(config.format.levels(config.symmetric)) - 1
        step = float(quantizer.scale[start : start + size].double().mean()) * (high - low) / gaps
        passes = bool(quantizer.bypass) and config.bits >= quantizer.bypass
        found.append(0.0 if passes else step)
    return np.array(found)
