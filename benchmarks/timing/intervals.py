"""Medians and ratios of medians over paired rounds, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95


class Interval(NamedTuple):
    """A figure of all rounds, and the bounds between which `LEVEL` of its bootstrap resamples lie."""

    low: float
    middle: float
    high: float


def median_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Median of [rounds] values."""
    return ratio_interval(values, [1.0] * len(values), seed)


def ratio_interval(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Interval:
    """Median of `above` divided by the median of `below`, both [rounds] and measured in the same rounds.

    A resample draws rounds, not single values, so that what slowed a whole round down stays on both sides (percentile
    bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    Raises:
        ValueError: no rounds, or not as many on both sides.
    """
    if not above or len(above) != len(below):
        raise ValueError(f"a paired ratio needs the same rounds on both sides, got {len(above)} and {len(below)}")
    pairs: NDArray[np.float64] = np.array([above, below], dtype=float)
    rounds = np.random.default_rng(seed).integers(len(above), size=(RESAMPLES, len(above)))
    top, bottom = np.median(pairs[:, rounds], axis=2)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(top / bottom, [tail, 100 - tail])
    middle = np.median(pairs[0]) / np.median(pairs[1])
    return Interval(float(low), float(middle), float(high))
