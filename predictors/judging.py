"""How good a predictor is, at equal cost, beside what it has to beat and what the measurements allow."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from supernet.config import QuantConfig
from supernet.cost import Costs
from supernet.interfaces import Predictor
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]


class Measured(Protocol):
    """Subnets [n, d] and what was measured of them, as `predictors.pairs.Pairs` holds them."""

    @property
    def indices(self) -> Indices: ...
    @property
    def scores(self) -> Table: ...
    @property
    def halves(self) -> Table: ...
    @property
    def costs(self) -> dict[str, Table]: ...


def kendall(scores: Table, predicted: Table) -> float | None:
    """Kendall's tau-b; None where one side is constant or there are fewer than two."""
    tau = float(stats.kendalltau(scores, predicted).statistic) if len(scores) > 1 else float("nan")
    return tau if np.isfinite(tau) else None


def kendall_at_equal_cost(
    scores: Table, predicted: Table, costs: Table, window: float = 0.05
) -> tuple[float | None, int]:
    """Kendall's tau-b over the pairs of points whose costs differ by at most a factor 1 + window; and their number.

    A predictor can rank subnets well by reading their cost alone; a search under a budget compares subnets of one
    cost. None where no such pair is left, or one side ties in all of them.
    """
    i, j = np.triu_indices(len(scores), 1)
    near = np.abs(np.log(costs[i] / costs[j])) <= np.log1p(window)
    i, j = i[near], j[near]
    a, b = np.sign(scores[i] - scores[j]), np.sign(predicted[i] - predicted[j])
    weight = np.sqrt(float((a != 0).sum()) * float((b != 0).sum()))
    return (float((a * b).sum() / weight) if weight else None), len(i)


def ceiling(halves: Table, costs: Table, window: float = 0.05) -> float | None:
    """The tau at equal cost that a perfect predictor would reach, given how well the measurements repeat.

    The two halves of the images agree with some tau; as correlation r = sin(pi tau / 2), Spearman and Brown's 2 r /
    (1 + r) is that of two full measurements, and its root that of one measurement with the truth.
    The truth is accuracy on endless images of the kind. What is peculiar to these images a predictor may learn as well,
    since it is judged on the same ones, and then surpass this.
    """
    tau, _ = kendall_at_equal_cost(halves[:, 0], halves[:, 1], costs, window)
    if tau is None or tau <= 0:
        return None
    r = np.sin(np.pi * tau / 2)
    return float(2 / np.pi * np.arcsin(np.sqrt(2 * r / (1 + r))))


def controls(space: SearchSpace, pairs: Measured, kind: str = "bitops") -> dict[str, Table]:
    """What a predictor has to beat: the mean bits of the active tensors, and the cost alone."""
    bits = np.zeros(pairs.indices.shape)
    for i, d in enumerate(space.dimensions):
        if d.quantizes:
            bits[:, i] = np.array([c.bits for c in d.choices if isinstance(c, QuantConfig)])[pairs.indices[:, i]]
    quantizes = np.array([d.quantizes for d in space.dimensions])
    count = (space.active(pairs.indices) & quantizes).sum(1)
    return {
        "mean bits": (bits * space.active(pairs.indices)).sum(1) / np.maximum(count, 1),
        "cost alone": pairs.costs[kind],
    }


def windows(
    predicted: Table,
    pairs: Measured,
    around: Mapping[str, float],
    controls: Mapping[str, Table],
    *,
    kind: str = "bitops",
    width: float = 0.05,
) -> dict[str, dict[str, Any]]:
    """How well subnets are ranked near the costs that a search is asked for.

    Args:
        predicted: [n] predicted score of each pair; higher is better.
        pairs: what was measured.
        around: name -> cost, in the kind's unit.
        controls: name -> [n] what a predictor has to beat.
        kind: which cost.
        width: a window holds the pairs whose cost is at most this share below or above.

    Returns:
        For each name `cost`, `pairs` (how many lie in the window), `kendall` over all of them, `ceiling` (what a
        perfect predictor would reach, from the two halves of the images), `share_of_ceiling`, and `controls`.
        None where there is no such figure, as with fewer than two pairs.
    """
    found = {}
    for name, cost in around.items():
        inside = np.flatnonzero(np.abs(pairs.costs[kind] / cost - 1) <= width)
        scores, halves = pairs.scores[inside], pairs.halves[inside]
        tau, most = kendall(scores, predicted[inside]), ceiling(halves, np.ones(len(inside)))
        found[name] = {
            "cost": float(cost),
            "width": width,
            "pairs": len(inside),
            "kendall": tau,
            "ceiling": most,
            "share_of_ceiling": tau / most if tau is not None and most else None,
            "controls": {control: kendall(scores, values[inside]) for control, values in controls.items()},
        }
    return found


def report(
    predictor: Predictor,
    held_out: Measured,
    space: SearchSpace,
    *,
    kind: str = "bitops",
    window: float = 0.05,
    around: Mapping[str, float] | None = None,
    others: Mapping[str, Table] | None = None,
) -> dict[str, Any]:
    """How well held-out pairs are predicted, as JSON holds it.

    Args:
        predictor: fitted.
        held_out: pairs that it has not seen.
        space: theirs.
        kind: the cost that is held equal.
        window: by what share costs may differ and count as equal.
        around: name -> cost around which to judge besides (`windows`).
        others: name -> [n] further values to compare with, higher is better, beside cost and mean bits.

    Keys: `pairs`, `kendall` and its `ceiling` over all costs, `kendall_equal_cost` (and `pairs_equal_cost`, `window`,
    `cost`), its `ceiling_equal_cost` and `share_of_ceiling`, `rmse`, `within_1_std` (0.68 if calibrated),
    `within_2_std` (0.95), `controls` with the two taus of each, `windows`.
    """
    mean, std = predictor.predict(held_out.indices)
    costs, scores = held_out.costs[kind], held_out.scores
    equal, count = kendall_at_equal_cost(scores, mean, costs, window)
    most = ceiling(held_out.halves, costs, window)
    error = np.abs(scores - mean)
    compared = controls(space, held_out, kind) | dict(others or {})
    return {
        "pairs": len(scores),
        "kendall": kendall(scores, mean),
        "ceiling": ceiling(held_out.halves, np.ones(len(scores))),
        "kendall_equal_cost": equal,
        "pairs_equal_cost": count,
        "window": window,
        "cost": kind,
        "ceiling_equal_cost": most,
        "share_of_ceiling": equal / most if equal is not None and most else None,
        "rmse": float(np.sqrt(np.mean(error**2))),
        "within_1_std": float(np.mean(error <= std)),
        "within_2_std": float(np.mean(error <= 2 * std)),
        "controls": {
            name: {
                "kendall": kendall(scores, values),
                "kendall_equal_cost": kendall_at_equal_cost(scores, values, costs, window)[0],
            }
            for name, values in compared.items()
        },
        "windows": windows(mean, held_out, around or {}, compared, kind=kind, width=window),
    }


def landmarks(costs: Costs, kind: str = "bitops", bits: Sequence[str] = ("w3a3", "w4a4")) -> dict[str, float]:
    """Name -> cost of uniform bits, for those that the space offers: where a search usually looks."""
    found = {}
    for name in bits:
        with contextlib.suppress(ValueError):  # no tensor of the space has these bits
            found[name] = costs.limit(kind, name)
    return found
