"""Intervals, goals, and the tables that show them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from benchmarks.timing import peers
from benchmarks.timing.contestants import (
    PROBLEMS,
    PYTHON,
    contestants,
)
from benchmarks.timing.goals import COLD, GOALS, SCALES, WARM, Goal, fastest, judge
from benchmarks.timing.intervals import median_interval, ratio_interval
from benchmarks.timing.overhead import slopes
from benchmarks.timing.race import Outcome
from benchmarks.timing.result import summary, verdicts, why_not_judged
from benchmarks.timing.table import goal_table, model_table


class TestIntervals:
    def test_a_multiple_in_every_round_has_no_spread(self) -> None:
        """Whatever the rounds were like: an interval that did not pair them would be as wide as their noise."""
        below = np.random.default_rng(0).lognormal(size=41)
        assert ratio_interval(list(1.25 * below), list(below)) == pytest.approx((1.25, 1.25, 1.25))

    def test_bounds_are_the_exact_quantiles_of_the_resampled_median(self) -> None:
        """Of the values 0..n-1 the resampled median is at most k with P(Binomial(n, (k + 1) / n) > n / 2)."""
        n = 41
        below = binom.sf(n // 2, n, (np.arange(n) + 1) / n)
        low, middle, high = median_interval(list(range(n)))
        assert middle == n // 2
        assert abs(low - np.searchsorted(below, 0.025)) <= 1
        assert abs(high - np.searchsorted(below, 0.975)) <= 1
        assert high - low > 6

    def test_the_middle_is_the_ratio_of_medians(self) -> None:
        assert ratio_interval([1, 2, 9], [4, 1, 2]).middle == 1.0

    def test_one_value_is_its_own_interval(self) -> None:
        assert median_interval([3.5]) == (3.5, 3.5, 3.5)

    @pytest.mark.parametrize("sides", [([], []), ([1.0], [1.0, 2.0])])
    def test_rounds_must_be_paired(self, sides: tuple[list[float], list[float]]) -> None:
        with pytest.raises(ValueError, match="same rounds"):
            ratio_interval(*sides)


MEASURED = {
    "resnet20": {
        "fp32.eager": {"step": [2.0, 2.2, 2.1]},
        "fp32.compiled": {"step": [1.0, 1.2, 1.1], "memory": [100.0]},
        "fp32.compiled.channels_last": {"step": [1.1, 1.3, 1.2], "memory": [90.0]},
        "ours.whole": {"step": [1.1, 1.32, 1.21], "memory": [117.0], "scales": [2.0]},
    }
}


class TestGoals:
    @pytest.mark.parametrize(("limit", "met"), [(1.1001, True), (1.09, False)])
    def test_are_met_when_the_ratio_to_the_fastest_is_within_the_limit(self, limit: float, met: bool) -> None:
        verdict = judge(Goal("", "resnet20", "ours.whole", "step", limit, ("fp32.*",)), MEASURED)
        assert verdict.denominator == "fp32.compiled" and verdict.value == pytest.approx(1.1)
        assert verdict.met is met

    def test_the_denominator_is_lowest_in_the_same_measure(self) -> None:
        verdict = judge(Goal("", "resnet20", "ours.whole", "memory", 1.3, ("fp32.*",)), MEASURED)
        assert verdict.denominator == "fp32.compiled.channels_last" and verdict.value == pytest.approx(1.3)
        assert verdict.met

    def test_without_a_denominator_the_limit_is_absolute(self) -> None:
        verdict = judge(Goal("", "resnet20", "ours.whole", "scales", 1.5), MEASURED)
        assert (verdict.value, verdict.met) == (2.0, False)

    @pytest.mark.parametrize(
        "goal",
        [
            Goal("", "resnet20", "ours.regional", "step", 1.0, ("fp32.*",)),
            Goal("", "resnet20", "ours.whole", "step", 1.0, ("modelopt*",)),
            Goal("", "resnet18", "ours.whole", "step", 1.0, ("fp32.*",)),
        ],
    )
    def test_what_was_not_measured_is_neither_met_nor_missed(self, goal: Goal) -> None:
        assert judge(goal, MEASURED).met is None

    def test_fastest_looks_only_at_what_matches(self) -> None:
        assert fastest(MEASURED["resnet20"], ("fp32.eager*",), "step") == "fp32.eager"
        assert fastest(MEASURED["resnet20"], ("nncf",), "step") is None

    @pytest.mark.parametrize("goal", GOALS, ids=lambda goal: f"{goal.model}-{goal.contestant}-{goal.measure}")
    def test_name_what_is_measured(self, goal: Goal) -> None:
        """A goal whose contestant or denominator nobody measures would never be judged."""
        if goal.model == PYTHON:
            assert goal.measure in slopes({"bind": 0.0}, {"bind": 0.0}, 1)
            return
        field = {c.name: c for c in contestants(PROBLEMS[goal.model], list(peers.PEERS))}
        once = ("memory", COLD, WARM, SCALES)
        assert goal.measure in (*field[goal.contestant].timed, *once)
        if goal.against:
            known = {name: {m: [1.0] for m in (*c.timed, "memory")} for name, c in field.items()}
            assert fastest(known, goal.against, goal.measure)

    def test_a_run_below_the_goals_terms_is_not_judged(self) -> None:
        outcomes = {model: Outcome(figures=figures) for model, figures in MEASURED.items()}
        judged = verdicts(outcomes, 0, judged=True)
        assert [v["met"] for v in judged if v["value"] is not None].count(None) == 0
        assert {v["met"] for v in verdicts(outcomes, 0, judged=False)} == {None}
        assert why_not_judged(40, 2, None) is None
        assert "39 rounds" in (why_not_judged(39, 2, None) or "")
        assert "1 threads" in (why_not_judged(40, 1, None) or "")
        assert "batch 4" in (why_not_judged(40, 2, 4) or "")


class TestTables:
    def test_show_ratios_failures_and_what_was_compiled_in_between(self) -> None:
        outcome = Outcome(figures=MEASURED["resnet20"], failed={"nncf": "no ninja"}, compiled={"ours.whole": 2})
        text = model_table("resnet20", summary(outcome, 0))
        row = next(line for line in text.splitlines() if line.startswith("| ours.whole |"))
        assert "1210.0 [1100.0, 1320.0]" in row and "| 1.10 |" in row
        assert "nncf: no ninja" in text and "ours.whole: 2 graphs" in text
        rows = goal_table(verdicts({"resnet20": outcome}, 0, judged=True)).splitlines()
        assert any("| fp32.compiled | 1.100 | 1.1 |" in line for line in rows)
        assert any("not measured" in line for line in rows)
        rows = goal_table(verdicts({"resnet20": outcome}, 0, judged=False)).splitlines()
        assert any("| 1.100 | 1.1 | not judged |" in line for line in rows)
