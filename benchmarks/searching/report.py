"""README's section on search and prediction, from the results of search.py, predictor.py, assignments.py and others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from supernet.artefacts import read_json

SOURCES = ("search", "predictor", "assignments", "cifar10_resnet20")
Line = tuple[str, str, str, bool | None]


def section(folder: Path) -> str | None:
    """A table of goals and how to measure them again, of the results that there are; None where there are none."""
    found = {name: read_json(folder / f"{name}.json") for name in SOURCES if (folder / f"{name}.json").exists()}
    makers = {"search": searched, "predictor": predicted, "assignments": compared, "cifar10_resnet20": regretted}
    lines = [line for name, result in found.items() for line in makers[name](result)]
    if not lines:
        return None
    said = {True: "yes", False: "**no**", None: "not judged"}
    rows = [f"| {what} | {goal} | {figure} | {said[met]} |" for what, goal, figure, met in lines]
    return "\n".join(["| figure | goal | measured | met |", "|---|---|---|---|", *rows, "", *commands(found)])


def percent(value: float, digits: int = 2) -> str:
    """A share in percent."""
    return f"{100 * value:.{digits}f} %"


def searched(result: Mapping[str, Any]) -> Iterator[Line]:
    """Goals of search.py."""
    goals = {True: ("with integer-program seeds, 2 s", 0.001), False: ("without any seeds, 10 s", 0.05)}
    for row in result.get("additive", {}).get("summary", []):
        if row["algorithm"] == "nsga2" or (row["algorithm"] == "local" and not row["seeded"]):
            how, limit = goals[row["seeded"]]
            yield (
                f"{row['algorithm']}: excess over the exact optimum, {row['searches']} additive problems, 7 budgets, "
                f"{how}, worst",
                f"<= {percent(limit, 1)}",
                f"{percent(row['worst'], 3)} (mean {percent(row['mean'], 3)})",
                row["worst"] <= limit,
            )
    for row in result.get("entangled", {}).get("summary", []):
        if row["algorithm"] == "nsga2" and row["seeded"]:
            what = "nsga2: the same, depth and pairwise terms, optimum enumerated, worst"
            yield what, "<= 0.5 %", percent(row["worst"]), row["worst"] <= 0.005
    if "exhaustive" in result:
        shares = [run["share"] for run in result["exhaustive"]["runs"]]
        figure = f"{min(shares):.4f} to {max(shares):.4f}, mean {sum(shares) / len(shares):.4f}, {len(shares)} seeds"
        what = f"hypervolume / true one, {result['exhaustive']['subnets']} measured subnets, 400 measurements"
        yield what, ">= 0.99 on every seed", figure, min(shares) >= 0.99
    if "speed" in result:
        rate = result["speed"]["measured"]["rows_per_second"]["median"]
        yield (
            "candidates scored in a second: costs and additive factors, one thread",
            ">= 200,000",
            f"{rate:,.0f}",
            (rate >= 2e5),
        )
    for name, goal in (("one problem", 8), ("a problem each", 8)):
        if name in result.get("fliqs", {}):
            good, of = result["fliqs"][name]["good"], result["fliqs"][name]["of"]
            what = f"FLIQS within 2 % of the optimum and settled, {of} seeds, {name}"
            yield what, f">= {goal}", str(good), good >= goal


def predicted(result: Mapping[str, Any]) -> Iterator[Line]:
    """Goals of predictor.py."""
    summary = result["predictors"]["ensemble"]["summary"]
    alone = summary["controls"]["cost alone"]

    def said(value: Mapping[str, float] | None) -> str:
        return "-" if value is None else f"{value['mean']:.3f} ± {value['std']:.3f}"

    what = f"Kendall tau, {result['train']} pairs learned from, {result['held_out']} judged on"
    figure = (
        f"{said(summary['kendall'])}, the split-half ceiling is {said(summary['ceiling'])} "
        f"(cost alone {said(alone['kendall'])})"
    )
    yield what, f">= {result['goals']['kendall']:g}", figure, result["met"]["kendall"]
    for window, of in summary["windows"].items():
        cost = said(of["controls"]["cost alone"])
        figure = (
            f"{said(of['share_of_ceiling'])}: tau {said(of['kendall'])} of {said(of['ceiling'])}, "
            f"{of['pairs']['mean']:.0f} pairs (cost alone {cost})"
        )
        yield f"share of the split-half ceiling, {window} ± 5 %", ">= 0.9", figure, result["met"][window]
    speed = result["speed"]
    size = speed["size"]
    rate = f"{speed['rows_per_second']['predict']:,.0f} rows/s"
    what = (
        f"scoring with the ensemble ({size['members']} x {size['inputs']}-{size['hidden'][0]}-{size['hidden'][1]}-1) / "
        "bare batched products"
    )
    yield what, ">= 70 %", f"{percent(speed['share'], 0)}, {rate}", result["met"]["speed"]


def compared(result: Mapping[str, Any]) -> Iterator[Line]:
    """Goals of assignments.py."""
    names = {"at_limit": "the same limit", "at_cost": "the tool's own BitOps"}
    ranked = "the sensitivity" if result["search"]["ranked_by"] == "Additive" else "the predictor of the pairs"
    for key, name in names.items():
        verdicts = [row[key]["verdict"] for row in result["rows"]]
        pooled = [row[key]["verdict"] for row in result["pooled"]]
        figure = (
            f"{verdicts.count('win')} won, {verdicts.count('tie')} tied, {verdicts.count('loss')} lost "
            f"(seeds pooled: {pooled.count('win')}, {pooled.count('tie')}, {pooled.count('loss')})"
        )
        what = f"against assignments of ModelOpt, MCT, AIMET at {name}, on test, ranked by {ranked}"
        yield what, "none lost", figure, "loss" not in verdicts


def regretted(result: Mapping[str, Any]) -> Iterator[Line]:
    """Goal of cifar10_resnet20.py."""
    rows = [row for row in result["rows"] if "best_measured" in row]
    if rows:
        regret = {row["budget"]: row["best_measured"]["test"] - row["searched"]["test"] for row in rows}
        figure = ", ".join(f"{name} {100 * value:+.2f}" for name, value in regret.items())
        yield (
            f"regret on test against the best of {result['pairs']} measured subnets, points",
            "<= 0.2",
            figure,
            max(regret.values()) <= 0.002,
        )


def commands(found: Mapping[str, Any]) -> Iterator[str]:
    """How to measure again, and where it was measured."""
    cpus = sorted({str(cpu) for result in found.values() for cpu in _cpus(result)})
    names = ", ".join(f"`benchmarks/{name}.py`" for name in found)
    yield f"{', '.join(cpus)}, while other work ran; commands, seeds and every run in the JSON of {names}."


def _cpus(result: Mapping[str, Any]) -> Iterator[str]:
    parts = [result, *(part for part in result.values() if isinstance(part, Mapping))]
    for part in parts:
        if "provenance" in part:
            yield part["provenance"]["measured"]["cpu"]
