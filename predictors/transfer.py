"""APQ's transfer: what architectures are worth is learned from cheap pairs, what bits take away from few others."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from predictors.encoding import one_hot
from predictors.members import FEWEST, Members, layers, looked_up, minibatches, through
from supernet.cost import Costs, Factors
from supernet.space import Indices, SearchSpace, magnitude

SMALLEST_BATCH = 16


class Transfer(Members):
    """Perceptrons in two stages (Wang et al., APQ, CVPR 2020, section 3.2): architectures first, then bits.

    First stage: inputs are the architecture genes, learned from the pairs in which every tensor has its most bits;
    where there are fewer than 8 of these, from all pairs, whatever their bits. Second stage: a branch for the bits and
    forms is added, its output summed into the first hidden layer (it starts at 0), and everything learns on from the
    quantized pairs. Pairs at most bits need no trained quantizers and may come from another run of the same space; they
    and the quantized ones are given to `fit` together.

    Three hidden layers of 400 as in the paper; ReLU, Adam 1e-3 and weight decay 1e-4 as in OFA, whose predictor it
    starts from. Scores are standardised over all pairs, and some such perceptrons, each without a part of the pairs,
    give the uncertainty; squared error.

    Args:
        space: what is predicted; it needs an architecture dimension.
        costs, sensitivity: taken because all predictors are constructed alike.
        rng: draws starts, parts and batches; None: one seeded with 0.
        members: number of perceptrons, at least 2.
        hidden: width of the hidden layers.
        depth: number of hidden layers.
        architecture_epochs: passes of the first stage; 0 leaves it out (learning from scratch).
        epochs: passes of the second stage.
        batch: most pairs of a step.
        unseen: share of the pairs that each member does not see, in (0, 1).
        learning_rate, weight_decay: of Adam.

    Raises:
        ValueError: an option out of range, or a space in which only bits vary.
    """

    def __init__(
        self,
        space: SearchSpace,
        costs: Costs | None = None,
        sensitivity: Factors | None = None,
        rng: np.random.Generator | None = None,
        members: int = 3,
        hidden: int = 400,
        depth: int = 3,
        architecture_epochs: int = 60,
        epochs: int = 60,
        batch: int = 128,
        unseen: float = 0.2,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
    ) -> None:
        del costs, sensitivity
        if min(hidden, depth, epochs, batch) < 1 or architecture_epochs < 0:
            raise ValueError(
                "hidden, depth, epochs and batch are at least 1, architecture_epochs at least 0; got "
                f"{hidden}, {depth}, {epochs}, {batch} and {architecture_epochs}"
            )
        if all(d.quantizes for d in space.dimensions):
            raise ValueError(
                "transfer goes from architectures to bits, and in this space only bits vary; use predictor=ensemble"
            )
        own = {"hidden": hidden, "depth": depth, "architecture_epochs": architecture_epochs, "epochs": epochs}
        own_rates = {"batch": batch, "learning_rate": learning_rate, "weight_decay": weight_decay}
        super().__init__(space, None, rng, members, unseen, own | own_rates)
        self.inputs = one_hot(space)
        free = [not d.quantizes for d in space.dimensions]
        self.architecture = torch.from_numpy(np.repeat(free, self.inputs.widths))
        self.encoding = self.inputs.digest

    def _learned(self, indices: Indices, y: Float[Tensor, " n"], unseen: Tensor) -> dict[str, Tensor]:
        o = self.options
        x = self.inputs.features(self.inputs.read(indices)[1])
        weights = layers(o["members"], (self.inputs.width, *[o["hidden"]] * o["depth"], 1), self.rng)
        weights["w1"][:, ~self.architecture] = 0  # the bit branch
        rates = {"lr": o["learning_rate"], "weight_decay": o["weight_decay"]}
        full = most_bits(self.space, indices)
        stages = [(self.architecture.float(), full if full.sum() >= FEWEST else np.ones_like(full))]
        stages += [(torch.ones(self.inputs.width), ~full if (~full).sum() >= FEWEST else np.ones_like(full))]
        for (mask, which), epochs in zip(stages, (o["architecture_epochs"], o["epochs"]), strict=True):
            at = torch.from_numpy(np.flatnonzero(which))
            inputs = x[at] * mask

            def output(batch: Tensor, inputs: Tensor = inputs) -> Tensor:
                return through(weights, torch.baddbmm(weights["b1"], inputs[batch], weights["w1"]), o["depth"] + 1)

            size = min(o["batch"], max(SMALLEST_BATCH, len(at) // 8))
            minibatches(weights, output, y[at], unseen[:, at], epochs, size, self.rng, **rates)
        return {name: w.detach() for name, w in weights.items()}

    def _outputs(self, indices: Indices) -> Float[Tensor, "m n"]:
        table = self.folded(self.inputs)
        codes = self.inputs.read(indices)[1]
        return through(self.tensors, looked_up(codes, table, self.options["members"]), self.options["depth"] + 1)


def most_bits(space: SearchSpace, indices: Indices) -> NDArray[np.bool_]:
    """[n] whether every active tensor of a row has the most bits that it may have."""
    full = np.ones(len(indices), dtype=bool)
    active = space.active(indices)
    for i, d in enumerate(space.dimensions):
        if d.quantizes:
            bits = np.array([magnitude(c) for c in d.choices])
            full &= (bits[indices[:, i]] == bits.max()) | ~active[:, i]
    return full
