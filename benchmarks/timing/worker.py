"""Inside a worker process: build one contestant, take its first step, then answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from benchmarks.timing.contestants import FP32, MEMORY, OURS, STEP, Contestant, Problem
from benchmarks.timing.protocol import Answer, Commands, serve

WARM_UP = 3
"""Passes of each measure before the worker is ready; the first one of all is the first finished step."""
GRAPHS = "graphs"


class Runner(Protocol):
    """A contestant that is ready to train.

    Attributes:
        module: the network.
        optimizers: all of them.
        batch: images and labels.
        seconds: of each part of the preparation.
        measures: one pass of each measure; gives a loss.
    """

    module: Any
    optimizers: Any
    batch: Any
    seconds: dict[str, float]
    measures: Any


def work(
    contestant: Contestant, problem: Problem, measures: Sequence[str], seed: int, threads: int, started: float
) -> int:
    """Serve one contestant's measures; the exit code.

    Args:
        measures: those that are wanted; what the contestant does not have is left out.
        started: time.perf_counter() when the process began, for the time to the first finished step.
    """
    return serve(lambda: _build(contestant, problem, measures, seed, threads, started))


def overhead(seed: int, threads: int) -> int:
    """Answer with the Python time that grows with layers; the exit code."""

    def build() -> tuple[Answer, Commands]:
        import torch

        from benchmarks.timing.overhead import python_time

        torch.set_num_threads(threads)
        return {"slopes": python_time(seed)}, {}

    return serve(build)


def _build(
    contestant: Contestant, problem: Problem, measures: Sequence[str], seed: int, threads: int, started: float
) -> tuple[Answer, Commands]:
    import torch

    from supernet.memory import keep_freed

    keep_freed()  # for everyone, as `elastibit train` does
    torch.set_num_threads(threads)
    cold = not any(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).glob("*"))
    make = _maker(contestant.kind)
    seconds = {"imports": time.perf_counter() - started}
    runner: Runner = make(contestant, problem, seed)
    seconds |= runner.seconds
    before = time.perf_counter()
    runner.measures[STEP]()
    seconds |= {"first_step": time.perf_counter() - before, "to_first_step": time.perf_counter() - started}
    served = [measure for measure in contestant.timed if measure in measures]
    for measure in served:
        for _ in range(WARM_UP):
            runner.measures[measure]()
    step = runner.measures[STEP]
    commands: dict[str, Callable[[], Answer]] = {name: partial(_timed, runner.measures[name], step) for name in served}
    facts = {"seconds": seconds, "cache": "cold" if cold else "warm", "torch": torch.__version__}
    return facts, commands | {MEMORY: lambda: _memory(runner), GRAPHS: _graphs}


def _maker(kind: str) -> Callable[[Contestant, Problem, int], Runner]:
    """The class that builds a contestant; only that is imported, since a peer's environment holds nothing of ours."""
    if kind == OURS:
        from benchmarks.timing.steps import Elastic

        return Elastic
    if kind == FP32:
        from benchmarks.timing.fp32_steps import Plain

        return Plain
    from benchmarks.timing.peer_steps import Peer

    return Peer


def _timed(run: Callable[[], Any], before: Callable[[], Any]) -> Answer:
    """Seconds of a pass that follows a step, as it does in training; its process has waited for all the others."""
    before()
    start = time.perf_counter()
    loss = run()
    return {"seconds": time.perf_counter() - start, "loss": float(loss)}


def _memory(runner: Runner) -> Answer:
    """Peak bytes of one step, and the part of it that lives before the step."""
    from benchmarks.timing.peak import resident, step_peak

    runner.measures[STEP]()  # the optimizers' states exist
    tensors = [*runner.module.parameters(), *runner.module.buffers(), *runner.batch]
    before = resident(tensors, runner.optimizers)
    return {"bytes": before + step_peak(runner.measures[STEP]), "resident": before}


def _graphs() -> Answer:
    """Graphs that torch.compile has made in this process so far."""
    import torch

    return {"graphs": torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)}
