"""Did the search pay? The winner beside its controls, image by image, and the answer in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.front import Found
from search.words import CONTROLS, said, same

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Accuracy of the winner minus that of a control on the same images, as shares of 1.

    Attributes:
        mean: the difference.
        low, high: ends of its bootstrap interval.
    """

    mean: float
    low: float
    high: float


def difference(
    winner: NDArray[np.bool_],
    control: NDArray[np.bool_],
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Difference:
    """The paired bootstrap of outcomes [images]: images are drawn with replacement, both subnets get the same ones.

    An image counts +1, 0 or -1, so how often each comes is multinomial, and drawing those counts is drawing the images.

    Raises:
        ValueError: outcomes of different images, or of none.
    """
    if winner.shape != control.shape or not winner.size:
        raise ValueError(f"a paired comparison needs the same images, got {winner.shape} and {control.shape}")
    each = winner.astype(np.int64) - control.astype(np.int64)
    n = len(each)
    counts = np.array([(each == value).sum() for value in (-1, 0, 1)])
    drawn = rng.multinomial(n, counts / n, size=resamples)
    low, high = np.quantile((drawn[:, 2] - drawn[:, 0]) / n, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(each.mean()), float(low), float(high))


def on_select(found: Found) -> str:
    """What can be said before test is read: the winner is a control itself, or how far it is above them."""
    names = {name: control.config.id for name, control in found.controls.items()}
    name = same(found.config.id, names)
    where = "by prediction" if found.measured is None else "on select"
    if name:
        return f"use {said(name)}: the search found nothing better {where}"
    if found.measured is None:
        return "by prediction only: nothing was measured"
    beside = {name: found.controls[name].measured for name in CONTROLS if name in found.controls}
    known = {name: score for name, score in beside.items() if score is not None}
    gaps = [f"{100 * (found.measured - score):+.2f} points to {said(name)}" for name, score in known.items()]
    return f"on select {', '.join(gaps)}; test decides (elastibit report)" if gaps else "no control fits this budget"


def on_test(
    identity: str, controls: Mapping[str, str], differences: Mapping[str, Difference]
) -> tuple[str | None, str]:
    """(control to use, None for the winner; the verdict in words).

    A control is to be used where it is better; else where it is the winner itself or the interval of the difference
    does not lie above 0. Of several, the one that is better by most, else the simplest.

    Args:
        identity: id of the winner.
        controls: name -> id of each control.
        differences: name -> winner minus control on test.
    """
    better = [name for name in CONTROLS if name in differences and differences[name].high < 0]
    if better:
        name = min(better, key=lambda name: differences[name].mean)
        gap = differences[name]
        return name, f"use {said(name)}: {-100 * gap.mean:.2f} points better on test ({interval(gap)})"
    for name in CONTROLS:
        if controls.get(name) == identity:
            return name, f"use {said(name)}: it is what the search found"
        if name in differences and differences[name].low <= 0:
            within = 100 * max(abs(differences[name].low), abs(differences[name].high))
            without = CONTROLS[name][1]
            return name, f"use {said(name)}: no difference on test within +-{within:.1f} points and {without}"
    if not differences:
        return None, "use the winner: no control fits this budget"
    closest = min(differences, key=lambda name: differences[name].mean)
    gap = differences[closest]
    return None, f"use the winner: {100 * gap.mean:.2f} points above {said(closest)} on test ({interval(gap)})"


def interval(gap: Difference) -> str:
    """The bootstrap interval in points."""
    return f"{CONFIDENCE:.0%} interval {100 * gap.low:+.2f} to {100 * gap.high:+.2f}"
