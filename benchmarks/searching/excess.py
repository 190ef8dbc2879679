"""How far above the optimum each search algorithm ends, in what time; and how fast candidates are scored."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.searching.problems import BITS, Case, Table
from search.allocation import Program
from search.evolving import evolve
from search.problem import Archive, Problem
from supernet.config import build
from supernet.cost import over
from supernet.space import Indices

SECONDS = {True: 2.0, False: 10.0}
"""CPU seconds of a search, seeded or not: it is stopped then, as by hand, and answers with the best so far."""
CONF = Path(__file__).resolve().parents[2] / "conf" / "algorithm"


class Deadline:
    """A case as a predictor that interrupts the search when its time is up.

    Args:
        case: the problem.
        end: of `time.process_time()`.
    """

    def __init__(self, case: Case, end: float) -> None:
        self.case, self.end = case, end

    def fit(self, indices: Indices, scores: Table) -> None:
        """Nothing is left to learn."""

    def predict(self, indices: Indices) -> tuple[Table, Table]:
        """What the case says."""
        if time.process_time() > self.end:
            raise KeyboardInterrupt
        return self.case.predict(indices)


def searched(case: Case, algorithm: str, seeded: bool, seed: int, generations: int, population: int) -> dict[str, Any]:
    """Excess over the optimum within each budget after one search of all of them, and its seconds.

    The search is that of `elastibit search` (algorithm, archive, and the refinement of the best rows), with the problem
    itself as predictor, stopped after SECONDS. Seeds are the integer program's optima, whose time counts.
    """
    from omegaconf import OmegaConf

    logging.getLogger("search.evolving").setLevel(logging.ERROR)  # that it is stopped is meant
    cpu, wall, rng = time.process_time(), time.perf_counter(), np.random.default_rng(seed)
    problem = Problem(case.space, case.costs, Deadline(case, cpu + SECONDS[seeded]), case.budgets)
    seeds = np.zeros((0, len(case.space)), dtype=np.int64)
    if seeded:
        program = Program(case.space, case.additive, problem.kinds)
        seeds = np.unique([problem.allocated(budget, program) for budget in problem.budgets], axis=0)
    made = build(OmegaConf.to_container(OmegaConf.load(CONF / f"{algorithm}.yaml")))(
        space=case.space, costs=case.costs, budgets=problem.targets, seeds=seeds, population=population
    )
    archive = Archive(problem)
    stopped = evolve(problem, made, archive, generations, population, rng, progress=False)
    seconds = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
    excess = []
    for b, budget in enumerate(problem.budgets):
        rows = archive.top(b, 1)
        assert len(rows) and over(budget.limits, problem.kinds, rows)[0] <= 1e-12, "over budget"
        excess.append(float(case.error(rows)[0] / case.best[b] - 1))
    about = {"problem": case.name, "algorithm": algorithm, "seeded": seeded, "seed": seed}
    return about | {"stopped": stopped, "excess": excess, "worst": max(excess), "measured": seconds}


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each algorithm, seeded or not: excesses over all problems, seeds and budgets, and the longest search."""
    found = []
    for algorithm, seeded in dict.fromkeys((r["algorithm"], r["seeded"]) for r in runs):
        own = [r for r in runs if (r["algorithm"], r["seeded"]) == (algorithm, seeded)]
        excess = np.array([value for r in own for value in r["excess"]])
        about = {"algorithm": algorithm, "seeded": seeded, "searches": len(own)}
        about |= {"mean": float(excess.mean()), "worst": float(excess.max())}
        about |= {"std_of_worst": float(np.std([r["worst"] for r in own]))}
        times = {k: max(r["measured"][k] for r in own) for k in ("cpu_seconds", "wall_seconds")}
        found.append(about | {"measured": {f"longest_{k}": v for k, v in times.items()}})
    return found


def speed(case: Case, rows: int, turns: int) -> dict[str, Any]:
    """Candidates scored per second: all additive factors and the costs of one batch, median of the turns."""
    problem = Problem(case.space, case.costs, case, case.budgets)
    batch = case.space.sample_indices(rows, np.random.default_rng(0))
    rates = []
    for _ in range(turns):
        start = time.perf_counter()
        problem.objectives(batch)
        rates.append(rows / (time.perf_counter() - start))
    spread = {"median": float(np.median(rates)), "least": min(rates), "most": max(rates)}
    return {"genes": len(case.space), "choices": len(BITS), "rows": rows, "measured": {"rows_per_second": spread}}
