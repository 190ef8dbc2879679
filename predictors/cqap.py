"""EQ-Net's quality predictor (CQAP): a deep perceptron over one-hot bits and the form of each tensor."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from predictors.encoding import one_hot
from predictors.members import Members, layers, looked_up, minibatches, through
from supernet.cost import Costs, Factors
from supernet.space import Indices, SearchSpace

ROUNDS = 25
"""Steps of an epoch over the paper's 80 % of 8,000 pairs in batches of 256."""


class CQAP(Members):
    """Conditional quantization-aware accuracy predictor (Xu et al., EQ-Net, ICCV 2023, section 3.4, and its code).

    Hidden layers of equal width with ReLU, SmoothL1, Adam 4e-4 with weight decay 1e-5 (the code's; the paper says
    SGD), batches of 256, 100 epochs. The encoding follows the space: one-hot bits of each tensor, and one-hot
    granularity, symmetry and format where a tensor has several.

    Departures: the paper has 6 bits for one form of the whole network (of which its code uses 4) and leaves first and
    last layer out; here each tensor has its own form, elastic depth and width are encoded alike, and inactive genes
    are 0. Scores are standardised in place of divided by 100. With fewer pairs batches are smaller, at least 16, so
    that an epoch has about as many steps as the paper's; with 8,000 it is the same. Some such perceptrons instead of
    one, each without a part of the pairs, give the uncertainty.

    Args:
        space: what is predicted.
        costs, sensitivity: taken because all predictors are constructed alike.
        rng: draws starts, parts and batches; None: one seeded with 0.
        members: number of perceptrons, at least 2.
        hidden: width of the hidden layers.
        depth: number of hidden layers.
        epochs: passes over the pairs.
        batch: most pairs of a step.
        unseen: share of the pairs that each member does not see, in (0, 1).
        learning_rate, weight_decay: of Adam.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        space: SearchSpace,
        costs: Costs | None = None,
        sensitivity: Factors | None = None,
        rng: np.random.Generator | None = None,
        members: int = 3,
        hidden: int = 200,
        depth: int = 7,
        epochs: int = 100,
        batch: int = 256,
        unseen: float = 0.2,
        learning_rate: float = 4e-4,
        weight_decay: float = 1e-5,
    ) -> None:
        del costs, sensitivity
        if min(hidden, depth, epochs, batch) < 1:
            raise ValueError(
                f"hidden, depth, epochs and batch are at least 1; got {hidden}, {depth}, {epochs} and {batch}"
            )
        own = {"hidden": hidden, "depth": depth, "epochs": epochs, "batch": batch}
        own_rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
        super().__init__(space, None, rng, members, unseen, own | own_rates)
        self.inputs = one_hot(space)
        self.encoding = self.inputs.digest

    def _learned(self, indices: Indices, y: Float[Tensor, " n"], unseen: Tensor) -> dict[str, Tensor]:
        o = self.options
        x = self.inputs.features(self.inputs.read(indices)[1])
        weights = layers(o["members"], (self.inputs.width, *[o["hidden"]] * o["depth"], 1), self.rng)

        def output(at: Tensor) -> Tensor:
            return through(weights, torch.baddbmm(weights["b1"], x[at], weights["w1"]), o["depth"] + 1)

        size = min(o["batch"], max(16, -(-len(y) // ROUNDS)))
        rates = {"lr": o["learning_rate"], "weight_decay": o["weight_decay"]}
        minibatches(weights, output, y, unseen, o["epochs"], size, self.rng, **rates)
        return {name: w.detach() for name, w in weights.items()}

    def _outputs(self, indices: Indices) -> Float[Tensor, "m n"]:
        table = self.folded(self.inputs)
        codes = self.inputs.read(indices)[1]
        return through(self.tensors, looked_up(codes, table, self.options["members"]), self.options["depth"] + 1)
