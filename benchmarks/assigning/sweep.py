"""Which of a tool's own assignments stands for it at a limit that is ours."""

from __future__ import annotations

from collections.abc import Sequence

WITHIN = 1e-9
"""Relative excess over a limit that is rounding."""


def dearest_within(costs: Sequence[float], limit: float) -> int | None:
    """Position of the dearest assignment within the limit, the first of equals; None where none is.

    Every tool goes from cheap to dear as its own budget grows, so the dearest is its answer to the largest budget that
    ours allows.

    Args:
        costs: of each assignment, by our count.
        limit: on the cost.
    """
    inside = [i for i, cost in enumerate(costs) if cost <= limit * (1 + WITHIN)]
    return max(inside, key=lambda i: costs[i], default=None)
