"""A sensitivity as a predictor: nothing to collect, nothing to train."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from supernet.cost import Costs, Factors
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]
TINY = 1e-12


class Additive:
    """Minus the sum of an additive sensitivity; after `fit`, in units of the score.

    Before `fit` the prediction ranks subnets and means nothing else, with standard deviation 0. `fit` puts a falling
    line through (log of the sum, score): accuracy falls roughly with the logarithm of the error that quantization
    makes. The order of subnets stays, so the integer program's optimum stays the optimum.

    Args:
        space: what is predicted.
        costs: taken because all predictors are constructed alike; the sensitivity says everything.
        sensitivity: additive quality cost, higher is worse.
        rng: taken for the same reason.

    Raises:
        ValueError: no sensitivity.
    """

    encoding = ""

    def __init__(
        self,
        space: SearchSpace,
        costs: Costs | None = None,
        sensitivity: Factors | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        del costs, rng
        if sensitivity is None:
            raise ValueError("an additive predictor needs a sensitivity; measure one, e.g. with sensitivity=output_mse")
        self.space, self.sensitivity = space, sensitivity
        self.options: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}

    @property
    def ranks_only(self) -> bool:
        """Whether predictions order subnets and mean nothing else."""
        return "line" not in self.tensors

    def _log(self, indices: Indices) -> Table:
        return np.log(np.maximum(self.sensitivity.value(self.space.canonical(indices)), TINY))

    def fit(self, indices: Indices, scores: Table) -> None:
        """Least squares of score = offset - slope * log(sum), slope > 0, from scores [n] of rows [n, d].

        Where the pairs would have the slope negative or zero it becomes a thousandth of the scores' spread: the order
        is the sensitivity's.

        Raises:
            ValueError: fewer than three pairs, or scores that are not finite.
        """
        if len(scores) < 3 or not np.isfinite(scores).all():
            raise ValueError(f"fitting the scale takes 3 or more finite scores, got {len(scores)}; collect more pairs")
        x, y = -self._log(indices), np.asarray(scores, dtype=float)
        spread = max(float(x.std()), TINY)
        least = 1e-3 * max(float(y.std()), 1e-3) / spread
        slope = max(float(np.mean((x - x.mean()) * (y - y.mean()))) / spread**2, least)
        offset = float(y.mean() - slope * x.mean())
        std = float(np.sqrt(np.sum((y - offset - slope * x) ** 2) / max(1, len(y) - 2)))
        self.tensors = {"line": torch.tensor([slope, offset, std], dtype=torch.float64)}

    def predict(self, indices: Indices) -> tuple[Table, Table]:
        """Mean [n] and standard deviation [n] of the score of rows [n, d]."""
        if self.ranks_only:
            return -self.sensitivity.value(self.space.canonical(indices)), np.zeros(len(indices))
        slope, offset, std = self.tensors["line"].tolist()
        return offset - slope * self._log(indices), np.full(len(indices), std)
