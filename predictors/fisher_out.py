"""How much the loss leans on what each choice adds to its layer's output: one backward pass for all choices.

The score of NVIDIA ModelOpt's `auto_quantize` (method `gradient`): sum of gradient^2 x change^2 over the elements of
the output, the diagonal of the empirical Fisher information there.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from predictors.layer_inputs import squares
from predictors.layer_outputs import observed, output_changes
from predictors.sensitivity import Loss, Table, Tensorwise, sites
from supernet.elastic.supernet import SuperNet


class FisherOut(Tensorwise):
    """Sum over a layer's output of squared gradient times squared change, mean over the images.

    Both are taken in the largest subnet in float, the change from one choice of the weight or of the input alone. We
    score inputs too, which ModelOpt switches together with the weight.

    Args:
        images: most images used.
        positions: output positions of each layer that are looked at; the sum is scaled up to all of them.
        seed: which positions.
        loss: (logits, labels) -> mean over a batch; None: cross-entropy.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, images: int = 64, positions: int = 1024, seed: int = 0, loss: Loss | None = None) -> None:
        super().__init__(images, positions=positions)
        self.positions, self.seed, self.loss = positions, seed, loss or F.cross_entropy

    def scores(self, net: SuperNet, images: Tensor, labels: Tensor | None) -> dict[str, Table]:
        """The weighted change of each choice."""
        seen = observed(net, images, self.positions, np.random.default_rng(self.seed), labels, self.loss)
        found = {}
        for layer, gene, operand in sites(net):
            sample = seen[layer.name]
            assert sample.gradient is not None
            lean = sample.gradient.double().square() / (sample.share * len(images))
            found[gene] = squares(output_changes(operand, sample.inputs), lean)
        return found
