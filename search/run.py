"""One search for all budgets: seeds, evolution on the predictor, re-evaluation of the best."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from rich.console import Console

from predictors.measuring import measure
from search.allocation import Program, reach
from search.evolution import NSGA2
from search.front import Candidate, Found, Front
from search.problem import Archive, Problem
from search.timing import KIND, Stopwatch
from supernet.artefacts import Progress
from supernet.artefacts import progress as show_progress
from supernet.config import SubnetConfig, si
from supernet.cost import UNITS, Costs, Factors, fill
from supernet.elastic.supernet import SuperNet
from supernet.interfaces import Predictor, SearchAlgorithm, Task
from supernet.space import Indices, SearchSpace, magnitude

log = logging.getLogger(__name__)
MARGINS = (0.95, 0.9, 0.8)
"""Shares of a latency limit that the table's error may take."""

REFINEMENTS = 6
"""How often, evenly over a search, the best rows are taken to their local optimum."""


def search(
    net: SuperNet,
    predictor: Predictor,
    budgets: Mapping[str, str | float] | Sequence[Mapping[str, str | float]],
    rng: np.random.Generator | None = None,
    *,
    space: SearchSpace | None = None,
    task: Task | None = None,
    candidates: int = 8,
    generations: int = 40,
    population: int = 120,
    sensitivity: Factors | None = None,
    algorithm: Callable[..., SearchAlgorithm] | None = None,
    recalibrate_images: int | None = None,
    select_images: int | None = None,
    seconds: Callable[[SubnetConfig], float] | None = None,
    progress: bool = True,
) -> Front:
    """The best subnet within each budget; all budgets are searched at once, and nothing over a limit is returned.

    The first generation holds, for each budget, the best uniform bits that fit, the integer program's optimum of the
    sensitivity, and the cheapest subnet. Interrupted by hand (Ctrl-C), it returns the best so far.

    Args:
        net: the supernet (without `task`, anything with `space`, `costs` and `fingerprint`).
        predictor: what subnets are worth; higher is better.
        budgets: mappings kind -> limit; one mapping is one budget.
        rng: None: one seeded with 0.
        space: a view of the net's space to search in; None: all of it.
        task: if given, the best candidates of each budget and its controls are measured on select, and the best
            measured wins.
        candidates: subnets measured for each budget, besides the controls.
        generations, population: length and width of the evolution.
        sensitivity: additive quality cost for the integer program; None: the predictor's own `sensitivity`, if it has
            one.
        algorithm: makes the search algorithm when called with space, costs, budgets, seeds and population; None: NSGA2.
        recalibrate_images, select_images: images for re-evaluation; None: all.
        seconds: measures a subnet as a whole; under a budget of latency, candidates that take longer are dropped.
        progress: show progress and, before the search, what the budgets can reach.

    Raises:
        ValueError: a budget that cannot be read or met, a latency that no subnet keeps when it is measured whole, or a
            setting below 1.
    """
    if min(candidates, generations, population) < 1:
        raise ValueError(
            f"candidates, generations and population are at least 1, got {candidates}, {generations}, {population}"
        )
    rng = rng or np.random.default_rng(0)
    problem = Problem(space or net.space, _view(net, space), predictor, budgets)
    if progress:
        announce(problem)
    watch, n = Stopwatch(seconds), len(problem.budgets)
    sensitivity = sensitivity or getattr(predictor, "sensitivity", None)
    spare = [_spare(problem, b, watch, sensitivity) for b in range(n)]
    controls = _controls(problem, sensitivity, rng)
    known = [_landmarks(problem), *(row[None] for c in controls for row in c.values())]
    made = (algorithm or NSGA2)(
        space=problem.space,
        costs=problem.costs,
        budgets=problem.targets,
        seeds=np.unique(np.concatenate(known), axis=0),
        population=population,
    )
    archive = Archive(problem)
    interrupted = _evolve(problem, made, archive, generations, population, rng, progress)
    archive.check()
    chosen = [_distinct([*archive.top(b, candidates), *controls[b].values(), *spare[b]]) for b in range(n)]
    measured: dict[str, float] = {}
    if task is not None and not interrupted:
        data = list(task.recalibrate(recalibrate_images)), list(task.select(select_images))
        interrupted = _measure_all(net, problem.space, chosen, data, measured, progress)
    found = [_winner(problem, b, chosen[b], controls[b], measured, interrupted, watch) for b in range(n)]
    rows, values = made.front()
    costs = {kind: values[:, 1 + k] for k, kind in enumerate(problem.kinds)}
    return Front(found, net.fingerprint, rows, -values[:, 0], costs)


def _view(net: SuperNet, space: SearchSpace | None) -> Costs:
    """The costs of a view: the net's own kinds, with uniform bits and extremes as the view has them."""
    if space is None:
        return net.costs
    if space.fingerprint != net.fingerprint:
        raise ValueError(
            f"space {space.fingerprint} is no view of the supernet's {net.fingerprint}; make it with net.space.restrict"
        )
    return net.costs.view(space)


def announce(problem: Problem) -> None:
    """Print, on standard error, the exact range of each limited kind and the limits in it."""
    console = Console(stderr=True, highlight=False)
    for kind, cost in problem.kinds.items():
        low, high = (si(v, UNITS.get(kind, "")) for v in reach(problem.space, cost))
        limits = [f"{b.label} = {si(b.limits[kind], UNITS.get(kind, ''))}" for b in problem.budgets if kind in b.limits]
        console.print(f"{kind}: reachable {low} to {high}; budgets {', '.join(limits)}")


def _landmarks(problem: Problem) -> Indices:
    """Smallest, largest, and the cheapest row within each budget; ValueError where its limits contradict each other."""
    rows = [problem.space.smallest().row, problem.space.largest().row]
    for budget in problem.budgets:
        rows.append(tuple(problem.cheapest(budget).tolist()))
    return np.array(rows, dtype=np.int64)


def _spare(problem: Problem, b: int, watch: Stopwatch, sensitivity: Factors | None) -> list[Indices]:
    """Rows that still stand where the best of a latency budget turn out to take longer whole; [] for other budgets.

    They are the integer program's optima at a part of the limit, and the fastest row within the budget, which has to
    keep it when it is measured whole.
    """
    budget = problem.budgets[b]
    if KIND not in budget.limits:
        return []
    kinds = {kind: problem.kinds[kind] for kind in budget.limits}
    fastest = Program(problem.space, Factors(), kinds).least(KIND, budget.limits)
    predicted = float(kinds[KIND].value(fastest[None])[0])
    watch.require(problem.space.config(fastest), predicted, budget.label, budget.limits)
    tight = [share * budget.limits[KIND] for share in MARGINS if share * budget.limits[KIND] > predicted]
    if sensitivity is None or not tight:
        return [fastest]
    program = Program(problem.space, sensitivity, kinds)
    return [*(program.solve(budget.limits | {KIND: limit}) for limit in tight), fastest]


def _controls(problem: Problem, sensitivity: Factors | None, rng: np.random.Generator) -> list[dict[str, Indices]]:
    """For each budget, by name, the row [d] of each control."""
    uniform = uniform_rows(problem.space)
    scores = problem.scores(uniform)
    program = Program(problem.space, sensitivity, problem.kinds) if sensitivity else None
    controls: list[dict[str, Indices]] = []
    for budget in problem.budgets:
        named: dict[str, Indices] = {}
        fits = problem.within(budget, uniform)
        if fits.any():
            named["uniform"] = uniform[np.argmax(np.where(fits, problem.goal(budget, uniform, scores), -np.inf))]
        if program:
            optimum = problem.allocated(budget, program)[None]
            if budget.floor is None:
                optimum = fill(problem.space, optimum, budget.limits, problem.kinds, rng)
            named["integer_program"] = optimum[0]
        controls.append(named)
    return controls


def uniform_rows(space: SearchSpace) -> Indices:
    """[n, d] the largest architecture at uniform bits wXaY, for all X and Y that some dimension offers."""
    offered = [
        sorted({magnitude(c) for d in space.dimensions if d.quantizes and d.name.endswith(kind) for c in d.choices})
        for kind in ("weight", "input")
    ]
    rows = [space.uniform(f"w{w}a{a}").row for w in offered[0] for a in offered[1]]
    return np.unique(np.array(rows, dtype=np.int64), axis=0)


def _evolve(
    problem: Problem,
    algorithm: SearchAlgorithm,
    archive: Archive,
    generations: int,
    population: int,
    rng: np.random.Generator,
    progress: bool,
) -> bool:
    """Run the generations; True if stopped by hand."""

    def told(rows: Indices, step: int) -> None:
        values = problem.objectives(rows)
        archive.add(rows, -values[:, 0])
        algorithm.tell(rows, values, step, generations)

    with _interruptible() as state, _bar("searching", generations, progress) as bar:
        for step in range(generations):
            rows = algorithm.ask(population, rng)
            told(rows, step)
            if (step + 1) % max(1, generations // REFINEMENTS) == 0 or step in (0, generations - 1):
                told(_refinements(problem, archive, rows), step)
            if bar:
                bar.advance(note=", ".join(_best(problem, archive)))
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
        ends += [problem.improved(budget, start) for start in _distinct(starts)]
    return np.unique(np.array(ends, dtype=np.int64).reshape(-1, len(problem.space)), axis=0)


def _best(problem: Problem, archive: Archive) -> Iterator[str]:
    for budget, (_, scores) in zip(problem.budgets, archive.best, strict=True):
        if len(scores):
            yield f"{budget.label} {scores[0]:.4g}"


@contextmanager
def _interruptible() -> Iterator[dict[str, bool]]:
    """Ends the block at Ctrl-C, and says so."""
    state = {"interrupted": False}
    try:
        yield state
    except KeyboardInterrupt:
        state["interrupted"] = True
        log.warning("interrupted; going on with the best so far")


@contextmanager
def _bar(description: str, total: int, shown: bool) -> Iterator[Progress | None]:
    with ExitStack() as stack:
        yield stack.enter_context(show_progress(description, total)) if shown else None


def _measure_all(
    net: SuperNet,
    space: SearchSpace,
    chosen: Sequence[Sequence[Indices]],
    data: tuple[list[Any], list[Any]],
    measured: dict[str, float],
    progress: bool,
) -> bool:
    """Fill in accuracy by subnet id, each subnet once, budgets in turn; True if stopped by hand."""
    longest = max(map(len, chosen))
    queue = [rows[i] for i in range(longest) for rows in chosen if i < len(rows)]
    configs = {config.id: config for config in map(space.config, queue)}
    with _interruptible() as state, _bar("measuring candidates", len(configs), progress) as bar:
        for config in configs.values():
            measured[config.id] = measure(net, config, *data)
            if bar:
                bar.advance(note=f"{measured[config.id]:.1%}")
    return state["interrupted"]


def _winner(
    problem: Problem,
    b: int,
    rows: Sequence[Indices],
    controls: Mapping[str, Indices],
    measured: Mapping[str, float],
    interrupted: bool,
    watch: Stopwatch,
) -> Found:
    """The best measured row within budget b, or the best predicted where none was measured; what takes longer than a
    limit on latency, measured whole, is dropped."""
    budget = problem.budgets[b]
    pool = [_candidate(problem, row, measured) for row in rows if problem.within(budget, row[None])[0]]
    if not pool:  # interrupted before anything was told: the landmark that must exist
        pool = [
            _candidate(problem, row, measured) for row in _landmarks(problem) if problem.within(budget, row[None])[0]
        ]
    known = [c for c in pool if c.measured is not None] or pool
    known.sort(key=lambda c: budget.rank(c.measured, c.predicted[0], c.costs), reverse=True)
    best = watch.first(known, budget.limits) or watch.first(pool, budget.limits)
    assert best is not None, "the fastest row is among them"
    slack = {kind: max(0.0, 1 - best.costs[kind] / limit) for kind, limit in budget.limits.items()}
    named = {name: _candidate(problem, row, measured) for name, row in controls.items()}
    named = {name: control for name, control in named.items() if watch.fits(control.config, budget.limits)}
    return Found(
        **vars(best),
        label=budget.label,
        limits=budget.limits,
        slack=slack,
        controls=named,
        interrupted=interrupted,
        seconds=watch.of(best.config, budget.limits),
    )


def _candidate(problem: Problem, row: Indices, measured: Mapping[str, float]) -> Candidate:
    mean, std = problem.predictor.predict(row[None])
    config = problem.space.config(row)
    return Candidate(config, (float(mean[0]), float(std[0])), measured.get(config.id), problem.costs.of(config))


def _distinct(rows: Sequence[Indices]) -> list[Indices]:
    return list({tuple(row.tolist()): row for row in rows}.values())
