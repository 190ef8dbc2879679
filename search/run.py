"""One search for all budgets: seeds, evolution on the predictor, and the best beside their controls, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from predictors.measuring import weights_digest
from search.allocation import Program, reach
from search.candidates import Bench, best_of, distinct, in_turn, winner
from search.controls import Named, controls, random_rows
from search.evolution import NSGA2
from search.evolving import Checkpoint, evolve, key
from search.front import Found, Front
from search.problem import Archive, Problem
from search.timing import KIND, Stopwatch
from supernet.config import SubnetConfig, si
from supernet.cost import UNITS, Costs, Factors
from supernet.elastic.supernet import SuperNet
from supernet.interfaces import Engine, Predictor, SearchAlgorithm, Task
from supernet.space import Indices, SearchSpace

MARGINS = (0.95, 0.9, 0.8)
"""Shares of a latency limit that the table's error may take."""
STATE = "search.state.json"


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
    random_search: bool = True,
    out: Path | str | None = None,
    reuse: Iterable[Path | str] = (),
    engine: Engine | None = None,
    progress: bool = True,
) -> Front:
    """The best subnet within each budget; all budgets are searched at once, and nothing over a limit is returned.

    The first generation holds, for each budget, the best uniform bits that fit, the integer program's optimum of the
    sensitivity, and the cheapest subnet. Interrupted by hand (Ctrl-C), it returns the best so far. With `out`, a search
    that was killed or interrupted goes on when it is called again alike, to the same result, and no subnet is measured
    twice, whatever the budget.

    Args:
        net: the supernet (without `task`, anything with `space`, `costs` and `fingerprint`).
        predictor: what subnets are worth; higher is better.
        budgets: mappings kind -> limit; one mapping is one budget.
        rng: None: one seeded with 0. Random search draws from a stream of its own.
        space: a view of the net's space to search in; None: all of it.
        task: if given, the best candidates of each budget and its controls are measured on select, and the best
            measured wins; else the best predicted wins, and of what is measured only what files know.
        candidates: subnets measured for each budget, besides the controls; 0: nothing is measured.
        generations, population: length and width of the evolution.
        sensitivity: additive quality cost for the integer program; None: the predictor's own `sensitivity`, if it has
            one.
        algorithm: makes the search algorithm when called with space, costs, budgets, seeds and population; None: NSGA2.
        recalibrate_images, select_images: images for re-evaluation; None: all.
        seconds: measures a subnet as a whole; under a budget of latency, candidates that take longer are dropped.
        random_search: measure, beside each winner, as many random subnets within the budget as candidates.
        out: folder that keeps measured.jsonl and, until the end, search.state.json; None: nothing is kept.
        reuse: files of earlier measurements (pairs.jsonl): those of the same weights and images are not made again,
            and the best of them compete too.
        engine: how subnets are measured; None: in this process.
        progress: show progress and, before the search, what the budgets can reach.

    Raises:
        ValueError: a budget that cannot be read or met, a latency that no subnet keeps when it is measured whole, or a
            setting out of range.
    """
    check(candidates, generations, population)
    rng, out = rng or np.random.default_rng(0), Path(out) if out else None
    draws = rng.spawn(1)[0] if random_search else None
    problem = Problem(space or net.space, _view(net, space), predictor, budgets)
    if progress:
        announce(problem)
    watch, every = Stopwatch(seconds), range(len(problem.budgets))
    sensitivity = sensitivity or getattr(predictor, "sensitivity", None)
    spare = [_spare(problem, b, watch, sensitivity) for b in every]
    named = controls(problem, sensitivity, rng)
    made, seeds = _algorithm(problem, algorithm or NSGA2, named, population)
    sizes = {"generations": generations, "population": population}
    settings = sizes | ({"weights": weights_digest(net)} if out else {})
    checkpoint = Checkpoint(out / STATE, key(problem, made, seeds, rng, settings)) if out else None
    archive = Archive(problem)
    stopped = evolve(problem, made, archive, **sizes, rng=rng, checkpoint=checkpoint, progress=progress)
    archive.check()
    images = {"recalibrate_images": recalibrate_images, "select_images": select_images}
    bench = Bench(net, task if candidates else None, out=out, reuse=reuse, engine=engine, **images)
    met = [[*archive.top(b, max(1, candidates)), *bench.best(problem, b, candidates)] for b in every]
    chosen = [_within(problem, b, [*met[b], *named[b].values(), *spare[b]]) for b in every]
    stopped = stopped or _measure(problem, bench, chosen, named, draws, progress)
    found = [winner(problem, b, chosen[b], named[b], bench, watch, stopped) for b in every]
    if checkpoint and not stopped:
        checkpoint.remove()
    return _front(problem, found, made)


def check(candidates: int, generations: int, population: int) -> None:
    """Raise ValueError where a number is out of range."""
    if candidates < 0 or min(generations, population) < 1:
        raise ValueError(
            "candidates is at least 0, generations and population at least 1, "
            f"got {candidates}, {generations}, {population}"
        )


def _front(problem: Problem, found: Sequence[Found], made: SearchAlgorithm) -> Front:
    rows, values = made.front()
    costs = {kind: values[:, 1 + k] for k, kind in enumerate(problem.kinds)}
    return Front(found, problem.space.fingerprint, rows, -values[:, 0], costs)


def _measure(
    problem: Problem,
    bench: Bench,
    chosen: Sequence[Sequence[Indices]],
    named: Sequence[Named],
    draws: np.random.Generator | None,
    progress: bool,
) -> bool:
    """Measure what was chosen for each budget and, with `draws`, as many random rows, the best of which becomes a
    control; True if stopped by hand. Where nothing can be measured, it becomes one if all of them are known."""
    every = range(len(chosen))
    can = bench.measurer is not None
    drawn: list[list[Indices]] = [[] for _ in every]
    if draws and (can or bench.records):
        drawn = [list(random_rows(problem, b, len(chosen[b]), draws)) for b in every]
    stopped = bench.measure(in_turn(problem, chosen, drawn), progress)
    for b in every:
        luckiest = best_of(problem, b, drawn[b], bench) if can or bench.knows(problem, drawn[b]) else None
        if luckiest is not None:
            named[b]["random_search"] = luckiest
    return stopped


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


def _algorithm(
    problem: Problem, make: Callable[..., SearchAlgorithm], named: Sequence[Named], population: int
) -> tuple[SearchAlgorithm, Indices]:
    """The algorithm and its seeds: landmarks and controls."""
    known = [_landmarks(problem), *(row[None] for rows in named for row in rows.values())]
    seeds = np.unique(np.concatenate(known), axis=0)
    given = {"budgets": problem.targets, "seeds": seeds, "population": population}
    return make(space=problem.space, costs=problem.costs, **given), seeds


def _landmarks(problem: Problem) -> Indices:
    """Smallest, largest, and the cheapest row within each budget; ValueError where its limits contradict each other."""
    rows = [problem.space.smallest().row, problem.space.largest().row]
    for budget in problem.budgets:
        rows.append(tuple(problem.cheapest(budget).tolist()))
    return np.array(rows, dtype=np.int64)


def _within(problem: Problem, b: int, rows: Sequence[Indices]) -> list[Indices]:
    """The rows within budget b, each once; where there is none (interrupted before anything was told), landmarks."""
    every = distinct(rows)
    inside = [row for row in every if problem.within(problem.budgets[b], row[None])[0]]
    return inside or [row for row in _landmarks(problem) if problem.within(problem.budgets[b], row[None])[0]]


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
