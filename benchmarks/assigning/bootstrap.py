"""Paired bootstrap: how sure the difference between two networks on the same images is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean difference in accuracy, ours minus theirs, with a percentile interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`win` or `loss` where the whole interval lies on one side of 0, else `tie`."""
        return "win" if self.low > 0 else "loss" if self.high < 0 else "tie"

    def plain(self) -> dict[str, Any]:
        """Plain values, the verdict among them."""
        return asdict(self) | {"verdict": self.verdict}


def paired(
    differences: Float[np.ndarray, " n"],
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Difference:
    """Percentile bootstrap of the mean over images.

    How often each image is drawn matters only through how often each value is, so the counts of values are drawn, from
    one multinomial distribution: exactly the same resampling, at the cost of the few values that there are.

    Args:
        differences: of each image, outcome of ours minus outcome of theirs.
        rng: draws.
        resamples: how many.
        level: share of the resamples inside the interval.

    Raises:
        ValueError: no images.
    """
    if not len(differences):
        raise ValueError("a bootstrap needs at least one image, got none; raise the number of test images above 0")
    values, counts = np.unique(differences, return_counts=True)
    drawn = rng.multinomial(len(differences), counts / len(differences), resamples)
    means: NDArray[np.float64] = drawn @ values / len(differences)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(np.mean(differences)), float(low), float(high))
