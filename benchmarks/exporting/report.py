"""From what benchmarks/export.py measured to its JSON file and its tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.exporting.goals import BYTES, ERROR, FP32, GOALS, LATENCY, SECONDS, STATIC, why_not_judged
from benchmarks.timing.goals import fastest, judge
from benchmarks.timing.intervals import median_interval, ratio_interval
from benchmarks.timing.result import plain

if TYPE_CHECKING:
    from benchmarks.export import Outcome

BASELINES = {"fp32": FP32, "static": (STATIC,)}


def result(outcomes: Mapping[str, Outcome], options: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file holds."""
    from importlib.metadata import version

    from supernet.artefacts import command, provenance

    reason = why_not_judged(options.rounds)
    seen = {model: outcome.figures for model, outcome in outcomes.items()}
    verdicts = [judge(goal, seen, options.seed).plain() for goal in GOALS if goal.model in outcomes]
    return {
        "command": command(sys.argv),
        "torch": version("torch"),
        "onnxruntime": version("onnxruntime"),
        "seed": options.seed,
        "rounds": options.rounds,
        "threads": 1,
        "judged": f"not judged: {reason}" if reason else "judged",
        "goals": verdicts if reason is None else [verdict | {"met": None} for verdict in verdicts],
        "models": {model: _model(outcome, options.seed) for model, outcome in outcomes.items()},
        "provenance": provenance(options.seed),
    }


def _model(outcome: Outcome, seed: int) -> dict[str, Any]:
    figures = outcome.figures
    contestants: dict[str, Any] = {}
    for name, of in figures.items():
        contestants[name] = {measure: values[0] for measure, values in of.items() if measure != LATENCY}
        if LATENCY in of:
            contestants[name][LATENCY] = plain(median_interval(of[LATENCY], seed)) | {
                "rounds": [round(value, 7) for value in of[LATENCY]],
                "ratios": _ratios(figures, of[LATENCY], seed),
            }
    parts = ("about", "facts", "sizes", "accuracy", "failed")
    return {"contestants": contestants} | {part: getattr(outcome, part) for part in parts}


def _ratios(figures: Mapping[str, Any], values: list[float], seed: int) -> dict[str, Any]:
    ratios = {}
    for name, patterns in BASELINES.items():
        other = fastest(figures, patterns, LATENCY)
        if other is not None:
            ratios[name] = {"against": other} | plain(ratio_interval(values, figures[other][LATENCY], seed))
    return ratios


# -- tables ------------------------------------------------------------------------------------------------------------
def table(found: Mapping[str, Any]) -> str:
    """Latency, error and bytes of every file; sizes; accuracy; what failed."""
    return "\n\n".join(part for part in (files(found), sizes(found), accuracies(found), failures(found)) if part)


def files(found: Mapping[str, Any]) -> str:
    """One line for each file that was timed."""
    lines = [
        "| network | file | ms | / fp32 | / quantize_static | error | MB | export and proof (s) |",
        "|---" * 8 + "|",
    ]
    for model, of in found["models"].items():
        for name, one in of["contestants"].items():
            if LATENCY not in one:
                continue
            time = {key: 1e3 * one[LATENCY][key] for key in ("low", "value", "high")}
            ratios = [_interval(one[LATENCY]["ratios"].get(which)) for which in BASELINES]
            error = f"{one[ERROR]:.2g}" if ERROR in one else "-"
            seconds = f"{one[SECONDS]:.1f}" if SECONDS in one else "-"
            cells = [model, name, _interval(time), *ratios, error, f"{one[BYTES] / 1e6:.2f}", seconds]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sizes(found: Mapping[str, Any]) -> str:
    """One line for each network: kB of the packed file, over what it needs in its containers, and at the true bits."""
    known = {model: of["sizes"] for model, of in found["models"].items() if of["sizes"]}
    if not known:
        return ""
    bits = list(next(iter(known.values())))
    lines = ["| kB of the file (over its containers, over true bits) | " + " | ".join(f"{b} bits" for b in bits) + " |"]
    lines.append("|---" * (len(bits) + 1) + "|")
    for model, of in known.items():
        cells = [_size(of[b]) if b in of else "-" for b in bits]
        lines.append("| " + " | ".join([model, *cells]) + " |")
    return "\n".join(lines)


def _size(of: Mapping[str, float]) -> str:
    return f"{of['bare'] / 1e3:.0f} ({of['over_ideal']:.3f}, {of['over_nominal']:.3f})"


def accuracies(found: Mapping[str, Any]) -> str:
    """One line for each network with trained weights."""
    lines = [
        f"{model}, accuracy on {of['about']['test']} test images: "
        + ", ".join(f"{name} {100 * share:.1f} %" for name, share in of["accuracy"].items())
        for model, of in found["models"].items()
        if of["accuracy"]
    ]
    return "\n".join(lines)


def failures(found: Mapping[str, Any]) -> str:
    """One line for each part that failed."""
    rows = [(model, name, why) for model, of in found["models"].items() for name, why in of["failed"].items()]
    return "\n".join(f"Failed and left out: {model}, {name}: {why}" for model, name, why in rows)


def _interval(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "-"
    low, value, high = (f"{figure[key]:.3f}" for key in ("low", "value", "high"))
    return value if low == high else f"{value} [{low}, {high}]"
