"""A table of logits that learns which choice of each dimension pays, by REINFORCE, and settles in time.

The controller of FLIQS (Dotzel et al., AutoML 2024, arXiv:2308.03290, section 3), after TuNAS (Bender et al., CVPR
2020, arXiv:2008.06120): no input, no network; architecture dimensions are decisions like all others (FLIQNAS).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]
LEAST = 1e-8
"""Smallest probability that a logarithm is taken of."""
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""Adam's."""


def entropy_price(step: float, total: int, delay: float, most: float) -> float:
    """Price of a nat of entropy: 0 until `delay` (a share of `total` steps), then up to `most` along half a cosine."""
    passed = (step - delay * total) / max((1 - delay) * total, 1e-12)
    return 0.5 * most * (1 - math.cos(math.pi * min(max(passed, 0.0), 1.0)))


class Controller:
    """Independent distributions over the choices of every decision, and their gradient steps.

    A decision is a dimension with more than one admissible choice; tied dimensions are one. Logits start at 0.5.
    A step minimises

        -mean_i A_i mean_d log p_d(i) + price * mean_d H(p_d),    A_i = r_i - m,

    with the moving average m of the rewards r as baseline (m starts at the first reward and is updated before A is
    taken). The plus sign makes entropy cost something. Where a decision is inactive in a row it had no part in the
    reward, and its log p is left out of that row's sum.

    Args:
        space: what to decide; a view is honoured.
        learning_rate: of Adam.
        momentum: of the baseline.
    """

    def __init__(self, space: SearchSpace, learning_rate: float, momentum: float = 0.99) -> None:
        self.space, self.learning_rate, self.momentum = space, learning_rate, momentum
        spoken = {i for group in space.ties for i in group[1:]}
        groups = {group[0]: group for group in space.ties}
        free = [i for i in range(len(space)) if i not in spoken and space.admissible[i].sum() > 1]
        self.members = [groups.get(i, (i,)) for i in free]
        self.mask = np.zeros((len(free), int(space.sizes.max(initial=1))), dtype=bool)
        for d, i in enumerate(free):
            self.mask[d, : space.sizes[i]] = space.admissible[i]
        self.logits = np.full(self.mask.shape, 0.5)
        self.first, self.second, self.count = np.zeros_like(self.logits), np.zeros_like(self.logits), 0
        self.baseline: float | None = None

    @property
    def probabilities(self) -> Table:
        """[decisions, choices] softmax over the admissible choices."""
        shifted = np.where(self.mask, self.logits, -np.inf)
        weights = np.exp(shifted - shifted.max(1, keepdims=True, initial=-700.0))
        return weights / weights.sum(1, keepdims=True)

    @property
    def entropies(self) -> Table:
        """[decisions] in nats."""
        p = self.probabilities
        return -(p * np.log(np.maximum(p, LEAST))).sum(1)

    @property
    def entropy(self) -> float:
        """Mean over the decisions, in nats; 0 where nothing is to be decided."""
        return float(self.entropies.sum()) / max(1, len(self.members))

    def draw(self, n: int, rng: np.random.Generator, uniform: bool = False) -> Indices:
        """[n, d] canonical rows; `uniform`: every admissible choice equally likely."""
        p = (
            self.mask / self.mask.sum(1, keepdims=True)
            if uniform
            else np.maximum(self.probabilities, LEAST) * self.mask
        )
        cumulated = np.cumsum(p, axis=1)
        u = rng.random((n, len(p), 1)) * cumulated[None, :, -1:]
        return self._rows((cumulated[None] <= u).sum(2))

    def likeliest(self) -> Indices:
        """[d] the row of the most likely choices."""
        return self._rows(np.argmax(np.where(self.mask, self.logits, -np.inf), axis=1)[None])[0]

    def _rows(self, chosen: NDArray[np.int64]) -> Indices:
        rows = np.tile(np.array([int(np.argmax(mask)) for mask in self.space.admissible]), (len(chosen), 1))
        for d, members in enumerate(self.members):
            rows[:, list(members)] = chosen[:, d, None]
        return self.space.canonical(rows)

    def learn(self, rows: Indices, rewards: Table, price: float, unit: float = 1.0) -> None:
        """One step of Adam on rows [n, d] with rewards [n].

        Args:
            rows: drawn from this controller.
            rewards: higher is better.
            price: of a nat of mean entropy, in rewards.
            unit: what advantages are divided by.
        """
        mean = float(rewards.mean())
        self.baseline = mean if self.baseline is None else self.momentum * self.baseline + (1 - self.momentum) * mean
        advantage = (rewards - self.baseline) / unit
        p, choices = self.probabilities, self.mask.shape[1]
        chosen, on = self._chosen(rows)
        weight = advantage[:, None] * on
        taken = np.bincount((np.arange(len(p)) * choices + chosen).ravel(), weight.ravel(), minlength=p.size)
        gradient = weight.sum(0)[:, None] * p - taken.reshape(p.shape)
        gradient /= len(rows)
        logs = np.log(np.maximum(p, LEAST))
        gradient -= price * p * (logs - (p * logs).sum(1, keepdims=True))
        self._adam(gradient / max(1, len(self.members)))

    def _chosen(self, rows: Indices) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """[n, decisions] what rows [n, d] chose, and whether it was active in them."""
        active = self.space.active(rows)
        leaders = np.tile(np.array([m[0] for m in self.members], dtype=np.int64), (len(rows), 1))
        for d, members in enumerate(self.members):
            if len(members) > 1:
                leaders[:, d] = np.array(members)[np.argmax(active[:, members], axis=1)]
        return np.take_along_axis(rows, leaders, axis=1), np.take_along_axis(active, leaders, axis=1)

    def _adam(self, gradient: Table) -> None:
        self.count += 1
        self.first += (1 - BETA1) * (gradient - self.first)
        self.second += (1 - BETA2) * (gradient**2 - self.second)
        mean, square = self.first / (1 - BETA1**self.count), self.second / (1 - BETA2**self.count)
        self.logits -= self.learning_rate * mean / (np.sqrt(square) + EPSILON)

    def state_dict(self) -> dict[str, Any]:
        """Logits, moments and baseline, as plain Python."""
        tables = {name: getattr(self, name).tolist() for name in ("logits", "first", "second")}
        return tables | {"count": self.count, "baseline": self.baseline}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; ValueError if that was of another space."""
        if np.shape(state["logits"]) != self.logits.shape:
            raise ValueError(
                f"state has logits of shape {np.shape(state['logits'])}, this space needs {self.logits.shape}"
            )
        for name in ("logits", "first", "second"):
            setattr(self, name, np.array(state[name], dtype=float))
        self.count, self.baseline = int(state["count"]), state["baseline"]
