"""What an elastic training step costs beside an fp32 step, measured side by side in one run on the CPU.

    python benchmarks/step_time.py [--models resnet20,resnet18,vit_tiny] [--peers modelopt,nncf,brevitas]

Every variant is a process of its own; in each round every variant takes one step that is timed, after one that is not,
in a shuffled order: training takes one step after the other. A ratio is the median of one side over the median of the
other in the same rounds, with a bootstrap 95 % interval; a goal is met when that ratio is within its limit. The
baseline is the fastest of eager and compiled fp32, contiguous and channels_last, with the same images, labels, loss
(cross entropy) and optimizer (SGD with Nesterov momentum 0.9); ours has LazyAdam for its scales beside it and draws a
new random configuration in every step. Every process keeps the memory that it frees, as `elastibit train` does
(supernet/memory.py).

Variants `ours.depth.*` have elastic depth in their space: `step` and `sandwich` draw bits and forms at full depth,
which is what fp32's step computes, and "at random depth" is the time of a step that draws the depth too. Variants
`.no_sites` have no deployment sites. Times to the first finished step count from the start of the process, imports and
512 calibration images included; without --cache each variant starts with an empty compile cache (cold), ours once more
with what that left (warm). Peak memory: benchmarks/timing/peak.py. The attention products of the ViT stay in float.

Peers run in virtual environments that the script makes under --work, one for each, with pip (gigabytes each). All
variants of a model are in memory at once, about 1 GB each; --variants takes fewer.

Writes --json after each model and prints the tables at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.timing.contestants import MEASURES, PROBLEMS, PYTHON, STEP, Contestant, Problem, contestants
from benchmarks.timing.peers import PEERS

if TYPE_CHECKING:
    from benchmarks.timing.race import Outcome, Terms

STARTED = time.perf_counter()  # so far only light imports, so a worker's time to its first step counts from here
RESULT = Path(__file__).resolve().parent / "results" / "step_time.json"


def words(allowed: Sequence[str]) -> Any:
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
    lists: Any = {"metavar": "A,B,..."}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", type=words(list(PROBLEMS)), default=tuple(PROBLEMS), help=f"of {', '.join(PROBLEMS)}", **lists)
    add("--variants", default="*", help="shell patterns of variants, e.g. fp32.*,ours.whole*; default all", **lists)
    add("--measure", type=words(MEASURES), default=MEASURES, help=f"of {', '.join(MEASURES)}; default all", **lists)
    add("--peers", type=words(list(PEERS)), default=(), help=f"of {', '.join(PEERS)}; default none", **lists)
    add("--rounds", type=int, default=40, help="default %(default)s; goals are judged from 40 on")
    add("--seed", type=int, default=0, help="of data, weights, configurations and order; default %(default)s")
    add("--threads", type=int, default=2, help="of each process; default %(default)s")
    add("--batch", type=int, help="in place of the problems' own, to try things out; goals are not judged then")
    add("--timeout", type=float, default=1800, help="seconds a worker may take for an answer; default %(default)s")
    add("--cache", type=Path, help="folder of compile caches, kept; default a fresh temporary one")
    add("--work", type=Path, default=Path("runs/step_time"), help="peers' environments and logs; default %(default)s")
    add("--json", type=Path, default=RESULT, help="result file; default benchmarks/results/step_time.json")
    add("--worker", metavar="MODEL/VARIANT", help="be the process that steps one variant; the script starts these")
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} is at least 1, got {value}")
    return options


def chosen(problem: Problem, options: argparse.Namespace) -> list[Contestant]:
    """The contestants of a problem that --variants and --peers ask for."""
    patterns = options.variants.split(",")
    everyone = contestants(problem, options.peers)
    return [c for c in everyone if any(fnmatch(c.name, pattern) for pattern in patterns)]


def worker(options: argparse.Namespace) -> int:
    """Be one worker; see benchmarks/timing/worker.py."""
    from dataclasses import replace

    from benchmarks.timing.worker import overhead, work

    if options.worker == PYTHON:
        return overhead(options.seed, options.threads)
    model, _, name = options.worker.partition("/")
    problem = PROBLEMS[model] if options.batch is None else replace(PROBLEMS[model], batch=options.batch)
    contestant = next(c for c in contestants(problem, list(PEERS)) if c.name == name)
    return work(contestant, problem, options.measure, options.seed, options.threads, STARTED)


@contextlib.contextmanager
def terms(options: argparse.Namespace) -> Iterator[Terms]:
    """The options as the race wants them; a temporary compile cache is gone afterwards."""
    from benchmarks.timing.race import Terms

    with contextlib.ExitStack() as stack:
        cache = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield Terms(
            options.rounds,
            options.seed,
            options.threads,
            options.measure,
            options.work,
            cache,
            options.batch,
            options.timeout,
        )


def result(outcomes: dict[str, Outcome], options: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file holds."""
    from importlib.metadata import version

    from benchmarks.timing.peers import requirements
    from benchmarks.timing.result import summary, verdicts, why_not_judged
    from supernet.artefacts import command, provenance

    reason = why_not_judged(options.rounds, options.threads, options.batch)
    return {
        "command": command(sys.argv),
        "torch": version("torch"),
        "seed": options.seed,
        "rounds": options.rounds,
        "threads": options.threads,
        "batch": {model: options.batch or PROBLEMS[model].batch for model in options.models},
        "peers": {peer: requirements(peer) for peer in options.peers},
        "judged": f"not judged: {reason}" if reason else "judged",
        "goals": verdicts(outcomes, options.seed, judged=reason is None),
        "models": {model: summary(outcome, options.seed) for model, outcome in outcomes.items()},
        "provenance": provenance(options.seed),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Race every problem that was asked for, write the file, print the tables; 1 if nothing could be timed."""
    options = parsed(arguments)
    if options.worker:
        return worker(options)
    from benchmarks.timing.race import python_time, race
    from benchmarks.timing.table import goal_table, model_table
    from supernet.artefacts import write_json

    outcomes: dict[str, Outcome] = {}
    with terms(options) as held:
        if PYTHON in options.measure:
            outcomes[PYTHON] = python_time(held)
        for model in options.models:
            problem = held.problem(model)
            outcomes[model] = race(problem, chosen(problem, options), held)
            write_json(options.json, result(outcomes, options))
    found = result(outcomes, options)
    write_json(options.json, found)
    for model in options.models:
        print(model_table(model, found["models"][model]), end="\n\n")
    print(goal_table([goal for goal in found["goals"] if goal["model"] in outcomes]))
    print(f"\nGoals: {found['judged']}. All figures are in {options.json.name}.")
    return 0 if any(STEP in of for outcome in outcomes.values() for of in outcome.figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
