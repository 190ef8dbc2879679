"""One problem's race: a process for each contestant, all of them asked once in every round, in a shuffled order.

While one steps, the others wait for their line; their threads may spin for a moment first, as OpenMP lets them; the
step that is not timed comes in between. A contestant that fails is left out with its reason and the race goes on; its
times are dropped whole, since ratios need the same rounds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.timing.contestants import MEMORY, OURS, PROBLEMS, PYTHON, START, Contestant, Problem
from benchmarks.timing.peers import PEERS, python_of, variables
from benchmarks.timing.protocol import Answer, Worker, WorkerError
from benchmarks.timing.worker import GRAPHS
from supernet.artefacts import progress

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Terms:
    """What holds for all contestants.

    Attributes:
        rounds, seed, threads: as the options of the script.
        measures: what is asked for.
        work: folder of peers' environments and logs.
        cache: folder of the compile caches, one for each contestant.
        batch: in place of the problems' own batch.
        timeout: seconds that a worker may take for one answer, getting ready included.
    """

    rounds: int
    seed: int
    threads: int
    measures: tuple[str, ...]
    work: Path
    cache: Path
    batch: int | None = None
    timeout: float = 1800.0

    def problem(self, name: str) -> Problem:
        """A problem by name, with the batch of these terms."""
        problem = PROBLEMS[name]
        return problem if self.batch is None else replace(problem, batch=self.batch)


@dataclass
class Outcome:
    """What one race gave.

    Attributes:
        figures: contestant -> measure -> values, seconds or bytes; of what is timed one for each round.
        failed: contestant -> reason.
        seconds: contestant -> parts of its preparation.
        compiled: contestant -> graphs compiled while it was timed, where there were any.
    """

    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    compiled: dict[str, int] = field(default_factory=dict)


class Asked(Protocol):
    """The part of a Worker that rounds need."""

    def ask(self, word: str, timeout: float) -> Answer:
        """Say a word, get the answer."""
        ...


def rounds(
    workers: Mapping[str, Asked],
    measures: Mapping[str, Sequence[str]],
    terms: Terms,
    tick: Callable[[], None] = lambda: None,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Ask every worker for each of its measures once a round, in an order that is shuffled anew for each round.

    Gives seconds [rounds] by worker and measure, and the reasons of those that failed on the way.
    """
    entries = [(name, measure) for name in workers for measure in measures[name]]
    times: dict[str, dict[str, list[float]]] = {name: {m: [] for m in measures[name]} for name in workers}
    failed: dict[str, str] = {}
    rng = np.random.default_rng([terms.seed, 2])
    for _ in range(terms.rounds):
        for k in rng.permutation(len(entries)):
            name, measure = entries[k]
            if name in failed:
                continue
            try:
                times[name][measure].append(workers[name].ask(measure, terms.timeout)["seconds"])
            except WorkerError as error:
                failed[name] = str(error)
        tick()
    return {name: of for name, of in times.items() if name not in failed}, failed


def race(problem: Problem, contestants: Sequence[Contestant], terms: Terms) -> Outcome:
    """Start all contestants one after the other, race them, then take the figures that are measured once."""
    outcome, cold = Outcome(), set()
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        with progress(f"{problem.name}: getting ready", total=len(contestants)) as bar:
            for one in contestants:
                with _noting(one.name, outcome):
                    worker = stack.enter_context(start(one, problem, terms))
                    facts = worker.ready(terms.timeout)
                    _keep(outcome, one.name, facts)
                    cold |= {one.name} if facts["cache"] == "cold" else set()
                    workers[one.name] = worker
                bar.advance(note=one.name)
        served = {one.name: [m for m in one.timed if m in terms.measures] for one in contestants if one.name in workers}
        graphs = _all(workers, GRAPHS, terms, outcome)
        with progress(f"{problem.name}: rounds", total=terms.rounds) as bar:
            times, failed = rounds(workers, served, terms, bar.advance)
        outcome.failed |= failed
        for name, of in times.items():
            outcome.figures[name] |= of
        after = _all({name: workers[name] for name in times}, GRAPHS, terms, outcome)
        outcome.compiled = {n: new for n in after if (new := after[n]["graphs"] - graphs[n]["graphs"])}
        if MEMORY in terms.measures:
            answers = _all({name: workers[name] for name in after}, MEMORY, terms, outcome)
            for name, answer in answers.items():
                outcome.figures[name][MEMORY] = [answer["bytes"]]
                outcome.seconds[name] |= {"resident_bytes": answer["resident"]}
    if START in terms.measures:
        _again(
            [c for c in contestants if c.name in cold and c.kind == OURS and c.compile != "off"],
            problem,
            terms,
            outcome,
        )
    for name in outcome.failed:
        outcome.figures.pop(name, None)
    return outcome


def python_time(terms: Terms) -> Outcome:
    """Python time that grows with layers, in a process of its own."""
    outcome = Outcome()
    command = _command(Path(sys.executable), PYTHON, terms)
    with _noting(OURS, outcome), Worker(command, environment(terms), terms.work / "logs" / "python.log") as worker:
        slopes = worker.ready(terms.timeout)["slopes"]
        outcome.figures[OURS] = {part: [value] for part, value in slopes.items()}
    return outcome


def start(contestant: Contestant, problem: Problem, terms: Terms) -> Worker:
    """Start a contestant's process with its own compile cache; WorkerError where a peer cannot be installed."""
    name = f"{problem.name}/{contestant.name}"
    cache = (terms.cache / name).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    variables_ = environment(terms) | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    python = Path(sys.executable)
    if contestant.kind in PEERS:
        python = python_of(contestant.kind, terms.work)
        variables_ = variables(python, variables_)
    return Worker(_command(python, name, terms), variables_, terms.work / "logs" / f"{name.replace('/', '.')}.log")


def environment(terms: Terms) -> dict[str, str]:
    """This process's variables with the number of the workers' threads and the way to this folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"OMP_NUM_THREADS": str(terms.threads), "PYTHONPATH": path}
    return dict(os.environ) | own


def _command(python: Path, name: str, terms: Terms) -> list[str]:
    words = ["--seed", str(terms.seed), "--threads", str(terms.threads), "--measure", ",".join(terms.measures)]
    batch = [] if terms.batch is None else ["--batch", str(terms.batch)]
    return [str(python), "-m", "benchmarks.step_time", "--worker", name, *words, *batch]


@contextmanager
def _noting(name: str, outcome: Outcome) -> Iterator[None]:
    """A worker's failure inside is noted, not raised."""
    try:
        yield
    except WorkerError as error:
        outcome.failed[name] = str(error)


def _keep(outcome: Outcome, name: str, facts: Mapping[str, Any]) -> None:
    seconds = facts["seconds"]
    outcome.seconds[name] = dict(seconds)
    figures = outcome.figures.setdefault(name, {})
    figures[f"start_{facts['cache']}"] = [seconds["to_first_step"]]
    if "scales" in seconds:
        figures["scales"] = [seconds["scales"]]


def _all(workers: Mapping[str, Worker], word: str, terms: Terms, outcome: Outcome) -> dict[str, Answer]:
    """Ask each worker once, in turn; the answers of those that gave one."""
    answers = {}
    for name, worker in workers.items():
        with _noting(name, outcome):
            answers[name] = worker.ask(word, terms.timeout)
    return answers


def _again(contestants: Sequence[Contestant], problem: Problem, terms: Terms, outcome: Outcome) -> None:
    """Start contestants a second time, with the compile cache that the first time left: their warm start."""
    once = replace(terms, measures=(START,))
    with progress(f"{problem.name}: starting again", total=len(contestants)) as bar:
        for one in contestants:
            if one.name not in outcome.failed:
                with _noting(one.name, outcome), start(one, problem, once) as worker:
                    seconds = worker.ready(terms.timeout)["seconds"]
                    outcome.figures[one.name]["start_warm"] = [seconds["to_first_step"]]
            bar.advance(note=one.name)
