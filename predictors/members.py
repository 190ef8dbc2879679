"""Several learners of one shape, each without a part of the pairs: their mean predicts, their spread says how well."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from predictors.encoding import Encoding
from supernet.cost import Factors
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]
CHECK_EVERY = 5
"""Steps between two looks at what each member has not seen."""
FEWEST = 8
"""Pairs that anything can be learned from."""


class Members(ABC):
    """What predictors that are small ensembles have in common; each says how its members learn and what they answer.

    The standard deviation is c * sqrt(spread^2 + mean spread^2). c makes the squared standardised error of the
    pairs average 1, each predicted only by those members that have not seen it.

    Args:
        space: what is predicted.
        sensitivity: additive quality cost, or None.
        rng: draws starts and parts; None: one seeded with 0.
        members: number of learners, at least 2.
        unseen: share of the pairs that each member does not see, in (0, 1).
        options: further keyword arguments of the class, for the file.

    Attributes:
        options: what it was made with, as plain values.
        tensors: everything it has learned.
        encoding: digest of how rows become inputs.

    Raises:
        ValueError: fewer than two members, or a share outside (0, 1).
    """

    encoding = ""

    def __init__(
        self,
        space: SearchSpace,
        sensitivity: Factors | None,
        rng: np.random.Generator | None,
        members: int,
        unseen: float,
        options: Mapping[str, Any],
    ) -> None:
        if members < 2 or not 0 < unseen < 1:
            raise ValueError(f"an ensemble has members >= 2 and unseen in (0, 1); got {members} and {unseen}")
        self.space, self.sensitivity, self.rng = space, sensitivity, rng or np.random.default_rng(0)
        self.options: dict[str, Any] = {"members": members, "unseen": unseen, **options}
        self.tensors: dict[str, Tensor] = {}
        self._folded: tuple[Tensor, Tensor] | None = None

    def folded(self, inputs: Encoding) -> Tensor:
        """The table of a first layer (`Encoding.fold`), made anew only when the weights are others."""
        weight = self.tensors["w1"]
        if self._folded is None or self._folded[0] is not weight:
            self._folded = weight, inputs.fold(weight, self.tensors["b1"])
        return self._folded[1]

    @abstractmethod
    def _learned(self, indices: Indices, y: Float[Tensor, " n"], unseen: Tensor) -> dict[str, Tensor]:
        """What all members learn from standardised scores; member m does not look at pairs where unseen[m] [n]."""

    @abstractmethod
    def _outputs(self, indices: Indices) -> Float[Tensor, "m n"]:
        """Standardised answers of all members."""

    def fit(self, indices: Indices, scores: Table) -> None:
        """Learn from scores [n] of rows [n, d]; n must be at least 8.

        Raises:
            ValueError: too few pairs, or scores that are not finite.
        """
        if len(scores) < FEWEST or not np.isfinite(scores).all():
            raise ValueError(
                f"a predictor learns from {FEWEST} or more finite scores, got {len(scores)}; collect more pairs"
            )
        y = torch.from_numpy(np.asarray(scores, dtype=np.float32))
        scale = {"y_mean": y.mean(), "y_std": y.std().clamp_min(1e-6)}
        y = (y - scale["y_mean"]) / scale["y_std"]
        unseen = parts(len(y), self.options["members"], self.options["unseen"], self.rng)
        self.tensors = self._learned(indices, y, unseen)
        with torch.no_grad():
            outputs = self._outputs(indices)
        spread = outputs.std(0)
        floor = spread.square().mean()
        honest = (outputs * unseen).sum(0) / unseen.sum(0)
        ratio = (y - honest).square() / (spread.square() + floor).clamp_min(1e-12)
        self.tensors = self.tensors | scale | {"floor": floor, "stretch": ratio.mean().sqrt()}

    @torch.no_grad()
    def predict(self, indices: Indices) -> tuple[Table, Table]:
        """Mean [n] and standard deviation [n] of the score of rows [n, d]."""
        if "stretch" not in self.tensors:
            raise ValueError("this predictor has learned nothing yet; call fit with measured pairs, or load one")
        outputs, known = self._outputs(indices), self.tensors
        std = known["y_std"] * known["stretch"] * (outputs.var(0) + known["floor"]).sqrt()
        mean = known["y_mean"] + known["y_std"] * outputs.mean(0)
        return mean.double().numpy(), std.double().numpy()


def parts(n: int, members: int, share: float, rng: np.random.Generator) -> Tensor:
    """[members, n] which pairs each member does not see; every pair is unseen by at least one."""
    count = max(1, min(n - 4, round(share * n)))
    masks = np.zeros((members, n), dtype=bool)
    for mask in masks:
        mask[rng.permutation(n)[:count]] = True
    orphans = np.flatnonzero(~masks.any(0))
    masks[rng.integers(members, size=len(orphans)), orphans] = True
    return torch.from_numpy(masks)


class Best:
    """Weights of each member as they were when it did best on what it had not seen.

    Args:
        weights: [members, ...] each; they are read, and change outside.
        unseen: [members, n].
    """

    def __init__(self, weights: Mapping[str, Tensor], unseen: Tensor) -> None:
        self.weights, self.unseen = weights, unseen.float()
        self.kept = {name: w.detach().clone() for name, w in weights.items()}
        self.least = torch.full((len(unseen),), torch.inf)

    def look(self, error: Float[Tensor, "m n"]) -> bool:
        """Keep the weights of members whose error is least so far; whether there are any."""
        held = (error.detach() * self.unseen).sum(1) / self.unseen.sum(1)
        better = held < self.least * (1 - 1e-4)
        self.least = torch.where(better, held, self.least)
        for name, w in self.weights.items():
            self.kept[name][better] = w.detach()[better]
        return bool(better.any())


def descend(
    weights: Mapping[str, Tensor],
    output: Callable[[], Float[Tensor, "m n"]],
    y: Float[Tensor, " n"],
    unseen: Tensor,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    penalty: Callable[[], Float[Tensor, " m"]] | None = None,
    patience: int = 20,
) -> dict[str, Tensor]:
    """Least squares over all pairs at once; each member's weights as they did best on what it had not seen.

    Args:
        weights: of all members, [members, ...] each, held by `optimizer`.
        output: the members' answers to all pairs with the present weights.
        y: standardised scores.
        unseen: [members, n].
        optimizer: takes a step.
        steps: at most that many.
        penalty: added to each member's mean squared error.
        patience: looks without a gain of any member that end the training.
    """
    seen, best, last = (~unseen).float(), Best(weights, unseen), 0
    for step in range(steps):
        error = (output() - y).square()
        if step % CHECK_EVERY == 0:
            last = step if best.look(error) else last
            if step - last > CHECK_EVERY * patience:
                break
        optimizer.zero_grad()
        loss = (error * seen).sum(1) / seen.sum(1)
        (loss if penalty is None else loss + penalty()).sum().backward()
        optimizer.step()
    return best.kept


def minibatches(
    weights: Mapping[str, Tensor],
    output: Callable[[Int[Tensor, "m k"]], Float[Tensor, "m k"]],
    y: Float[Tensor, " n"],
    unseen: Tensor,
    epochs: int,
    size: int,
    rng: np.random.Generator,
    **rates: float,
) -> None:
    """SmoothL1 by Adam over shuffled batches, another order for each member; what it does not see counts nothing.

    Args:
        weights: of all members; they change.
        output: the members' answers to pairs [members, k].
        y: standardised scores.
        unseen: [members, n].
        epochs: passes over the pairs.
        size: pairs of a batch.
        rng: shuffles.
        rates: `lr` and `weight_decay` of Adam.
    """
    members, n = unseen.shape
    optimizer = torch.optim.Adam([{"params": [w.requires_grad_() for w in weights.values()]} | dict(rates)], fused=True)
    for _ in range(epochs):
        order = torch.from_numpy(rng.permuted(np.tile(np.arange(n), (members, 1)), axis=1))
        for at in order.split(size, 1):
            seen = (~unseen.gather(1, at)).float()
            error = torch.nn.functional.smooth_l1_loss(output(at), y[at], reduction="none")
            optimizer.zero_grad()
            ((error * seen).sum(1) / seen.sum(1).clamp_min(1)).sum().backward()
            optimizer.step()


# -- perceptrons -------------------------------------------------------------------------------------------------------


def layers(members: int, sizes: Sequence[int], rng: np.random.Generator, silent: bool = False) -> dict[str, Tensor]:
    """w1 [members, sizes[0], sizes[1]], b1 [members, 1, sizes[1]], w2, ...: Kaiming normal for ReLU, biases 0.

    `silent`: the last layer starts with zeros, so that the output does too.
    """
    weights = {}
    for k, (rows, width) in enumerate(itertools.pairwise(sizes), 1):
        drawn = rng.standard_normal((members, rows, width)) * np.sqrt(2 / max(rows, 1))
        weights[f"w{k}"] = torch.from_numpy((drawn * (not silent or k < len(sizes) - 1)).astype(np.float32))
        weights[f"b{k}"] = torch.zeros(members, 1, width)
    return weights


def through(weights: Mapping[str, Tensor], hidden: Float[Tensor, "m n h"], count: int) -> Float[Tensor, "m n"]:
    """The layers behind the first one, whose output is `hidden` (it changes): ReLU between `count` layers in all."""
    for k in range(2, count + 1):
        hidden = torch.baddbmm(weights[f"b{k}"], hidden.relu_(), weights[f"w{k}"])
    return hidden[..., 0]


def standard(x: Float[Tensor, "n f"]) -> dict[str, Tensor]:
    """Mean and standard deviation of inputs; 1 where a column is constant."""
    std = x.std(0)
    return {"x_mean": x.mean(0), "x_std": torch.where(std > 1e-6, std, torch.ones(()))}


def looked_up(codes: Tensor, table: Float[Tensor, "rows m*h"], members: int) -> Float[Tensor, "m n h"]:
    """First layer: rows of a folded table, summed."""
    summed = torch.nn.functional.embedding_bag(codes, table, mode="sum")
    return summed.view(len(codes), members, -1).transpose(0, 1)
