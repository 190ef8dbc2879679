"""Writes README's measured sections: step_time.py, compile.py and evaluate.py (and gpu.py); export.py; the search.

    python benchmarks/readme.py [--check]

One table of goals: what was measured with its 95 % interval, the limit, and whether the middle of the interval is
within it; below it the machine, the versions and the command lines. A section whose results are not there (export.json)
stays as it is. With --check nothing is written.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.searching import report as searching
from supernet.artefacts import read_json, write_text

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
NEEDED, WHERE_THERE_IS_ONE = ("step_time", "compile", "evaluate"), ("gpu",)
MARKS = "<!-- benchmark:step_time -->", "<!-- /benchmark:step_time -->"
EXPORT_MARKS = "<!-- benchmark:export -->", "<!-- /benchmark:export -->"
SEARCH_MARKS = "<!-- benchmark:search -->", "<!-- /benchmark:search -->"
MODELS = {
    "resnet20": "ResNet-20, 32 px",
    "resnet18": "ResNet-18, 64 px",
    "vit_tiny": "ViT-tiny, 64 px",
    "mobilenetv2": "MobileNetV2, 224 px",
    "python": "chains of 50 and 450 layers",
}
MET = {True: "yes", False: "**no**", None: "not judged"}


def results(folder: Path = RESULTS) -> dict[str, Any]:
    """The results by script; FileNotFoundError that says what to run where one is missing."""
    missing = [name for name in NEEDED if not (folder / f"{name}.json").exists()]
    if missing:
        raise FileNotFoundError(
            f"README's performance section needs the results of {', '.join(missing)}; "
            f"run {' and '.join(f'python benchmarks/{name}.py' for name in missing)} first"
        )
    there = [name for name in (*NEEDED, *WHERE_THERE_IS_ONE) if (folder / f"{name}.json").exists()]
    return {name: read_json(folder / f"{name}.json") for name in there}


def section(found: Mapping[str, Any]) -> str:
    """The text between the marks."""
    lines = ["| goal | network | ours | against | measured | limit | met |", "|---|---|---|---|---|---|---|"]
    lines += [row(goal) for goal in goals(found)]
    unjudged = {name: found[name]["judged"] for name in found if found[name]["judged"] != "judged"}
    lines += ["", machine(found), *without_sites(found["step_time"].get("models", {}))]
    lines += [f"benchmarks/{name}.py: {reason}." for name, reason in unjudged.items()]
    lines += ["", *gpu(found["gpu"])] if "gpu" in found else []
    return "\n".join([*lines, "", *commands(found)])


def goals(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All goals, each once: what step_time.py and compile.py both measure is taken from the latter."""
    key = ("model", "contestant", "measure")
    repeated = {tuple(goal[k] for k in key) for goal in found["compile"]["goals"]}
    first = [goal for goal in found["step_time"]["goals"] if tuple(goal[k] for k in key) not in repeated]
    return [*first, *found["compile"]["goals"], *found["evaluate"]["goals"]]


def row(goal: Mapping[str, Any], model: str | None = None) -> str:
    """One goal's line."""
    cells = [
        goal["work"],
        model or MODELS.get(goal["model"], goal["model"]),
        goal["contestant"].removeprefix("ours."),
        goal["denominator"] or " or ".join(goal["against"]) or "-",
        measured(goal),
        f"{goal['limit']:g}",
        "not measured" if goal["value"] is None else MET[goal["met"]],
    ]
    return "| " + " | ".join(cells) + " |"


def measured(goal: Mapping[str, Any]) -> str:
    """A figure with its interval, which is left out where it is a single value."""
    if goal["value"] is None:
        return "-"
    if goal["low"] == goal["high"]:
        return f"{goal['value']:.4g}"
    return f"{goal['value']:.3f} [{goal['low']:.3f}, {goal['high']:.3f}]"


def machine(found: Mapping[str, Any]) -> str:
    """Where and with what the figures were measured; ValueError where the files are not of one machine and torch."""
    places = {name: (found[name]["provenance"]["measured"]["cpu"], found[name]["torch"]) for name in NEEDED}
    if len(set(places.values())) > 1:
        told = ", ".join(f"{name}: {cpu} with torch {version}" for name, (cpu, version) in places.items())
        raise ValueError(f"the results are not of one machine and one torch ({told}); run the scripts on one")
    cpu, version = places[NEEDED[0]]
    first = found["step_time"]
    return (
        f"{cpu}, {first['threads']} threads, torch {version}. Medians of {first['rounds']} interleaved rounds, ratios "
        "with a bootstrap 95 % interval; a goal is met when the middle of the interval is within its limit."
    )


def without_sites(models: Mapping[str, Any]) -> list[str]:
    """One line with the ratios of a step without deployment sites, or none where they were not measured."""
    told = []
    for model, found in models.items():
        for name, figures in found.get("contestants", {}).items():
            if name.endswith(".no_sites") and "step" in figures:
                mode = name.removeprefix("ours.").removesuffix(".no_sites")
                told.append(f"{MODELS.get(model, model)}, {mode}: {measured(figures['step']['ratios']['fp32'])}")
    return [f"A one-subnet step without deployment sites, against the fastest fp32: {'; '.join(told)}."] if told else []


def gpu(result: Mapping[str, Any]) -> list[str]:
    """The goals of the GPU, what it reaches of its ceilings, and what was skipped or failed."""
    setting = result["setting"]
    network = f"{setting['model']}, {setting['size']} px, batch {setting['batch']}"
    lines = ["| goal | network | ours | against | measured | limit | met |", "|---|---|---|---|---|---|---|"]
    lines += [row(goal, network) for goal in result["goals"]]
    lines += ["", f"{result['device']}, torch {result['torch']}."]
    for name, of in result["variants"].items():
        shares = [
            f"{100 * of[key]:.0f} % of the {what} ceiling"
            for key, what in (("share_of_product", "product"), ("share_of_copy", "copy"))
            if key in of
        ]
        if "images_per_second" in of:
            lines.append(f"- {name}: " + ", ".join([f"{of['images_per_second']:.0f} images/s", *shares]))
    lines += [f"- skipped: {', '.join(result['skipped'])}"] if result["skipped"] else []
    return lines + [f"- failed: {name}: {why}" for name, why in result["failed"].items()]


def commands(found: Mapping[str, Any]) -> list[str]:
    """How to measure again."""
    lines = [f"`python benchmarks/{found[name]['command']}`" for name in found]
    files = ", ".join(f"{name}.json" for name in found)
    return [f"{', '.join(lines)}, `python benchmarks/readme.py`; figures in benchmarks/results ({files})."]


def export_section(result: Mapping[str, Any]) -> str:
    """The text between the marks of export.py: files, sizes, accuracies, failures, goals, machine, command."""
    from benchmarks.exporting.report import table

    lines = ["| goal | network | ours | against | measured | limit | met |", "|---|---|---|---|---|---|---|"]
    lines += [row(goal) for goal in result["goals"]]
    lines += [f"\nbenchmarks/export.py: {result['judged']}."] if result["judged"] != "judged" else []
    cpu = result["provenance"]["measured"]["cpu"]
    where = (
        f"{cpu}, {result['threads']} thread, batch 1, onnxruntime {result['onnxruntime']}. Medians of "
        f"{result['rounds']} interleaved rounds, ratios with a bootstrap 95 % interval; a goal is met when the middle "
        "of the interval is within its limit."
    )
    command = f"`python benchmarks/{result['command']}`, `python benchmarks/readme.py`; figures in export.json."
    return "\n".join([table(result), "", *lines, "", where, "", command])


def sections(
    found: Mapping[str, Any], export: Mapping[str, Any] | None, searched: str | None = None
) -> dict[tuple[str, str], str]:
    """The text between each pair of marks, as far as there are results."""
    made = {MARKS: section(found)}
    made |= {} if export is None else {EXPORT_MARKS: export_section(export)}
    return made | ({SEARCH_MARKS: searched} if searched else {})


def exported(folder: Path = RESULTS) -> dict[str, Any] | None:
    """The result of export.py, if there is one."""
    path = folder / "export.json"
    return read_json(path) if path.exists() else None


def replaced(text: str, block: str, marks: tuple[str, str] = MARKS) -> str:
    """`text` with another block between the marks; ValueError where it does not hold both marks once, in order."""
    pattern = f"{re.escape(marks[0])}.*?{re.escape(marks[1])}"
    if len(re.findall(pattern, text, flags=re.DOTALL)) != 1:
        raise ValueError(f"README.md needs {marks[0]} and {marks[1]} once, where the section belongs; add both lines")
    return re.sub(pattern, lambda _: f"{marks[0]}\n{block}\n{marks[1]}", text, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the section, or say whether it is up to date; 1 where it is not, 2 where it cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if the section is not up to date"
    )
    options = parser.parse_args(arguments)
    try:
        before = after = README.read_text()
        for marks, block in sections(results(), exported(), searching.section(RESULTS)).items():
            after = replaced(after, block, marks)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.check:
        print("README.md is up to date" if before == after else "README.md is not what the results give")
        return int(before != after)
    write_text(README, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
