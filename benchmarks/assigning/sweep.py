"""Which of a tool's own assignments stands for it at a limit that is ours."""

from __future__ import annotations

from collections.abc import Sequence

WITHIN = 1e-9
"""Relative excess over a limit that is rounding."""


def best_within(costs: Sequence[float], scores: Sequence[float | None], limit: float) -> int | None:
    """Position of the assignment with the highest score among those within the limit; None where none is.

    Of equal scores, and where the tool has none, the dearest: a budget of the tool's own that is larger gave it.

    Args:
        costs: of each assignment, by our count.
        scores: what the tool thinks of each, higher is better; None where it does not say.
        limit: on the cost.
    """
    inside = [i for i, cost in enumerate(costs) if cost <= limit * (1 + WITHIN)]
    if not inside:
        return None
    return max(inside, key=lambda i: (-float("inf") if scores[i] is None else scores[i], costs[i]))
