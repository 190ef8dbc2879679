"""Bit assignments that other tools search, beside ours, all measured in the same trained supernet at equal BitOps.

    python benchmarks/assignments.py --run RUN [--work runs/assignments]
    python benchmarks/assignments.py --run RUN --make --weights FLOAT.safetensors [--tools modelopt-gradient,mct]

`--make` first lets the tools assign bits to the float network that the supernet's training started from, each in a
virtual environment of its own: 256 images of the recalibration part, drawn by each seed; bits 2 to 8 for weights and
inputs, first and last layer at 8; budgets in BitOps. A tool that has finished with a seed is not asked again. What they
chose lies in benchmarks/results/assignments/<tool>.json, in the tool's own form, so that judging needs none of them.

Judged is each assignment as it is, with BatchNorm statistics of its own on the recalibration part, against what
`elastibit search` finds in the same supernet

* `at_limit`: within the same limit;
* `at_cost`: within the assignment's own BitOps, which leaves ours nothing that the tool did not use;
* `bits_alone`: the same, but the tool's bits get the granularities and symmetries that our sensitivity likes best, so
  that only the bits differ.

Search and sensitivity see recalibration and select images; the table is measured on test. A difference comes with its
95 % interval of a paired bootstrap over the test images: `win` above 0, `loss` below, else `tie`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.timing.peers import python_of, variables
from benchmarks.timing.protocol import WorkerError
from supernet.artefacts import provenance, read_json, write_json, write_text
from supernet.desk import own_packages

if TYPE_CHECKING:
    from benchmarks.assigning.judge import Judge
    from supernet.cost import Factors
    from supernet.interfaces import Predictor
    from supernet.run import Run

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "assignments.json"
CHOSEN = ROOT / "benchmarks" / "results" / "assignments"
TOOLS = {"modelopt-gradient": "modelopt", "modelopt-kl": "modelopt", "mct": "mct", "aimet": "aimet"}
"""Name -> environment; the same names as the worker's."""
BUDGETS = ("w3a3", "w4a4", "w5a5", "w6a6")
SEEDS = (0, 1, 2)
KINDS = ("at_limit", "at_cost", "bits_alone")
BUSY = "wall time on a machine that did other work as well: not to be compared"


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run directory of the trained supernet")
    add("--work", type=Path, default=Path("runs/assignments"), help="what is known so far; default %(default)s")
    add("--make", action="store_true", help="let the tools assign bits before judging")
    add("--weights", type=Path, help="with --make: the float network's safetensors")
    add("--environments", type=Path, default=Path("runs/peers"), help="with --make; default %(default)s")
    add("--timeout", type=float, default=7200, help="with --make: seconds for each tool and seed; default %(default)s")
    add("--tools", type=words(list(TOOLS)), default=list(TOOLS), metavar="A,B", help=f"of {', '.join(TOOLS)}")
    add("--candidates", type=int, default=4, help="subnets that a search measures for each budget; default %(default)s")
    add("--recalibrate", type=int, default=1024, help="images for their BatchNorm; default %(default)s")
    add("--select", type=int, default=2500, help="images that they are measured on; default %(default)s")
    add("--compile", default="quantizers", help="as `elastibit search` takes it; default %(default)s")
    add("--json", type=Path, default=RESULT, help="result file; default benchmarks/results/assignments.json")
    add("--chosen", type=Path, default=CHOSEN, help="folder of the assignments; default benchmarks/results/assignments")
    options = parser.parse_args(arguments)
    if options.make and options.weights is None:
        parser.error("--make needs --weights, the float network that the supernet's training started from")
    return options


def words(known: list[str]) -> Any:
    """Reads `a,b` and refuses what is not known."""

    def read(text: str) -> list[str]:
        found = [word for word in text.split(",") if word]
        strange = [word for word in found if word not in known]
        if strange or not found:
            raise argparse.ArgumentTypeError(f"one or more of {', '.join(known)}, got {text!r}")
        return found

    return read


# -- the tools --------------------------------------------------------------------------------------------------------
def make(run: Run, options: argparse.Namespace) -> dict[str, str]:
    """Write <chosen>/<tool>.json for each tool; what went wrong, by tool."""
    from benchmarks.assigning.chosen import chosen
    from benchmarks.assigning.given import prepare
    from supernet.tasks.classification import Classification

    if not isinstance(run.task, Classification):
        raise ValueError(
            f"the tools are given images and labels, but {run.path} has none; train it on a classification"
        )
    folder = (options.work / "tools").absolute()
    limits = {budget: run.net.costs.limit("bitops", budget) for budget in BUDGETS}
    prepare(folder, options.weights, run.task, SEEDS, limits)
    failed = {}
    for tool in options.tools:
        try:
            sweeps = [asked(tool, folder, seed, options) for seed in SEEDS]
        except WorkerError as error:
            failed[tool] = str(error)
            continue
        seeds = [
            {"seed": sweep["seed"], "budgets": chosen(run.net, sweep["sweep"], limits), "measured": sweep["measured"]}
            for sweep in sweeps
        ]
        kept = {key: sweeps[0][key] for key in ("tool", "options", "versions", "images")}
        made = kept | {"timing": BUSY, "seeds": seeds}
        write_text(options.chosen / f"{tool}.json", json.dumps(made, separators=(",", ":")) + "\n")
    return failed


def asked(tool: str, folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What a tool answers to one draw of images; from its file if it has answered before.

    Raises:
        WorkerError: the environment cannot be made, the tool fails, or it takes too long.
    """
    out = folder / f"{tool}-{seed}.json"
    if not out.exists():
        python = python_of(TOOLS[tool], options.environments)
        environment = variables(python, os.environ) | {"PYTHONPATH": str(ROOT)}
        command = [str(python), "-m", "benchmarks.assigning.worker", tool, str(folder), str(seed)]
        log = folder / f"{tool}-{seed}.log"
        with log.open("w") as file:
            try:
                ran = subprocess.run(
                    command, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=options.timeout
                )
            except subprocess.TimeoutExpired:
                raise WorkerError(f"no answer within {options.timeout:.0f} s; see {log.name}") from None
        if ran.returncode or not out.exists():
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing was said"]
            raise WorkerError(f"ended with code {ran.returncode}: {last[0][:200]}; see {log.name}")
    found: dict[str, Any] = read_json(out)
    return found


# -- ours, and the comparison -----------------------------------------------------------------------------------------
def searched(
    run: Run, seed: int, limits: dict[str, float], ranking: tuple[Predictor, Factors], options: argparse.Namespace
) -> dict[str, Any]:
    """Our winners by budget, found with one search; from its file if it was done before.

    Args:
        run: the run.
        seed: of the search.
        limits: BitOps by the budget's name.
        ranking: what subnets are ranked by, and the sensitivity.
        options: of the benchmark.
    """
    import numpy as np

    import elastibit as eb
    from predictors.measuring import weights_digest

    asked_for = {"weights": weights_digest(run.net), "limits": limits, "settings": settings_of(options)}
    file = options.work / f"searched-{seed}.json"
    if file.exists() and (known := read_json(file))["asked"] == asked_for:
        return dict(known)
    start = time.monotonic()
    distinct = sorted(set(limits.values()))
    predictor, sensitivity = ranking
    front = eb.search(
        run.net,
        predictor,
        budgets=[{"bitops": limit} for limit in distinct],
        rng=np.random.default_rng(seed),
        task=run.task,
        sensitivity=sensitivity,
        candidates=options.candidates,
        recalibrate_images=options.recalibrate,
        select_images=options.select,
        random_search=False,
    )
    winners = dict(zip(distinct, front, strict=True))
    rows = {name: list(winners[limit].config.row) for name, limit in limits.items()}
    found = {"asked": asked_for, "winners": rows, "measured": {"seconds": round(time.monotonic() - start, 1)}}
    write_json(file, found)
    return found


def settings_of(options: argparse.Namespace) -> dict[str, int]:
    """How much a search measures."""
    return {"candidates": options.candidates, "recalibrate": options.recalibrate, "select": options.select}


def ranking_of(run: Run, options: argparse.Namespace) -> tuple[Predictor, Factors]:
    """The run's predictor, else its sensitivity; and the sensitivity, which seeds the search."""
    from predictors.additive import Additive
    from predictors.files import load_predictor
    from predictors.measuring import weights_digest
    from predictors.output_mse import OutputMSE

    assert run.task is not None
    sensitivity = OutputMSE()(run.net, run.task.recalibrate(options.recalibrate))
    file = run.path / "predictor.json"
    if not file.exists():
        return Additive(run.net.space, sensitivity=sensitivity), sensitivity
    if read_json(file)["report"].get("weights") not in (None, weights_digest(run.net)):
        raise ValueError(f"{file} was learned on other weights; run `elastibit predict run={run.path}` again")
    return load_predictor(run.path, run.net.space, run.net.costs), sensitivity


def judged(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """The rows of the table, and the same over all seeds of a tool and budget."""
    from benchmarks.assigning.judge import Judge

    assert run.task is not None
    judge = Judge(run.net, run.task.recalibrate(), run.task.test(), options.work / "outcomes.jsonl")
    ranking = ranking_of(run, options)
    tools = [read_json(file) for tool in options.tools if (file := options.chosen / f"{tool}.json").exists()]
    rows, seconds = [], {}
    for seed in SEEDS:
        theirs = [
            (tool["tool"], budget, entry)
            for tool in tools
            for of in tool["seeds"]
            if of["seed"] == seed
            for budget, entry in of["budgets"].items()
        ]
        limits = {budget: run.net.costs.limit("bitops", budget) for budget in BUDGETS}
        limits |= {f"{tool} {budget}": entry["bitops"] for tool, budget, entry in theirs}
        ours = searched(run, seed, limits, ranking, options)
        seconds[str(seed)] = ours["measured"]["seconds"]
        for tool, budget, entry in theirs:
            print(f"judging {tool}, {budget}, seed {seed}", file=sys.stderr)
            figures = row(judge, ranking[1], entry, ours["winners"], (tool, budget))
            rows.append({"tool": tool, "budget": budget, "seed": seed} | figures)
    made = {"images": judge.images, "rows": rows, "pooled": pooled(judge, rows), "tools": described(tools)}
    made["search"] = settings_of(options) | {"ranked_by": type(ranking[0]).__name__}
    return made | {"measured": {"timing": BUSY, "search_seconds": seconds}}


def row(
    judge: Judge, sensitivity: Factors, entry: dict[str, Any], winners: dict[str, list[int]], name: tuple[str, str]
) -> dict[str, Any]:
    """One assignment, of the tool and budget `name`, against our winners."""
    from benchmarks.assigning.chosen import imported
    from benchmarks.assigning.judge import compared, with_best_forms

    space = judge.net.space
    theirs = imported(judge.net, entry["map"])
    formed = with_best_forms(judge.net, theirs, sensitivity)
    limit, cost = (space.config(winners[key]) for key in (name[1], " ".join(name)))
    pairs = dict(zip(KINDS, ((limit, theirs), (cost, theirs), (cost, formed)), strict=True))
    found: dict[str, Any] = {"limit": entry["limit"], "bitops": entry["bitops"]}
    for kind, (mine, other) in pairs.items():
        facts = {"ids": [mine.id, other.id], "bitops": judge.net.costs.of(mine)["bitops"]}
        found[kind] = facts | compared([judge(mine)], [judge(other)])
    return found


def pooled(judge: Judge, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for each tool and budget over all seeds: mean accuracies on the same images."""
    from benchmarks.assigning.judge import compared

    found = []
    for tool, budget in dict.fromkeys((r["tool"], r["budget"]) for r in rows):
        members = [r for r in rows if (r["tool"], r["budget"]) == (tool, budget)]
        used = sum(r["bitops"] / r["limit"] for r in members) / len(members)
        figures: dict[str, Any] = {"tool": tool, "budget": budget, "used": used}
        for kind in KINDS:
            pairs = [[judge.known[name] for name in r[kind]["ids"]] for r in members]
            ours, theirs = zip(*pairs, strict=True)
            figures[kind] = compared(ours, theirs) | {"verdicts": [r[kind]["verdict"] for r in members]}
        found.append(figures)
    return found


def described(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Versions and times of the tools."""
    return [
        {key: tool[key] for key in ("tool", "options", "versions", "images")}
        | {"measured": {"timing": BUSY, "seconds": [of["measured"]["seconds"] for of in tool["seeds"]]}}
        for tool in tools
    ]


def table(result: dict[str, Any]) -> str:
    """A row for each tool and budget: accuracies over the seeds, and how the comparisons went."""
    lines = [
        "| tool | budget | BitOps used | its assignment | its bits, our forms | ours, same limit | ours, its BitOps | "
        "same limit | its BitOps | its bits, our forms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in result["pooled"]:
        figures = [line[kind]["theirs"] for kind in ("at_limit", "bits_alone")]
        figures += [line[kind]["ours"] for kind in ("at_limit", "at_cost")]
        cells = [line["tool"], line["budget"], f"{100 * line['used']:.1f} %", *(f"{100 * x:.2f} %" for x in figures)]
        lines.append("| " + " | ".join([*cells, *(against(line[kind]) for kind in KINDS)]) + " |")
    counts = "; ".join(f"{kind}: {counted([r[kind]['verdict'] for r in result['rows']])}" for kind in KINDS)
    seeds = ", ".join(map(str, result["seeds"]))
    lines += ["", f"Accuracy on {result['images']} test images of one supernet, mean over seeds {seeds}. {counts}."]
    return "\n".join(lines + [f"{tool}: {why}" for tool, why in result["failed"].items()])


def against(compared: dict[str, Any]) -> str:
    """`win +0.52 [0.21, 0.83]`: verdict over all seeds, difference in points with its interval."""
    mean, low, high = (100 * compared[key] for key in ("mean", "low", "high"))
    return f"{compared['verdict']} {mean:+.2f} [{low:.2f}, {high:.2f}]"


def counted(verdicts: Sequence[str]) -> str:
    """`2 win, 1 tie`."""
    return ", ".join(f"{verdicts.count(v)} {v}" for v in ("win", "tie", "loss") if v in verdicts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Let the tools assign if asked to, judge, print the table and write JSON; the exit code: 1 where ours lost."""
    own_packages()  # benchmarks/search.py is not the package
    import elastibit as eb
    from supernet.run import digest

    options = parsed(arguments)
    run = eb.load(options.run)
    failed = make(run, options) if options.make else {}
    run.net.compile(options.compile, passes="evaluation")
    result = judged(run, options) | {
        "failed": failed,
        "supernet": {"sha256": digest(options.run), "epochs": run.trained},
        "seeds": list(SEEDS),
        "provenance": provenance(0),
    }
    write_json(options.json, result)
    print(table(result))
    return int(any(row[kind]["verdict"] == "loss" for row in result["rows"] for kind in KINDS[:2]))


if __name__ == "__main__":
    sys.exit(main())
