"""Every choice of every gene equally likely: the baseline of one-shot methods."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from supernet.cost import Costs
from supernet.space import Indices, SearchSpace


class Uniform:
    """Independent uniform choices (SPOS, Guo et al., ECCV 2020, arXiv:1904.00420).

    With bits 2..8 in each layer the cost of what it draws hardly varies (mean 5x5 bits): subnets near a 3x3-bit
    budget are practically never trained. `CostFirst` is the remedy; this is the control.

    Args:
        space: what to draw from; a view is honoured.
        costs: taken because every sampler is constructed alike; choices are drawn without looking at it.
    """

    feedback: Literal["none", "train_loss", "select_loss"] = "none"
    every = 1

    def __init__(self, space: SearchSpace, costs: Costs | None = None) -> None:
        del costs
        self.space = space

    def ask(self, n: int, rng: np.random.Generator) -> Indices:
        """[n, d] independent rows."""
        return self.space.sample_indices(n, rng)

    def tell(self, indices: Indices, scores: NDArray[np.float64], step: int, total_steps: int) -> None:
        """Losses change nothing here."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing but the generator decides."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        if state:
            raise ValueError(f"a uniform sampler has no state, got {sorted(state)}; was it saved by another sampler?")
