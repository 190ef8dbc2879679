"""Highest, random, lowest: the order in which one bit-width teaches the next."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from supernet.config import Choice
from supernet.cost import Costs
from supernet.interfaces import Sampler
from supernet.space import Indices, SearchSpace, magnitude


class Sandwich:
    """The largest architecture at the highest bits, n - 2 drawn subnets, one at the lowest bits; forms at random.

    Sandwich rule (Yu and Huang, ICCV 2019, arXiv:1903.05134) in the order that group-progressive guidance needs
    (EQ-Net, ICCV 2023, arXiv:2308.07650, section 3.3: H teaches R, R teaches L). EQ-Net has no architecture choices.
    By default the last subnet draws its architecture: budgets are named after low bits in the *largest* architecture
    (w2a2), which would otherwise hardly be trained.

    `ask(2)` is highest and lowest, `ask(1)` one drawn subnet.

    Args:
        space: what to draw from; a view is honoured.
        costs: the space's costs, for the inner sampler.
        inner: makes the sampler of the subnets in the middle when called with space and costs (a class or a partial
            of one); None draws every choice with equal probability.
        smallest_architecture: the last subnet has the smallest architecture too, as the sandwich rule of slimmable
            networks has it.
    """

    feedback: Literal["none", "train_loss", "select_loss"]

    def __init__(
        self,
        space: SearchSpace,
        costs: Costs,
        inner: Callable[..., Sampler] | None = None,
        smallest_architecture: bool = False,
    ) -> None:
        self.space = space
        self.inner = inner(space=space, costs=costs) if inner else None
        self.feedback = self.inner.feedback if self.inner else "none"
        self.every = self.inner.every if self.inner else 1
        lowest = [i for i, d in enumerate(space.dimensions) if d.quantizes or smallest_architecture]
        self._highest, self._lowest = _extreme(space, 1, range(len(space))), _extreme(space, -1, lowest)

    def ask(self, n: int, rng: np.random.Generator) -> Indices:
        """[n, d] rows in order of teaching: highest first, lowest last."""
        if n == 1:
            return self._middle(1, rng)
        first = self._highest.sample_indices(1, rng)
        return np.concatenate([first, self._middle(n - 2, rng), self._lowest.sample_indices(1, rng)])

    def _middle(self, n: int, rng: np.random.Generator) -> Indices:
        return self.inner.ask(n, rng) if self.inner else self.space.sample_indices(n, rng)

    def tell(self, indices: Indices, scores: NDArray[np.float64], step: int, total_steps: int) -> None:
        """Hand the losses to the inner sampler."""
        if self.inner:
            self.inner.tell(indices, scores, step, total_steps)

    def state_dict(self) -> dict[str, Any]:
        """The inner sampler's state."""
        return self.inner.state_dict() if self.inner else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        if self.inner:
            self.inner.load_state_dict(state)


def _extreme(space: SearchSpace, sign: int, at: Iterable[int]) -> SearchSpace:
    """A view in which the dimensions `at` have only the choices of most (sign 1) or fewest (-1) bits, of any form."""
    allowed: dict[str, tuple[Choice, ...]] = {}
    for i in at:
        choices = [c for c, good in zip(space.dimensions[i].choices, space.admissible[i], strict=True) if good]
        end = max(sign * magnitude(c) for c in choices)
        allowed[glob.escape(space.dimensions[i].name)] = tuple(c for c in choices if sign * magnitude(c) == end)
    return space.restrict(allowed)
