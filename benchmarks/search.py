"""How near the optimum each search algorithm ends, how fast candidates are scored, and whether FLIQS settles.

    python benchmarks/search.py [--only additive,entangled,speed,fliqs,exhaustive] [--problems 20] [--others 3]

additive: the yardstick (ResNet-18, 42 genes) and `--problems` drawn ones of its kind (20 to 200 genes), seven budgets
in one search, with the integer program's optima as seeds and without any; algorithms other than the default on the
yardstick and the first `--others` drawn. entangled: depth and pairwise terms, optimum enumerated. speed: candidates
scored per second. fliqs: the training sampler's policy on a problem that is enumerated. exhaustive: the front found
with 400 measurements of 4,096 subnets of a trained net, all of which are measured once and kept beside the result.

Every search is that of `elastibit search` with its generations and population, stopped after 2
(with seeds) or 10 (without) seconds of CPU time. Prints a table and writes benchmarks/results/search.json; parts that
are left out keep their figures there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = ("additive", "entangled", "speed", "fliqs", "exhaustive")
FIRST = "nsga2"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--only", default=",".join(PARTS), help="parts to run, separated by commas; default all")
    add("--algorithms", default="nsga2,genetic,mu_plus_lambda,local,fliqs", help="options of conf/algorithm")
    add("--problems", type=int, default=20, help="drawn additive problems; default %(default)s")
    add("--others", type=int, default=3, help="of them, for algorithms that are not the default")
    add("--seeds", type=int, default=5, help="seeds of entangled problems; of the policy twice as many")
    add("--generations", type=int, default=40)
    add("--population", type=int, default=120)
    add("--json", type=Path, default=RESULTS / "search.json", help="file to write")
    options = parser.parse_args(arguments)
    unknown = set(options.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"parts are {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    return options


def additive(options: argparse.Namespace) -> dict[str, Any]:
    """Excess on additive problems, of every algorithm, seeded and not."""
    from benchmarks.searching.problems import drawn, yardstick

    cases = [yardstick(), *map(drawn, range(options.problems))]
    return _searched(options, cases, 1 + options.others)


def entangled(options: argparse.Namespace) -> dict[str, Any]:
    """Excess where the error is no sum."""
    from benchmarks.searching.problems import entangled as made

    return _searched(options, [made(seed) for seed in range(options.seeds)], options.seeds)


def _searched(options: argparse.Namespace, cases: Sequence[Any], others: int) -> dict[str, Any]:
    from benchmarks.searching.excess import searched, summary
    from supernet.artefacts import progress

    todo = [
        (case, algorithm, seeded)
        for algorithm in options.algorithms.split(",")
        for case in (cases if algorithm == FIRST else cases[:others])
        for seeded in (True, False)
    ]
    runs = []
    with progress("searching", len(todo)) as bar:
        for case, algorithm, seeded in todo:
            runs.append(searched(case, algorithm, seeded, 0, options.generations, options.population))
            bar.advance(note=f"{algorithm}, {case.name}: {runs[-1]['worst']:.2%}")
    sizes = {"generations": options.generations, "population": options.population}
    return {**sizes, "summary": summary(runs), "runs": runs}


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Candidates scored per second on the yardstick."""
    from benchmarks.searching.excess import speed as timed
    from benchmarks.searching.problems import yardstick

    return timed(yardstick(), 20_000, 15)


def fliqs(options: argparse.Namespace) -> dict[str, Any]:
    """What the policy settles on."""
    from benchmarks.searching.settling import policies

    return policies(2 * options.seeds)


def exhaustive(options: argparse.Namespace) -> dict[str, Any]:
    """The front of few measurements beside that of all."""
    from benchmarks.searching.exhaustive import fronts

    return fronts(RESULTS / "exhaustive.json", options.seeds)


def show(part: str, found: dict[str, Any]) -> None:
    """The lines of one part."""
    print(part)
    for line in found.get("summary", ()):
        seeds, took = "seeded" if line["seeded"] else "no seeds", line["measured"]
        print(
            f"  {line['algorithm']:16} {seeds:9} {line['searches']:3} searches, excess mean {line['mean']:8.3%} "
            f"worst {line['worst']:8.3%}, longest {took['longest_cpu_seconds']:.1f} s CPU, "
            f"{took['longest_wall_seconds']:.1f} s"
        )
    if part == "speed":
        rate = found["measured"]["rows_per_second"]
        print(f"  {rate['median']:,.0f} a second ({rate['least']:,.0f} to {rate['most']:,.0f})")
    if part == "fliqs":
        for name, its in found.items():
            print(f"  {name:16} {its['good']} of {its['of']} good, mean entropy {its['entropy']:.4f} nats")
    if part == "exhaustive":
        for run in found["runs"]:
            print(f"  seed {run['seed']}: {run['measurements']} measurements, {run['share']:.4f} of the hypervolume")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print them, keep them."""
    from supernet.artefacts import provenance, read_json, write_json
    from supernet.desk import own_packages

    options = parsed(arguments)
    own_packages()  # this file is not the package of its name
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "additive": additive,
        "entangled": entangled,
        "speed": speed,
        "fliqs": fliqs,
        "exhaustive": exhaustive,
    }
    for part in options.only.split(","):
        found = parts[part](options)
        show(part, found)
        kept = read_json(options.json) if options.json.exists() else {}
        write_json(options.json, kept | {part: found | {"provenance": provenance(0)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
