"""The generations of a search: ask, look up, tell; stopped at any time, and continued where it was killed."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from search.problem import Archive, Problem
from supernet.artefacts import Progress, write_text
from supernet.artefacts import progress as show_progress
from supernet.interfaces import SearchAlgorithm
from supernet.space import Indices

log = logging.getLogger(__name__)

REFINEMENTS = 6
"""How often, evenly over a search, the best rows are taken to their local optimum."""
SAVE_EVERY = 1.0
"""Seconds between two states on disk: a kill costs no more than that."""
PROBES = 32
"""Random rows whose objectives tell one search from another."""


class Checkpoint:
    """The state of an evolution on disk, for the search that has the same key; another one starts anew.

    Args:
        path: the file.
        key: see `key`.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._last = time.monotonic()

    def save(
        self, step: int, algorithm: SearchAlgorithm, archive: Archive, rng: np.random.Generator, last: bool
    ) -> None:
        """After generation `step` (from 0), if it is time or it was the last: all that the next one depends on."""
        if time.monotonic() - self._last < SAVE_EVERY and not last:
            return
        state = {
            "key": self.key,
            "done": step + 1,
            "rng": rng.bit_generator.state,
            "algorithm": algorithm.state_dict(),
            "archive": [[rows.tolist(), scores.tolist()] for rows, scores in archive.best],
        }
        # Private and short-lived, so that Python's own spelling of infinity (crowding distances) does.
        write_text(self.path, json.dumps(state, default=_plain))
        self._last = time.monotonic()

    def load(self, algorithm: SearchAlgorithm, archive: Archive, rng: np.random.Generator) -> int:
        """Continue where the state was taken; the number of generations that are done, 0 where there is none."""
        try:
            state = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return 0
        if not isinstance(state, dict) or state.get("key") != self.key:
            return 0
        algorithm.load_state_dict(state["algorithm"])
        archive.best = [
            (np.array(rows, dtype=np.int64).reshape(-1, len(archive.problem.space)), np.array(scores, dtype=float))
            for rows, scores in state["archive"]
        ]
        rng.bit_generator.state = state["rng"]
        return int(state["done"])

    def remove(self) -> None:
        """The search is finished."""
        self.path.unlink(missing_ok=True)


def key(
    problem: Problem, algorithm: SearchAlgorithm, seeds: Indices, rng: np.random.Generator, settings: Mapping[str, Any]
) -> str:
    """What a search is, in 32 hexadecimal digits: space, view, budgets, algorithm, generator, `settings`, and what
    predictor and costs say of the seeds and of some random rows."""
    rows = np.concatenate([seeds, problem.space.sample_indices(PROBES, np.random.default_rng(0))])
    options = {name: value for name, value in vars(algorithm).items() if isinstance(value, int | float | str)}
    said = [
        problem.space.fingerprint,
        [mask.tolist() for mask in problem.space.admissible],
        [list(group) for group in problem.space.ties],
        [[budget.limits, budget.floor] for budget in problem.budgets],
        [type(algorithm).__qualname__, options],
        rng.bit_generator.state,
        settings,
        rows.tolist(),
        problem.objectives(rows).tolist(),
    ]
    return hashlib.sha256(json.dumps(said, default=_plain).encode()).hexdigest()[:32]


def evolve(
    problem: Problem,
    algorithm: SearchAlgorithm,
    archive: Archive,
    generations: int,
    population: int,
    rng: np.random.Generator,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
) -> bool:
    """Run the generations, or the rest of them; True if stopped by hand."""

    def told(rows: Indices, step: int) -> None:
        values = problem.objectives(rows)
        archive.add(rows, -values[:, 0])
        algorithm.tell(rows, values, step, generations)

    first = checkpoint.load(algorithm, archive, rng) if checkpoint else 0
    with interruptible() as state, bar("searching", generations, progress) as shown:
        if shown and first:
            shown.advance(first, note="continued")
        for step in range(first, generations):
            rows = algorithm.ask(population, rng)
            told(rows, step)
            if (step + 1) % max(1, generations // REFINEMENTS) == 0 or step in (0, generations - 1):
                told(_refinements(problem, archive, rows), step)
            if checkpoint:
                checkpoint.save(step, algorithm, archive, rng, last=step == generations - 1)
            if shown:
                shown.advance(note=", ".join(_best(problem, archive)))
    return state["interrupted"]


def _refinements(problem: Problem, archive: Archive, rows: Indices) -> Indices:
    """For each budget, where its best row and the best of `rows` lead by single changes and exchanges."""
    scores = problem.scores(rows)
    ends = []
    for b, budget in enumerate(problem.budgets):
        starts = list(archive.top(b, 1))
        fits = problem.within(budget, rows)
        if fits.any():
            starts.append(rows[np.argmax(np.where(fits, problem.goal(budget, rows, scores), -np.inf))])
        ends += [problem.improved(budget, row) for row in {tuple(row.tolist()): row for row in starts}.values()]
    return np.unique(np.array(ends, dtype=np.int64).reshape(-1, len(problem.space)), axis=0)


def _best(problem: Problem, archive: Archive) -> Iterator[str]:
    for budget, (_, scores) in zip(problem.budgets, archive.best, strict=True):
        if len(scores):
            yield f"{budget.label} {scores[0]:.4g}"


@contextmanager
def interruptible() -> Iterator[dict[str, bool]]:
    """Ends the block at Ctrl-C, and says so."""
    state = {"interrupted": False}
    try:
        yield state
    except KeyboardInterrupt:
        state["interrupted"] = True
        log.warning("interrupted; going on with the best so far")


@contextmanager
def bar(description: str, total: int, shown: bool) -> Iterator[Progress | None]:
    """Progress, or None where it is not to be shown."""
    with ExitStack() as stack:
        yield stack.enter_context(show_progress(description, total)) if shown else None


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
