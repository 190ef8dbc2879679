"""How far each choice moves the tensor itself: no labels, one float pass for what the layers read.

The simplest score. Weights alone at 2-4 bits it ranks nearly as well as any other; at 3-6 bits it does not see which
layers matter (our own measurement on ResNet-56).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from predictors.layer_inputs import reading, squares, thinned
from predictors.sensitivity import Table, Tensorwise, evaluated, sites
from supernet.elastic.supernet import SuperNet


class WeightMSE(Tensorwise):
    """Squared error of a weight, and of what a layer reads, for each choice.

    Args:
        relative: over the tensor's own sum of squares (the inverse of its SQNR), so that weights and inputs of all
            layers count alike; else as it is, summed over a weight and over what one image makes a layer read.
        images: most images used.
        elements: of each tensor that a layer reads, over all images; the error of the rest is like theirs.
        seed: which elements.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, relative: bool = True, images: int = 64, elements: int = 65536, seed: int = 0) -> None:
        super().__init__(images, elements=elements)
        self.relative, self.elements, self.seed = relative, elements, seed

    @torch.no_grad()
    def scores(self, net: SuperNet, images: Tensor, labels: Tensor | None) -> dict[str, Table]:
        """The error of each choice; labels are not used."""
        rng = np.random.default_rng(self.seed)
        with evaluated(net, net.space.largest(), images, floating=True) as run, reading(net) as seen:
            run(images)
        found = {}
        for _, gene, operand in sites(net):
            tensor, share = operand.module.weight if operand.argument is None else None, 1.0
            if tensor is None:
                whole = torch.cat([part.flatten() for part in seen[gene]])
                tensor = whole[thinned(whole, self.elements, rng)]
                share = len(tensor) / len(whole) * len(images)
            power = float(tensor.double().square().sum().clamp_min(1e-20))
            found[gene] = squares(operand.changes(tensor)) / (power if self.relative else share)
        return found
