"""The tables that are printed: one for each problem, and the goals; Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {
    "step": "step (ms)",
    "eager": "step / eager fp32",
    "compiled": "step / compiled fp32",
    "sandwich": "sandwich / 4 fp32 passes",
    "random_depth": "at random depth (ms)",
    "build": "build (s)",
    "start_cold": "first step, cold (s)",
    "start_warm": "warm (s)",
    "scales": "scales (s)",
    "memory": "peak (MB)",
}


def model_table(model: str, result: Mapping[str, Any]) -> str:
    """One line for each contestant of a problem; below it what failed and what was compiled in between."""
    rows = {name: _cells(figures) for name, figures in result["contestants"].items()}
    for name, seconds in result["preparation"].items():
        if name in rows:
            rows[name]["build"] = f"{seconds['build']:.1f}"
    used = [column for column in COLUMNS if any(column in cells for cells in rows.values())]
    lines = [f"| {model} | " + " | ".join(COLUMNS[c] for c in used) + " |", "|---" * (len(used) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells.get(c, "-") for c in used) + " |" for name, cells in rows.items()]
    lines += [f"\nFailed and left out: {name}: {why}" for name, why in result["failed"].items()]
    lines += [
        f"\n{name}: {count} graphs were compiled during its rounds, its times hold that"
        for name, count in result["compiled"].items()
    ]
    return "\n".join(lines)


def goal_table(goals: Sequence[Mapping[str, Any]]) -> str:
    """One line for each goal: figure, limit, whether it is met."""
    lines = ["| goal | model | variant | against | measured | limit | met |", "|---" * 7 + "|"]
    for goal in goals:
        unknown = goal["value"] is None
        met = "not measured" if unknown else {True: "yes", False: "**no**", None: "not judged"}[goal["met"]]
        known = "-" if unknown else _interval(goal)
        against = goal["denominator"] or " or ".join(goal["against"]) or "-"
        words = [goal["work"], goal["model"], goal["contestant"], against, known, f"{goal['limit']:g}", met]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines)


def _cells(figures: Mapping[str, Any]) -> dict[str, str]:
    """A contestant's cells by column, as far as it has the figures."""
    cells = {}
    for name in ("step", "random_depth"):
        if name in figures:
            cells[name] = _interval({key: 1e3 * figures[name][key] for key in ("low", "value", "high")}, 1)
    for column, measure, baseline in (
        ("eager", "step", "eager"),
        ("compiled", "step", "compiled"),
        ("sandwich", "sandwich", "fp32"),
    ):
        ratio = figures.get(measure, {}).get("ratios", {}).get(baseline)
        if ratio is not None:
            cells[column] = _interval(ratio, 2)
    for name in ("start_cold", "start_warm", "scales"):
        if name in figures:
            cells[name] = f"{figures[name]['value']:.1f}"
    if "memory" in figures:
        cells["memory"] = f"{figures['memory']['value'] / 1e6:.1f}"
    return cells


def _interval(figure: Mapping[str, float], digits: int = 3) -> str:
    low, value, high = (f"{figure[key]:.{digits}f}" for key in ("low", "value", "high"))
    return value if low == high else f"{value} [{low}, {high}]"
