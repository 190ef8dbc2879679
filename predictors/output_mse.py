"""How much each choice disturbs the output of its own layer: no labels, one float pass and some matrix products.

Of the training-free scores this one and the one-layer KL divergence rank subnets best at equal cost, at severe and at
moderate bit-widths (our own measurement on ResNet-56); Hessian traces fail at 2-3 bits, where a second-order
expansion does not hold.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from predictors.layer_outputs import observed, relative_errors
from predictors.sensitivity import Table, Tensorwise, sites
from supernet.elastic.supernet import SuperNet


class OutputMSE(Tensorwise):
    """Error of a layer's output, relative to its variance, for each choice of its weight alone and of its input alone.

    The layer gets the inputs that it has in the largest subnet in float, with recalibrated BatchNorm; error and
    variance are those of the output at some positions of some images. A weight's and an input's error add up, and so
    do those of layers.

    Args:
        images: most images used.
        positions: output positions of each layer that are looked at, spread over the images.
        seed: which positions.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, images: int = 64, positions: int = 256, seed: int = 0) -> None:
        super().__init__(images, positions=positions)
        self.positions, self.seed = positions, seed

    def scores(self, net: SuperNet, images: Tensor, labels: Tensor | None) -> dict[str, Table]:
        """The relative error of each choice; labels are not used."""
        seen = observed(net, images, self.positions, np.random.default_rng(self.seed))
        tables = {x.name: relative_errors(net.model.get_submodule(x.name), seen[x.name].inputs) for x in net.layers}
        return {gene: tables[layer.name][gene == layer.input] for layer, gene, _ in sites(net)}
