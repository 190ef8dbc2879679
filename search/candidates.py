"""What competes under each budget: which rows, what is measured of them, and who wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from predictors.measuring import Measurer, agreeing, weights_digest
from search.evolving import bar, interruptible
from search.front import Candidate, Found
from search.problem import Problem
from search.timing import Stopwatch
from search.verdict import on_select
from supernet.artefacts import append_jsonl
from supernet.config import SubnetConfig
from supernet.elastic.supernet import SuperNet
from supernet.interfaces import Engine, Task
from supernet.space import Indices

MEASURED = "measured.jsonl"


class Bench:
    """What is known of the subnets of one supernet, and how the others are measured.

    Args:
        net: the supernet.
        task: where subnets are measured; None: nothing is, and what is known is taken from the files.
        out: folder of measured.jsonl, where each record is kept as soon as it is known; None: in memory.
        reuse: files of earlier measurements (pairs.jsonl); records of the same weights and images are known.
        recalibrate_images, select_images: images of each measurement; None: all.
        engine: how subnets are measured; None: in this process.

    Attributes:
        earlier: rows [n, d] of `reuse`, by falling score. They may win too; of what a search itself has measured that
            would make a second search differ from the first.
    """

    def __init__(
        self,
        net: SuperNet,
        task: Task | None,
        *,
        out: Path | None = None,
        reuse: Iterable[Path | str] = (),
        recalibrate_images: int | None = None,
        select_images: int | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.file = out / MEASURED if out else None
        others = [path for path in reuse if Path(path) != self.file]
        files = [*others, *([self.file] if self.file else [])]
        self.measurer: Measurer | None = None
        if task is not None:
            self.measurer = Measurer(
                net,
                task,
                recalibrate_images=recalibrate_images,
                select_images=select_images,
                reuse=files,
                engine=engine,
            )
            self.records, origin = self.measurer.records, self.measurer.origin
        else:
            origin = {"fingerprint": net.fingerprint}
            if any(Path(path).is_file() for path in files):
                origin["weights"] = weights_digest(net)
            self.records = agreeing(files, origin)
        ranked = sorted(agreeing(others, origin).values(), key=lambda r: (-r["score"], r["id"]))
        self.earlier = np.array([r["row"] for r in ranked], dtype=np.int64).reshape(-1, len(net.space))

    def score(self, config: SubnetConfig) -> float | None:
        """Accuracy 0..1 on select; None where it is not known."""
        record = self.records.get(config.id)
        return None if record is None else float(record["score"])

    def knows(self, problem: Problem, rows: Iterable[Indices]) -> bool:
        """Whether every one of some rows is known."""
        return all(problem.space.config(row).id in self.records for row in rows)

    def best(self, problem: Problem, b: int, n: int) -> list[Indices]:
        """The n best rows of earlier measurements within budget b."""
        fits = problem.within(problem.budgets[b], self.earlier) & problem.space.admits(self.earlier)
        return list(self.earlier[fits][:n])

    def measure(self, configs: Sequence[SubnetConfig], progress: bool) -> bool:
        """Measure what is not known yet, in this order; True if stopped by hand."""
        missing = [config for config in configs if config.id not in self.records]
        if self.measurer is None or not missing:
            return False
        with interruptible() as state, bar("measuring candidates", len(missing), progress) as shown:
            best = 0.0
            for record in self.measurer(missing):
                if self.file:
                    append_jsonl(self.file, record)
                best = max(best, record["score"])
                if shown:
                    shown.advance(note=f"best {best:.1%}")
        return state["interrupted"]


def in_turn(problem: Problem, *groups: Sequence[Sequence[Indices]]) -> list[SubnetConfig]:
    """The subnets of some groups of rows for each budget, each once: budgets in turn, one group after the other."""
    rows = []
    for group in groups:
        longest = max(map(len, group), default=0)
        rows += [rows[i] for i in range(longest) for rows in group if i < len(rows)]
    return list({config.id: config for config in map(problem.space.config, rows)}.values())


def distinct(rows: Iterable[Indices]) -> list[Indices]:
    """Each row once, in order."""
    return list({tuple(row.tolist()): row for row in rows}.values())


def best_of(problem: Problem, b: int, rows: Iterable[Indices], bench: Bench) -> Indices | None:
    """The row that was measured as best under budget b; None where none was measured."""
    known = [c for c in (candidate(problem, row, bench) for row in rows) if c.measured is not None]
    rank = problem.budgets[b].rank
    best = max(known, key=lambda c: rank(c.measured, 0.0, c.costs), default=None)
    return None if best is None else np.array(best.config.row, dtype=np.int64)


def winner(
    problem: Problem,
    b: int,
    rows: Sequence[Indices],
    controls: Mapping[str, Indices],
    bench: Bench,
    watch: Stopwatch,
    interrupted: bool,
) -> Found:
    """The best of some rows and controls within budget b: by measurement where that was made, else by prediction.

    Where nothing can be measured, what is known decides if it holds the best predicted row too. What takes longer than
    a limit on latency, measured whole, is dropped.
    """
    budget = problem.budgets[b]
    inside = distinct(row for row in [*rows, *controls.values()] if problem.within(budget, row[None])[0])
    pool = [candidate(problem, row, bench) for row in inside]
    known = [c for c in pool if c.measured is not None]
    if bench.measurer is None and max(pool, key=lambda c: c.predicted[0]).measured is None:
        known = []  # what happens to be known says nothing of the one that promises most
    ranked = known or [replace(c, measured=None) for c in pool]
    ranked.sort(key=lambda c: budget.rank(c.measured, c.predicted[0], c.costs), reverse=True)
    best = watch.first(ranked, budget.limits) or watch.first(pool, budget.limits)
    assert best is not None, "the fastest row is among them"
    slack = {kind: max(0.0, 1 - best.costs[kind] / limit) for kind, limit in budget.limits.items()}
    named = {name: candidate(problem, row, bench) for name, row in controls.items()}
    found = Found(
        **vars(candidate(problem, np.array(best.config.row), bench)),
        label=budget.label,
        limits=budget.limits,
        slack=slack,
        controls={name: control for name, control in named.items() if watch.fits(control.config, budget.limits)},
        interrupted=interrupted,
        seconds=watch.of(best.config, budget.limits),
    )
    return replace(found, verdict=on_select(found))


def candidate(problem: Problem, row: Indices, bench: Bench) -> Candidate:
    """A row with its figures."""
    mean, std = problem.predictor.predict(row[None])
    config = problem.space.config(row)
    return Candidate(config, (float(mean[0]), float(std[0])), bench.score(config), problem.costs.of(config))
