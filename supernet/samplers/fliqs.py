"""Train under formats that a policy picks, until it has settled on one subnet: search and training in one run.

FLIQS (Dotzel et al., AutoML 2024, arXiv:2308.03290, section 3); its controller stands in `controller.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from supernet.cost import Costs
from supernet.samplers.controller import Controller, entropy_price
from supernet.space import Indices, SearchSpace


class Fliqs:
    """Draws subnets from a policy that learns, from the training loss, what pays at one target cost.

    The first `delay` of all steps draw uniformly. After that each step rewards what it trained with

        r = -loss - beta |1 - cost / target|

    and the policy makes one step of REINFORCE. A nat of entropy costs more and more along half a cosine, so that the
    policy has settled when training ends, and the weights fit the subnet that is left: no training after the search.
    One run serves one target. The target is no hard limit, and being cheaper is punished like being dearer; what the
    settled subnet costs is written beside it.

    Departures: any kind of cost, any dimension of the space (architecture as in FLIQNAS); weights and inputs decide
    for themselves. The loss is that of training, so it needs the same loss for every subnet (`loss=plain`) and steps
    whose subnets all come from here, at best one each (`subnets=1`).

    Args:
        space: what to draw from; a view is honoured.
        costs: its costs.
        kind: which cost.
        target: of the settled subnet: a number, one with SI prefix, or wXaY.
        beta: price of missing the target by all of it, in nats of loss, at least 0.
        entropy: price of a nat of mean entropy in the last step, at least 0.
        learning_rate: of the policy's Adam (the paper's code: 0.05 by default, 0.005 in its commands, which are longer
            than the hundreds of steps that small data give).
        delay: share of all steps that draw uniformly, 0..1 without 1.

    Raises:
        ValueError: an unknown kind, a target below all that can be reached, or an option out of range.
    """

    feedback: Literal["none", "train_loss", "select_loss"] = "train_loss"
    every = 1

    def __init__(
        self,
        space: SearchSpace,
        costs: Costs,
        kind: str = "bitops",
        target: str | float = "w4a4",
        beta: float = 1.0,
        entropy: float = 0.5,
        learning_rate: float = 0.05,
        delay: float = 0.25,
    ) -> None:
        if beta < 0 or entropy < 0 or learning_rate <= 0 or not 0 <= delay < 1:
            raise ValueError(
                "Fliqs takes beta >= 0, entropy >= 0, learning_rate > 0 and delay in [0, 1); "
                f"got {beta}, {entropy}, {learning_rate}, {delay}"
            )
        self.kind, self.target = kind, costs.parse({kind: target})[kind]
        self.cost = costs.kinds[kind]
        self.beta, self.entropy, self.delay = beta, entropy, delay
        self.controller = Controller(space, learning_rate)
        self.passed = 0.0

    def ask(self, n: int, rng: np.random.Generator) -> Indices:
        """[n, d] rows from the policy; uniform ones until `delay` has passed."""
        return self.controller.draw(n, rng, uniform=self.passed < self.delay)

    def tell(self, indices: Indices, scores: NDArray[np.float64], step: int, total_steps: int) -> None:
        """Losses [n] of rows [n, d] that were trained in `step` (from 0) of `total_steps`: one step of the policy."""
        if step >= self.delay * total_steps:
            missed = np.abs(1 - self.cost.value(indices) / self.target)
            price = entropy_price(step + 1, total_steps, self.delay, self.entropy)
            self.controller.learn(indices, -scores - self.beta * missed, price)
        self.passed = (step + 1) / total_steps

    def settled(self) -> Indices:
        """[d] the row of the most likely choices."""
        return self.controller.likeliest()

    def figures(self) -> dict[str, float]:
        """Mean entropy of a decision in nats, and what the likeliest subnet costs, as a share of the target."""
        cost = float(self.cost.value(self.settled()[None])[0])
        return {"entropy": self.controller.entropy, f"{self.kind}_of_target": cost / self.target}

    def state_dict(self) -> dict[str, Any]:
        """The policy, and the share of all steps that has passed."""
        return {"controller": self.controller.state_dict(), "passed": self.passed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.controller.load_state_dict(state["controller"])
        self.passed = float(state["passed"])
