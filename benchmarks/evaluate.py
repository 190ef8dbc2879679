"""What judging a subnet costs beside plain fp32 passes over the same images, measured side by side in one run.

    python benchmarks/evaluate.py [--variants ours.regional*,fp32.*] [--profile]

Ours is what `predictors.measuring.tested` does with a fresh random subnet in every round: BatchNorm statistics of its
own from the recalibration images, then its outcome on the other images. fp32 passes over the same images without
gradients: in train mode over the recalibration images, in eval mode over the rest; its fastest variant (eager or
compiled, contiguous or channels_last) is the baseline. The network is a ResNet-20 with elastic depth, whose subnets
are drawn at full depth, which is what fp32 runs too; images, weights and scales are random.

Every variant is a process of its own; in each round every variant judges once, in a shuffled order. A ratio is the
median of one side over the median of the other in the same rounds, with a bootstrap 95 % interval.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.timing.contestants import CHANNELS_LAST, CONTIGUOUS, FP32, OURS, Contestant, Problem
from benchmarks.timing.protocol import Answer, Commands, Worker, WorkerError, serve

if TYPE_CHECKING:
    from torch import Tensor

RESULT = Path(__file__).resolve().parent / "results" / "evaluate.json"
MODEL, EVALUATE, PROFILE, GRAPHS = "resnet20", "evaluate", "profile", "graphs"
RECALIBRATION, JUDGED, BATCH, SIZE = 1000, 2000, 250, 32
GOAL = ("ours.regional", 1.15)
FEWEST_ROUNDS, THREADS = 40, 2
WARM_UP = 2
PROFILED = 12
"""Entries of a profile that are kept."""


def contestants() -> list[Contestant]:
    """The ways to judge: fp32 in four, ours in each mode and layout, and once without deployment sites."""
    layouts = ((CHANNELS_LAST, ""), (CONTIGUOUS, ".contiguous"))
    fp32 = [
        Contestant(f"fp32.{'eager' if mode == 'off' else 'compiled'}{suffix}", FP32, mode, layout)
        for mode in ("off", "whole")
        for layout, suffix in ((CONTIGUOUS, ""), (CHANNELS_LAST, ".channels_last"))
    ]
    ours = [
        Contestant(f"ours.{mode}{suffix}", OURS, mode, layout, depth=True)
        for mode in ("off", "quantizers", "regional")
        for layout, suffix in layouts
    ]
    bare = Contestant("ours.regional.no_sites", OURS, "regional", CHANNELS_LAST, sites=False, depth=True)
    return [*fp32, *ours, bare]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--variants", default="*", metavar="A,B,...", help="shell patterns of variants; default all")
    add("--rounds", type=int, default=40, help="default %(default)s; the goal is judged from 40 on")
    add("--recalibration", type=int, default=RECALIBRATION, help="images for BatchNorm; default %(default)s")
    add("--judged", type=int, default=JUDGED, help="images to judge on; default %(default)s")
    add("--batch", type=int, default=BATCH, help="images of a batch; default %(default)s")
    add("--size", type=int, default=SIZE, help="height and width of the images; default %(default)s")
    add("--seed", type=int, default=0, help="of data, weights, subnets and order; default %(default)s")
    add("--threads", type=int, default=THREADS, help="of each process; default %(default)s")
    add("--timeout", type=float, default=1800, help="seconds a worker may take for an answer; default %(default)s")
    add("--profile", action="store_true", help="show where the time of the goal's variant and of the fastest fp32 goes")
    add("--work", type=Path, default=Path("runs/evaluate"), help="logs of the workers; default %(default)s")
    add("--json", type=Path, default=RESULT, help="result file; default benchmarks/results/evaluate.json")
    add("--worker", metavar="VARIANT", help="be the process that judges one variant; the script starts these")
    options = parser.parse_args(arguments)
    for name in ("rounds", "recalibration", "judged", "batch", "size", "threads"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name} is at least 1, got {value}")
    for name in ("recalibration", "judged"):
        if getattr(options, name) % options.batch:
            parser.error(f"--{name} is a multiple of --batch {options.batch}, got {getattr(options, name)}")
    return options


def why_not_judged(options: argparse.Namespace) -> str | None:
    """What keeps a run from being judged by the goal's own terms; None where nothing does."""
    terms = {"recalibration": RECALIBRATION, "judged": JUDGED, "batch": BATCH, "size": SIZE, "threads": THREADS}
    if options.rounds < FEWEST_ROUNDS:
        return f"{options.rounds} rounds, the goal asks for {FEWEST_ROUNDS}"
    given = [f"{name} {getattr(options, name)} instead of {wanted}" for name, wanted in terms.items()]
    other = [text for text, name in zip(given, terms, strict=True) if getattr(options, name) != terms[name]]
    return ", ".join(other) or None


# -- a worker ---------------------------------------------------------------------------------------------------------
def worker(options: argparse.Namespace) -> int:
    """Be the process of one variant; the exit code."""
    contestant = next(c for c in contestants() if c.name == options.worker)

    def build() -> tuple[Answer, Commands]:
        import torch

        from benchmarks.timing.problems import arranged
        from supernet.memory import keep_freed

        keep_freed()  # for everyone, as the doors do
        torch.set_num_threads(options.threads)
        rng = torch.Generator().manual_seed(options.seed)
        shape = (options.batch, 3, options.size, options.size)
        count = (options.recalibration + options.judged) // options.batch
        images = [arranged(torch.randn(shape, generator=rng), contestant.layout) for _ in range(count)]
        at = options.recalibration // options.batch
        problem = Problem(MODEL, options.batch, options.size, depth=True)
        make = subnet_judge if contestant.kind == OURS else float_judge
        run, seconds = make(contestant, problem, images[:at], images[at:], options.seed)
        for _ in range(WARM_UP):
            run()
        return {"seconds": seconds}, {EVALUATE: lambda: _timed(run), PROFILE: lambda: _profile(run), GRAPHS: _graphs}

    return serve(build)


def subnet_judge(
    contestant: Contestant, problem: Problem, recalibration: Sequence[Tensor], rest: Sequence[Tensor], seed: int
) -> tuple[Callable[[], Any], dict[str, float]]:
    """Draws a subnet and judges it; and the seconds that its preparation took."""
    import numpy as np
    import torch

    from benchmarks.timing.problems import CLASSES
    from benchmarks.timing.steps import Elastic
    from predictors.measuring import tested

    runner = Elastic(contestant, problem, seed)
    runner.net.compile(contestant.compile, passes="evaluation")
    labels = torch.Generator().manual_seed(seed)
    batches = [(x, torch.randint(0, CLASSES, (len(x),), generator=labels)) for x in rest]
    draws = np.random.default_rng([seed, 3])
    return lambda: tested(runner.net, runner.space.sample(draws), recalibration, batches), runner.seconds


def float_judge(
    contestant: Contestant, problem: Problem, recalibration: Sequence[Tensor], rest: Sequence[Tensor], seed: int
) -> tuple[Callable[[], Any], dict[str, float]]:
    """Passes over the same images in fp32; and the seconds that its preparation took."""
    import torch

    from benchmarks.timing.fp32_steps import Plain

    runner = Plain(contestant, problem, seed)

    @torch.no_grad()
    def run() -> None:
        for training, images in ((True, recalibration), (False, rest)):
            runner.module.train(training)
            for batch in images:
                runner.run(batch)

    return run, runner.seconds


def _timed(run: Callable[[], Any]) -> Answer:
    start = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - start}


def _profile(run: Callable[[], Any]) -> Answer:
    """The operators and kernels that one judgement spends most of its time in."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return {
        "entries": [
            {
                "name": e.key[:80],
                "calls": e.count,
                "ms": e.self_cpu_time_total / 1e3,
                "share": e.self_cpu_time_total / total,
            }
            for e in events[:PROFILED]
        ]
    }


def _graphs() -> Answer:
    import torch

    return {"graphs": torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)}


# -- the driver -------------------------------------------------------------------------------------------------------
def race(chosen: Sequence[Contestant], options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Start all variants, race them; seconds [rounds] by variant, failures, preparation, new graphs, profiles."""
    from benchmarks.timing.goals import ANY, fastest
    from benchmarks.timing.race import Terms, environment, rounds
    from supernet.artefacts import progress

    terms = Terms(
        options.rounds, options.seed, options.threads, (EVALUATE,), options.work, cache, timeout=options.timeout
    )
    found: dict[str, Any] = {"figures": {}, "failed": {}, "preparation": {}, "compiled": {}, "profiles": {}}
    workers: dict[str, Worker] = {}
    with ExitStack() as stack:
        with progress("getting ready", total=len(chosen)) as bar:
            for one in chosen:
                own = {"TORCHINDUCTOR_CACHE_DIR": str((cache / one.name).absolute())}
                log = options.work / "logs" / f"{one.name}.log"
                started = stack.enter_context(Worker(_command(one, options), environment(terms) | own, log))
                try:
                    found["preparation"][one.name] = started.ready(options.timeout)["seconds"]
                    workers[one.name] = started
                except WorkerError as error:
                    found["failed"][one.name] = str(error)
                bar.advance(note=one.name)
        graphs = _answers(workers, GRAPHS, options.timeout, found["failed"])
        workers = {name: workers[name] for name in graphs}
        with progress("rounds", total=options.rounds) as bar:
            times, failed = rounds(workers, dict.fromkeys(workers, (EVALUATE,)), terms, bar.advance)
        found["figures"], found["failed"] = times, found["failed"] | failed
        after = _answers({name: workers[name] for name in times}, GRAPHS, options.timeout, found["failed"])
        new = {name: answer["graphs"] - graphs[name]["graphs"] for name, answer in after.items()}
        found["compiled"] = {name: count for name, count in new.items() if count}
        if options.profile:
            shown = {n: workers[n] for n in (GOAL[0], fastest(times, ANY, EVALUATE)) if n in times}
            answers = _answers(shown, PROFILE, options.timeout, found["failed"])
            found["profiles"] = {name: answer["entries"] for name, answer in answers.items()}
    return found


def _answers(workers: Mapping[str, Worker], word: str, timeout: float, failed: dict[str, str]) -> dict[str, Answer]:
    """Ask each worker once, in turn; the answers of those that gave one, and why the others did not."""
    answers = {}
    for name, one in workers.items():
        try:
            answers[name] = one.ask(word, timeout)
        except WorkerError as error:
            failed[name] = str(error)
    return answers


def _command(contestant: Contestant, options: argparse.Namespace) -> list[str]:
    names = ("recalibration", "judged", "batch", "size", "seed", "threads")
    words = [word for name in names for word in (f"--{name}", str(getattr(options, name)))]
    return [sys.executable, "-m", "benchmarks.evaluate", "--worker", contestant.name, *words]


def result(found: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file holds."""
    from importlib.metadata import version

    from benchmarks.timing.goals import ANY, Goal, fastest, judge
    from benchmarks.timing.intervals import median_interval, ratio_interval
    from benchmarks.timing.result import plain
    from supernet.artefacts import command, provenance

    figures, reason = found["figures"], why_not_judged(options)
    verdict = judge(
        Goal("evaluating a subnet, regional compilation", MODEL, GOAL[0], EVALUATE, GOAL[1], ANY),
        {MODEL: figures},
        options.seed,
    ).plain()
    base = fastest(figures, ANY, EVALUATE)
    described: dict[str, Any] = {}
    for name, of in figures.items():
        seconds = of[EVALUATE]
        described[name] = plain(median_interval(seconds, options.seed)) | {"rounds": [round(s, 6) for s in seconds]}
        if base is not None:
            ratio = ratio_interval(seconds, figures[base][EVALUATE], options.seed)
            described[name]["ratio"] = {"against": base} | plain(ratio)
    return {
        "command": command(sys.argv),
        "torch": version("torch"),
        **{name: getattr(options, name) for name in ("seed", "rounds", "threads")},
        "images": {name: getattr(options, name) for name in ("recalibration", "judged", "batch", "size")},
        "judged": f"not judged: {reason}" if reason else "judged",
        "goals": [verdict if reason is None else verdict | {"met": None}],
        "fastest": base,
        "contestants": described,
        **{name: found[name] for name in ("preparation", "failed", "compiled", "profiles")},
        "provenance": provenance(options.seed),
    }


def table(found: Mapping[str, Any]) -> str:
    """One line for each variant; below it what failed, what was compiled in between, and the profiles."""
    lines = [f"| variant | seconds | / {found['fastest'] or 'fp32'} |", "|---|---|---|"]
    for name, of in found["contestants"].items():
        ratio = _interval(of["ratio"]) if "ratio" in of else "-"
        lines.append(f"| {name} | {_interval(of)} | {ratio} |")
    lines += [f"\nFailed and left out: {name}: {why}" for name, why in found["failed"].items()]
    lines += [
        f"\n{name}: {n} graphs were compiled during its rounds, its times hold that"
        for name, n in found["compiled"].items()
    ]
    for name, entries in found["profiles"].items():
        lines += [f"\n| {name} | calls | ms | share |", "|---|---|---|---|"]
        lines += [f"| {e['name']} | {e['calls']} | {e['ms']:.1f} | {100 * e['share']:.1f} % |" for e in entries]
    return "\n".join(lines)


def _interval(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Race the variants that were asked for, write the file, print the tables; 1 if nothing could be timed."""
    options = parsed(arguments)
    if options.worker:
        return worker(options)
    from benchmarks.timing.table import goal_table
    from supernet.artefacts import write_json

    chosen = [c for c in contestants() if any(fnmatch(c.name, p) for p in options.variants.split(","))]
    with tempfile.TemporaryDirectory() as cache:
        found = result(race(chosen, options, Path(cache)), options)
    write_json(options.json, found)
    print(table(found), goal_table(found["goals"]), sep="\n\n")
    print(f"\nGoal: {found['judged']}. All figures are in {options.json.name}.")
    return 0 if found["contestants"] else 1


if __name__ == "__main__":
    sys.exit(main())
