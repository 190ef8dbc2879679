"""The goals as data, and whether the measured figures meet them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from statistics import median
from typing import Any

from benchmarks.timing.contestants import MEMORY, PROBLEMS, PYTHON, SANDWICH, STEP
from benchmarks.timing.intervals import Interval, ratio_interval

Measured = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
"""model -> contestant -> measure -> one value for each round, or one value."""

COLD, WARM, SCALES = "start_cold", "start_warm", "scales"
ANY, EAGER, COMPILED = ("fp32.*",), ("fp32.eager*",), ("fp32.compiled*",)
MODELOPT = ("modelopt*",)


@dataclass(frozen=True)
class Goal:
    """A figure of one contestant that shall be at most `limit`.

    Attributes:
        work: what is done, in words.
        model: the problem.
        contestant: the numerator.
        measure: of both sides. fp32's `sandwich` is 4 forward and backward passes and 1 optimizer step.
        limit: of the ratio, or in the measure's own unit where `against` is empty.
        against: shell patterns of contestants of the same model; the one with the lowest median is the denominator.
    """

    work: str
    model: str
    contestant: str
    measure: str
    limit: float
    against: tuple[str, ...] = ()


FORMS = "bits and forms elastic, compiled whole"
DEPTH = "depth elastic too, regional compilation"
GOALS = (
    Goal(f"one-subnet step, {FORMS}", "resnet20", "ours.whole", STEP, 1.10, COMPILED),
    Goal(f"one-subnet step, {DEPTH}", "resnet20", "ours.depth.regional", STEP, 1.15, COMPILED),
    Goal("one-subnet step, only quantizer functions compiled", "resnet20", "ours.quantizers", STEP, 1.15, EAGER),
    Goal("the same, depth elastic too", "resnet20", "ours.depth.quantizers", STEP, 1.15, EAGER),
    *(Goal("one-subnet step", model, "ours.whole", STEP, 1.10, ANY) for model in ("resnet18", "vit_tiny")),
    *(Goal("one-subnet step, below ModelOpt", m, "ours.whole", STEP, 1.0, MODELOPT) for m in ("resnet18", "vit_tiny")),
    *(Goal("sandwich step", model, "ours.whole", SANDWICH, 1.05, ANY) for model in PROBLEMS),
    Goal(f"sandwich step, {DEPTH}", "resnet20", "ours.depth.regional", SANDWICH, 1.05, ANY),
    *(Goal("first finished step, cold cache (s)", model, "ours.whole", COLD, 60) for model in PROBLEMS),
    Goal(f"first finished step, cold cache, {DEPTH} (s)", "resnet20", "ours.depth.regional", COLD, 60),
    *(Goal("first finished step, warm cache (s)", model, "ours.whole", WARM, 10) for model in PROBLEMS),
    Goal(f"first finished step, warm cache, {DEPTH} (s)", "resnet20", "ours.depth.regional", WARM, 10),
    Goal("scale initialisation of all choices (s)", "resnet20", "ours.whole", SCALES, 3),
    *(Goal("peak memory of a step", model, "ours.whole", MEMORY, 1.3, COMPILED) for model in PROBLEMS),
    Goal(f"peak memory of a step, {DEPTH}", "resnet20", "ours.depth.regional", MEMORY, 1.3, COMPILED),
    Goal("Python time that grows with layers (ms per 1,000 layers)", PYTHON, "ours", "bind", 2),
)


@dataclass(frozen=True)
class Verdict:
    """A goal with what was measured; `value`, `low`, `high` and `met` are None where it was not."""

    goal: Goal
    denominator: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the middle of the interval is within the limit."""
        return None if self.value is None else self.value <= self.goal.limit

    def plain(self) -> dict[str, Any]:
        """For the JSON file."""
        figures = {name: value for name, value in asdict(self).items() if name != "goal"}
        return asdict(self.goal) | figures | {"met": self.met}


def fastest(figures: Mapping[str, Mapping[str, Sequence[float]]], patterns: Sequence[str], measure: str) -> str | None:
    """The contestant of one model with the lowest median of a measure, among those whose name matches a pattern."""
    known = {
        name: median(values[measure])
        for name, values in figures.items()
        if values.get(measure) and any(fnmatch(name, pattern) for pattern in patterns)
    }
    return min(known, key=lambda name: known[name]) if known else None


def judge(goal: Goal, measured: Measured, seed: int = 0) -> Verdict:
    """The goal's figure with its bootstrap interval, as far as both sides were measured."""
    figures = measured.get(goal.model, {})
    own = figures.get(goal.contestant, {}).get(goal.measure)
    if not own:
        return Verdict(goal)
    if not goal.against:
        return _verdict(goal, None, ratio_interval(own, [1.0] * len(own), seed))
    other = fastest(figures, goal.against, goal.measure)
    if other is None:
        return Verdict(goal)
    return _verdict(goal, other, ratio_interval(own, figures[other][goal.measure], seed))


def _verdict(goal: Goal, denominator: str | None, interval: Interval) -> Verdict:
    return Verdict(goal, denominator, interval.middle, interval.low, interval.high)
