"""Whether the policy of FLIQS settles on the optimum of a problem that can be enumerated."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supernet.config import PerTensor, QuantConfig
from supernet.factors import Factors
from supernet.formats.integer import Integer
from supernet.samplers.fliqs import Fliqs
from supernet.space import Dimension, Indices, SearchSpace

BITS = np.array([2.0, 4.0, 8.0])


class Synthetic:
    """Quality -sum s 4^-b, cost sum m b^2 over some layers of 2, 4 or 8 bits; the optimum is enumerated.

    Args:
        seed: of s and m.
        layers: number of layers.
    """

    def __init__(self, seed: int, layers: int = 8) -> None:
        rng = np.random.default_rng(seed)
        self.s, m = rng.lognormal(0, 1, layers), rng.lognormal(0, 0.5, layers)
        self.s /= (self.s * 4.0**-4).sum()  # uniform 4 bits: -1
        choices = tuple(QuantConfig(Integer(int(b)), PerTensor()) for b in BITS)
        self.space = SearchSpace([Dimension(f"l{i}.weight", choices) for i in range(layers)])
        self.kinds = {"cost": Factors(tuple(((i,), m[i] * BITS**2) for i in range(layers)))}
        every = np.array(list(itertools.product(range(3), repeat=layers)))
        inside = every[self.kinds["cost"].value(every) <= 20 * m.sum()]
        best = inside[np.argmax(self.quality(inside))][None]
        self.best, self.target = float(self.quality(best)[0]), float(self.kinds["cost"].value(best)[0])

    def parse(self, budget: dict[str, float]) -> dict[str, float]:
        """Limits are given in the cost's unit."""
        return budget

    def quality(self, rows: Indices) -> NDArray[np.float64]:
        """[n] qualities of rows [n, d]."""
        found: NDArray[np.float64] = -(self.s * 4.0 ** -BITS[rows]).sum(1)
        return found


def settle(
    problem: Synthetic, seed: int, entropy: float = 0.5, sign: float = 1.0, steps: int = 600, rows: int = 16
) -> dict[str, Any]:
    """What the policy settles on: quality lost against the optimum, cost off the target, entropy, whether that is good.

    `sign` -1 flips the price of entropy.
    """
    sampler = Fliqs(problem.space, problem, "cost", problem.target, beta=5.0, entropy=entropy, learning_rate=0.03)  # type: ignore[arg-type]
    sampler.entropy *= sign
    rng = np.random.default_rng(seed)
    for step in range(steps):
        asked = sampler.ask(rows, rng)
        sampler.tell(asked, -problem.quality(asked), step, steps)
    figures, row = sampler.figures(), sampler.settled()[None]
    lost, off = float(problem.quality(row)[0] / problem.best - 1), figures["cost_of_target"] - 1
    good = lost < 0.02 and abs(off) < 0.05 and figures["entropy"] < 0.05
    return {"seed": seed, "quality_lost": lost, "cost_off": off, "entropy": figures["entropy"], "good": good}


def policies(seeds: int) -> dict[str, Any]:
    """One problem with many seeds of the policy; as many problems, one seed each; entropy free, and flipped."""
    one = Synthetic(1)
    found = {
        "one problem": [settle(one, seed) for seed in range(seeds)],
        "a problem each": [settle(Synthetic(seed), seed) for seed in range(seeds)],
        "entropy free": [settle(one, seed, entropy=0.0) for seed in range(seeds)],
        "entropy rewarded": [settle(one, seed, sign=-1.0) for seed in range(seeds)],
    }
    return {
        name: {
            "good": sum(r["good"] for r in runs),
            "of": seeds,
            "entropy": float(np.mean([r["entropy"] for r in runs])),
            "runs": runs,
        }
        for name, runs in found.items()
    }
