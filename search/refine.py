"""The last steps of a search: single changes and exchanges of two, as long as the score rises within the limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from search.variation import single_changes
from supernet.cost import Cost
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]
CHEAP = 1e-4
"""Share of the limit below which a change counts as this dear, so that free changes do not win by being free."""
EXCHANGES = 64
"""Exchanges whose score is looked up, the most promising first, before a row counts as a local optimum."""


def refined(
    space: SearchSpace,
    row: Indices,
    limits: Mapping[str, float],
    kinds: Mapping[str, Cost],
    score: Callable[[Indices], Table],
    rounds: int = 200,
) -> Indices:
    """[d] a row within the limits from which no single change and no promising exchange raises the score.

    Of the single changes that fit and raise the score, the one that raises it most for what it costs is made.
    Under a hard budget single changes soon fit no more; then one gene gives up what another gains. An exchange is
    promising by the sum of the score changes of its parts.

    Args:
        space: what may be changed to; a view is honoured.
        row: [d] the start, within the limits.
        limits: kind -> limit.
        kinds: the costs.
        score: [n, d] rows -> [n] scores, higher is better.
        rounds: most steps taken.
    """
    names = list(limits)
    bounds = np.array([limits[kind] for kind in names]) * (1 + 1e-12)

    def costs(rows: Indices) -> Table:
        return np.stack([kinds[kind].value(rows) for kind in names], axis=1)

    best, here = row, float(score(row[None])[0])
    for _ in range(rounds):
        genes, values = single_changes(space, best)
        singles = space.spread(np.repeat(best[None], len(genes), axis=0), genes, values)
        gain, spent = score(singles) - here, costs(singles)
        better = (spent <= bounds).all(1) & (gain > 0)
        if better.any():
            price = ((spent - costs(best[None])) / bounds).max(1)
            tried = singles[better][[int(np.argmax(gain[better] / np.maximum(price[better], CHEAP)))]]
        else:
            at = _promising(gain, spent - costs(best[None]), bounds - costs(best[None])[0], genes)
            pairs = space.spread(singles[at[0]], genes[at[1]], values[at[1]])
            tried = pairs[(costs(pairs) <= bounds).all(1)]
        scores = score(tried) if len(tried) else np.zeros(0)
        if not len(tried) or scores.max() <= here:
            return best
        best, here = tried[int(np.argmax(scores))], float(scores.max())
    return best


def _promising(
    gain: Table, change: Table, slack: Table, genes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (what gives, what gains) of single changes that should fit together and raise the score, best first."""
    gains = np.flatnonzero(gain > 0)
    gives = np.flatnonzero((change < 0).any(1))
    total = gain[gives][:, None] + gain[gains][None]
    fits = (change[gives][:, None] + change[gains][None] <= slack).all(2) & (
        genes[gives][:, None] != genes[gains][None]
    )
    total = np.where(fits, total, -np.inf)
    order = np.argsort(-total, axis=None)[:EXCHANGES]
    order = order[total.ravel()[order] > 0]
    rows, columns = np.unravel_index(order, total.shape)
    return gives[rows], gains[columns]
