"""From the values of all rounds to what the JSON file holds: medians, intervals, ratios and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.timing.contestants import RANDOM_DEPTH, SANDWICH, STEP
from benchmarks.timing.goals import ANY, COMPILED, EAGER, GOALS, fastest, judge
from benchmarks.timing.intervals import Interval, median_interval, ratio_interval
from benchmarks.timing.race import Outcome

BASELINES = {"fp32": ANY, "eager": EAGER, "compiled": COMPILED}
FEWEST_ROUNDS, THREADS = 40, 2


def plain(interval: Interval) -> dict[str, float]:
    """An interval for the JSON file."""
    return {"low": interval.low, "value": interval.middle, "high": interval.high}


def summary(outcome: Outcome, seed: int) -> dict[str, Any]:
    """All that was measured of one problem."""
    figures = outcome.figures
    return {
        "fastest": {
            measure: {name: fastest(figures, patterns, measure) for name, patterns in BASELINES.items()}
            for measure in (STEP, SANDWICH)
        },
        "contestants": {
            name: {measure: _described(figures, measure, values, seed) for measure, values in of.items() if values}
            for name, of in figures.items()
        },
        "preparation": outcome.seconds,
        "failed": outcome.failed,
        "compiled": outcome.compiled,
    }


def verdicts(outcomes: Mapping[str, Outcome], seed: int, judged: bool) -> list[dict[str, Any]]:
    """Every goal with its figure; `met` is None for all of them where the run is not one to judge by."""
    measured = {model: outcome.figures for model, outcome in outcomes.items()}
    found = [judge(goal, measured, seed).plain() for goal in GOALS]
    return found if judged else [verdict | {"met": None} for verdict in found]


def why_not_judged(rounds: int, threads: int, batch: int | None) -> str | None:
    """What keeps a run from being judged by the goals' own terms; None where nothing does."""
    if rounds < FEWEST_ROUNDS:
        return f"{rounds} rounds, the goals ask for {FEWEST_ROUNDS}"
    if threads != THREADS:
        return f"{threads} threads, the goals ask for {THREADS}"
    return None if batch is None else f"batch {batch}, the goals ask for the problems' own"


def _described(
    figures: Mapping[str, Mapping[str, Sequence[float]]], measure: str, values: Sequence[float], seed: int
) -> dict[str, Any]:
    """Median with its interval; of what was timed in rounds, also the lowest, all rounds, and the ratios to fp32."""
    described: dict[str, Any] = plain(median_interval(values, seed))
    if measure not in (STEP, SANDWICH, RANDOM_DEPTH):
        return described
    described |= {"min": min(values), "rounds": [round(value, 6) for value in values]}
    for name, patterns in BASELINES.items():
        other = fastest(figures, patterns, measure)
        if other is not None:
            ratio = plain(ratio_interval(values, figures[other][measure], seed))
            described.setdefault("ratios", {})[name] = {"against": other} | ratio
    return described
