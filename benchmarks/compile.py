"""What compiling costs before training starts, and that it is paid once: seconds, graphs, recompiles.

    python benchmarks/compile.py [--cases resnet20/ours.depth.regional,...] [--parts start,graphs]

`start`: seconds from the start of a process to its first finished training step, imports, 512 calibration images and
all compilation included; first with an empty compile cache (cold), then in further processes with what that left
(warm). Scale initialisation is SuperNet.calibrate alone. The problems, their batches and the optimizers are those of
benchmarks/step_time.py.

`graphs`: in one process at a small batch, training steps of fixed configurations (the largest and the smallest subnet,
and one with all genes in the middle) warm everything up; then 1,000 random configurations may not compile anything:
recompiling and reaching the recompile limit are errors meanwhile (torch._dynamo.config.error_on_recompile and
fail_on_recompile_limit_hit), and graphs and graph breaks are counted beside that.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.timing.contestants import PROBLEMS, Contestant, Problem, contestants
from benchmarks.timing.protocol import Answer, Worker, WorkerError, serve

if TYPE_CHECKING:
    from benchmarks.timing.goals import Goal, Measured
    from benchmarks.timing.steps import Elastic

STARTED = time.perf_counter()  # so far only light imports, so a worker's time to its first step counts from here
RESULT = Path(__file__).resolve().parent / "results" / "compile.json"
CASES = (
    "resnet20/ours.depth.regional",
    "resnet20/ours.depth.quantizers",
    "resnet20/ours.whole",
    "resnet18/ours.regional",
    "resnet18/ours.whole",
    "vit_tiny/ours.regional",
)
START, GRAPHS = "start", "graphs"
COLD, WARM, SCALES, NEW, BREAKS = "start_cold", "start_warm", "scales", "new_graphs", "graph_breaks"
LIMITS = {
    COLD: ("first finished step, cold cache (s)", 60.0),
    WARM: ("first finished step, warm cache (s)", 10.0),
    SCALES: ("scale initialisation of all choices (s)", 3.0),
    NEW: ("new graphs over {configurations} random configurations", 0.0),
    BREAKS: ("graph breaks over {configurations} random configurations", 0.0),
}
FEWEST_CONFIGURATIONS, THREADS = 1000, 2


def words(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of comma-separated words for argparse, which names the allowed ones."""

    def read(text: str) -> tuple[str, ...]:
        given = tuple(filter(None, text.split(",")))
        unknown = [word for word in given if word not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; choose from {', '.join(allowed)}")
        return given

    return read


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    every = [f"{p.name}/{c.name}" for p in PROBLEMS.values() for c in contestants(p) if c.kind == "ours"]
    add("--cases", type=words(every), default=CASES, metavar="A,B,...", help=f"default {','.join(CASES)}")
    add("--parts", type=words((START, GRAPHS)), default=(START, GRAPHS), help="start, graphs; default both")
    add("--repeats", type=int, default=3, help="warm starts of each case; default %(default)s")
    add("--configurations", type=int, default=FEWEST_CONFIGURATIONS, help="random ones; default %(default)s")
    add("--batch", type=int, default=2, help="of `graphs`; default %(default)s")
    add("--size", type=int, help="height and width of the images of `graphs`; default the problem's own")
    add("--seed", type=int, default=0, help="of data, weights and configurations; default %(default)s")
    add("--threads", type=int, default=THREADS, help="of each process; default %(default)s")
    add("--timeout", type=float, default=1800, help="seconds a worker may take; default %(default)s")
    add("--work", type=Path, default=Path("runs/compile"), help="logs of the workers; default %(default)s")
    add("--json", type=Path, default=RESULT, help="result file; default benchmarks/results/compile.json")
    add("--worker", metavar="PART/CASE", help="be the process of one part of a case; the script starts these")
    options = parser.parse_args(arguments)
    for name in ("repeats", "configurations", "batch", "threads"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name} is at least 1, got {value}")
    return options


def case(name: str) -> tuple[Problem, Contestant]:
    """The problem and the contestant of `problem/contestant`."""
    model, _, variant = name.partition("/")
    problem = PROBLEMS[model]
    return problem, next(c for c in contestants(problem) if c.name == variant)


# -- a worker ---------------------------------------------------------------------------------------------------------
def worker(options: argparse.Namespace) -> int:
    """Be the process of one part of a case; the exit code."""
    part, _, name = options.worker.partition("/")
    problem, contestant = case(name)

    def build() -> tuple[Answer, Mapping[str, Callable[[], Answer]]]:
        import torch

        from supernet.memory import keep_freed

        keep_freed()  # for everyone, as `elastibit train` does
        torch.set_num_threads(options.threads)
        if part == START:
            return first_step(problem, contestant, options.seed), {}
        small = replace(problem, batch=options.batch, size=options.size or problem.size)
        return many_configurations(small, contestant, options.seed, options.configurations), {}

    return serve(build)


def first_step(problem: Problem, contestant: Contestant, seed: int) -> Answer:
    """Train one step; seconds of each part since the process began, graphs and structures."""
    cold = not any(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).glob("*"))
    from benchmarks.timing.contestants import STEP
    from benchmarks.timing.steps import Elastic

    seconds = {"imports": time.perf_counter() - STARTED}
    runner = Elastic(contestant, problem, seed)
    before = time.perf_counter()
    runner.measures[STEP]()
    seconds |= runner.seconds | {"first_step": time.perf_counter() - before}
    seconds["to_first_step"] = time.perf_counter() - STARTED
    return {"cold": cold, "seconds": seconds, "graphs": graphs()[0], "structures": structures(runner)}


def structures(runner: Elastic) -> int | None:
    """Different structures among the compiled regions; None where the mode has no regions."""
    from supernet.elastic.regions import Regions

    if runner.net.compiled != "regional":
        return None
    return Regions(runner.net.model, compile=lambda function: function).structures


def graphs() -> tuple[int, int]:
    """Graphs that torch.compile has made in this process so far, and graph breaks that it met."""
    from torch._dynamo.utils import counters

    return counters["stats"].get("unique_graphs", 0), sum(counters["graph_break"].values())


def many_configurations(problem: Problem, contestant: Contestant, seed: int, count: int) -> Answer:
    """Warm up, then train `count` random configurations under errors on recompiling; what was compiled meanwhile."""
    import numpy as np
    import torch

    from benchmarks.timing.steps import Elastic

    runner = Elastic(contestant, problem, seed)
    warm_up = fixed_configurations(runner.net.space)
    for row in warm_up:
        train(runner, row)
    before, seen, stopped = graphs(), 0, None
    strict = {"error_on_recompile": True, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(strict):
        try:
            for row in runner.net.space.sample_indices(count, np.random.default_rng([seed, 4])):
                train(runner, row)
                seen += 1
        except Exception as failure:  # the case is lost, and its first line says why
            stopped = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
    after = graphs()
    return {
        "warm_up": len(warm_up),
        "warm_up_graphs": before[0],
        "structures": structures(runner),
        "configurations": seen,
        NEW: after[0] - before[0] + (stopped is not None),  # the graph that was not allowed counts as well
        BREAKS: after[1] - before[1],
        "breaks_of_warm_up": before[1],
        "stopped": stopped,
    }


def fixed_configurations(space: Any) -> list[Any]:
    """The largest and the smallest subnet, and one whose every gene is the middle of its choices; rows [d]."""
    middle = [len(d.choices) // 2 for d in space.dimensions]
    return [space.largest().row, space.smallest().row, middle]


def train(runner: Elastic, row: Any) -> None:
    """One training step of the subnet `row`."""
    images, labels = runner.batch
    for optimizer in runner.optimizers:
        optimizer.zero_grad(set_to_none=True)
    with runner.net.as_subnet(row):
        runner.task.loss(runner.net(images), labels).backward()
    for optimizer in runner.optimizers:
        optimizer.step()


# -- the driver -------------------------------------------------------------------------------------------------------
def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start the processes of one case, one after the other; their answers, and why parts failed."""
    found: dict[str, Any] = {"starts": [], "graphs": None, "failed": {}}
    for part in options.parts:
        with tempfile.TemporaryDirectory() as cache:
            try:
                if part == START:
                    for _ in range(1 + options.repeats):
                        found["starts"].append(asked(part, name, options, Path(cache)))
                else:
                    found["graphs"] = asked(part, name, options, Path(cache))
            except WorkerError as error:
                found["failed"][part] = str(error)
    return found


def asked(part: str, name: str, options: argparse.Namespace, cache: Path) -> Answer:
    """One process's answer; WorkerError where it fails."""
    from benchmarks.timing.race import Terms, environment

    terms = Terms(1, options.seed, options.threads, (), options.work, cache)
    variables = environment(terms) | {"TORCHINDUCTOR_CACHE_DIR": str(cache.absolute())}
    names = ["seed", "threads", "batch", "configurations", *(["size"] if options.size else [])]
    given = [word for option in names for word in (f"--{option}", str(getattr(options, option)))]
    command = [sys.executable, "-m", "benchmarks.compile", "--worker", f"{part}/{name}", *given]
    log = options.work / "logs" / f"{part}.{name.replace('/', '.')}.log"
    with Worker(command, variables, log) as started:
        return started.ready(options.timeout)


def figures(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Model -> contestant -> measure -> values, as benchmarks/timing/goals.py judges them."""
    measures: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, of in found.items():
        model, _, variant = name.partition("/")
        values: dict[str, list[float]] = {COLD: [], WARM: [], SCALES: [], NEW: [], BREAKS: []}
        for start in of["starts"]:
            values[COLD if start["cold"] else WARM].append(start["seconds"]["to_first_step"])
            values[SCALES].append(start["seconds"]["scales"])
        if of["graphs"] is not None:
            values[NEW].append(of["graphs"][NEW])
            values[BREAKS].append(of["graphs"][BREAKS])
        measures.setdefault(model, {})[variant] = {measure: seen for measure, seen in values.items() if seen}
    return measures


def goals(options: argparse.Namespace) -> list[Goal]:
    """The goals of the cases that were asked for."""
    from benchmarks.timing.goals import Goal

    asked_for = [m for m in LIMITS if (GRAPHS if m in (NEW, BREAKS) else START) in options.parts]
    return [
        Goal(LIMITS[measure][0].format(configurations=f"{options.configurations:,}"), model, variant, measure, limit)
        for measure in asked_for
        for limit in [LIMITS[measure][1]]
        for model, _, variant in (name.partition("/") for name in options.cases)
    ]


def why_not_judged(options: argparse.Namespace) -> str | None:
    """What keeps a run from being judged by the goals' own terms; None where nothing does."""
    if GRAPHS in options.parts and options.configurations < FEWEST_CONFIGURATIONS:
        return f"{options.configurations} configurations, the goal asks for {FEWEST_CONFIGURATIONS}"
    if options.threads != THREADS:
        return f"{options.threads} threads, the goals ask for {THREADS}"
    return None


def result(found: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file holds."""
    from importlib.metadata import version

    from benchmarks.timing.goals import judge
    from supernet.artefacts import command, provenance

    reason = why_not_judged(options)
    known: Measured = figures(found)
    verdicts = [judge(goal, known, options.seed).plain() for goal in goals(options)]
    return {
        "command": command(sys.argv),
        "torch": version("torch"),
        **{name: getattr(options, name) for name in ("seed", "threads", "repeats", "configurations", "batch", "size")},
        "judged": f"not judged: {reason}" if reason else "judged",
        "goals": verdicts if reason is None else [verdict | {"met": None} for verdict in verdicts],
        "cases": found,
        "provenance": provenance(options.seed),
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each case: seconds, graphs, structures; below it what failed."""
    known = figures(found)
    header = ["case", "first step, cold (s)", "warm (s)", "scales (s)", "structures", "graphs", "new", "breaks"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, of in found.items():
        model, _, variant = name.partition("/")
        values = known[model][variant]
        cells = [f"{median(values[m]):.1f}" if m in values else "-" for m in (COLD, WARM, SCALES)]
        last = of["graphs"] or (of["starts"] or [{}])[-1]
        compiled = (of["starts"] or [{}])[-1].get("graphs", last.get("warm_up_graphs"))
        counts = [last.get("structures"), compiled, last.get(NEW), last.get(BREAKS)]
        lines.append("| " + " | ".join([name, *cells, *("-" if c is None else str(c) for c in counts)]) + " |")
    for name, of in found.items():
        lines += [f"\nFailed: {part} of {name}: {why}" for part, why in of["failed"].items()]
        if of["graphs"] and of["graphs"]["stopped"]:
            lines.append(f"\n{name} after {of['graphs']['configurations']} configurations: {of['graphs']['stopped']}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the cases that were asked for, write the file, print the tables; 1 if nothing could be measured."""
    options = parsed(arguments)
    if options.worker:
        return worker(options)
    from benchmarks.timing.table import goal_table
    from supernet.artefacts import progress, write_json

    cases: dict[str, dict[str, Any]] = {}
    with progress("compiling", total=len(options.cases)) as bar:
        for name in options.cases:
            cases[name] = measured(name, options)
            found = result(cases, options)
            write_json(options.json, found)
            bar.advance(note=name)
    print(table(cases), goal_table(found["goals"]), sep="\n\n")
    print(f"\nGoals: {found['judged']}. All figures are in {options.json.name}.")
    return 0 if any(of["starts"] or of["graphs"] for of in cases.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
