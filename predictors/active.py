"""Active collection: the next subnets to measure are those about which the predictor knows least, near some costs."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from predictors.judging import kendall_at_equal_cost
from predictors.pairs import Pairs, landmarks
from supernet.artefacts import Progress, append_jsonl, read_jsonl
from supernet.artefacts import progress as show_progress
from supernet.config import SubnetConfig
from supernet.cost import Costs
from supernet.interfaces import Predictor
from supernet.samplers.cost_first import CostFirst
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]
WIDTH = 0.05
"""How far costs may lie from one another, and from a cost that was asked for, and count as equal."""
LEVELS = 6
"""Costs at which the judging subnets lie, where none was asked for: at equal cost there must be some to compare."""
BINS = 8
"""Of log cost, within which uncertainty is compared: scores of cheap subnets spread more, whatever is known."""
FEWEST = 8
SECONDS = {"s": 1, "min": 60, "h": 3600}


class Measures(Protocol):
    """What `predictors.measuring.Measurer` is."""

    records: dict[str, dict[str, Any]]

    def __call__(self, configs: Iterable[SubnetConfig]) -> Iterator[dict[str, Any]]: ...


@dataclass(frozen=True)
class Goal:
    """When a collection ends: whichever comes first of

    Attributes:
        tau: Kendall's tau at equal cost on the held-out subnets, in (0, 1); None: no such goal.
        seconds: time from the start; None: no limit.
    """

    tau: float | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, until: str | None, limit: str | float | None) -> Goal:
        """`tau:0.85` and `10min`, `30s` or `2h`; either may be missing.

        Raises:
            ValueError: anything else.
        """
        tau = seconds = None
        if until is not None:
            match = re.fullmatch(r"tau:(\d*\.?\d+)", str(until))
            if not match or not 0 < float(match[1]) < 1:
                raise ValueError(f"until is tau:<a number between 0 and 1>, e.g. until=tau:0.85; got {until!r}")
            tau = float(match[1])
        if limit is not None:
            match = re.fullmatch(r"(\d*\.?\d+)\s*(s|min|h)", str(limit))
            if not match or float(match[1]) <= 0:
                raise ValueError(f"time is a positive number with s, min or h, e.g. time=10min; got {limit!r}")
            seconds = float(match[1]) * SECONDS[match[2]]
        return cls(tau, seconds)


@dataclass(frozen=True)
class Collected:
    """What an active collection brought.

    Attributes:
        learned: pairs to learn from.
        held: pairs to judge on, drawn at random before anything was chosen.
        report: goal, why it stopped, and tau after each round, as JSON holds it.
    """

    learned: Pairs
    held: Pairs
    report: dict[str, Any]


class Active:
    """Rounds of: learn from what is known, judge, choose the least certain of many subnets, measure these.

    What is chosen depends on the seed, the number of the round and the records known at its start. Each choice is
    noted in `out` before it is measured, so a killed collection goes on with it and ends with the same pairs (unless
    a limit of time cuts it), also with another goal, a larger n or another `held`. With other settings a new
    collection starts, which knows all records of the old one.

    Choosing: a pool drawn cost-first, near the given costs or over all; its predicted standard deviations, relative to
    what is usual at the cost; then one after the other the subnet with the largest product of that and its distance
    (share of genes that differ) from those already chosen, so that a batch does not ask the same question twice.

    Args:
        space: what is collected from.
        costs: its costs.
        measurer: measures, and knows all records.
        make: function of `rng` that makes a predictor which has learned nothing.
        near: costs around which to choose and to judge, in the kind's unit; empty: spread over log cost.
        kind: which cost.
        batch: subnets of a round, at least 1.
        held: subnets to judge on, at least 2.
        pool: subnets among which the predictor chooses.
        seed: of all draws.
        settings: whatever else the choice depends on (the predictor's configuration), as JSON holds it.
        out: a file that notes the choices; None: nothing to go on from.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        space: SearchSpace,
        costs: Costs,
        measurer: Measures,
        make: Callable[..., Predictor],
        *,
        near: Sequence[float] = (),
        kind: str = "bitops",
        batch: int = 32,
        held: int = 60,
        pool: int = 2048,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        out: Path | str | None = None,
    ) -> None:
        if batch < 1 or held < 2 or pool < batch:
            raise ValueError(
                "batch is at least 1, the held-out subnets are at least 2, the pool is no smaller than the batch; got "
                f"{batch}, {held} and {pool}"
            )
        self.space, self.measurer, self.make, self.out = space, measurer, make, out
        self.near, self.kind, self.batch, self.pool, self.seed = np.array(near, dtype=float), kind, batch, pool, seed
        self.factors, self.sampler = costs.kinds[kind], CostFirst(space, costs, kind)
        self.settings = {
            "fingerprint": space.fingerprint,
            "near": list(map(float, near)),
            "kind": kind,
            "batch": batch,
            "pool": pool,
            "seed": seed,
            **(settings or {}),
        }
        self.base, self.held, self.rounds = self._resumed(held)
        self.deadline = np.inf

    # -- what was chosen so far ----------------------------------------------------------------------------------------
    def _resumed(self, held: int) -> tuple[list[str], Indices, list[dict[str, Any]]]:
        """Ids known at the start, held-out rows, and the rounds chosen so far."""
        base, rows, rounds, ours = list[str](), np.zeros((0, len(self.space)), dtype=np.int64), list[Any](), False
        for line in read_jsonl(self.out) if self.out and Path(self.out).exists() else []:
            if "settings" in line:
                ours = line["settings"] == self.settings and set(line["base"]) <= self.measurer.records.keys()
                base, rows, rounds = line["base"], np.array(line["held"], dtype=np.int64), []
            elif ours:
                rounds.append(line)
        if ours:
            return base, rows, rounds
        base, rows = sorted(self.measurer.records), self._judges(held)
        self._note({"settings": self.settings, "base": base, "held": rows.tolist()})
        return base, rows, []

    def _note(self, line: Mapping[str, Any]) -> None:
        if self.out:
            append_jsonl(self.out, line)

    # -- draws ---------------------------------------------------------------------------------------------------------
    def _judges(self, n: int) -> Indices:
        """[n, d] rows at the given costs, or at some levels between the cheapest and the dearest."""
        rng = np.random.default_rng([self.seed, 0])
        levels = self.near
        if not len(levels):
            low, high = self.sampler.edges[0], self.sampler.edges[-1]
            levels = np.geomspace(low, high, LEVELS + 2)[1:-1]
        return np.unique(self.sampler.at(self._around(np.resize(levels, n), rng), rng), axis=0)

    @staticmethod
    def _around(costs: Table, rng: np.random.Generator) -> Table:
        return costs * (1 + WIDTH * (2 * rng.random(len(costs)) - 1))

    def _pool(self, n: int, rng: np.random.Generator) -> Indices:
        if not len(self.near):
            return self.sampler.ask(n, rng)
        return self.sampler.at(self._around(rng.choice(self.near, n), rng), rng)

    def _choose(self, predictor: Predictor | None, count: int, known: set[str], rng: np.random.Generator) -> Indices:
        """[count, d] rows that are not known, the least certain; without a predictor as they are drawn."""
        rows = self._pool(self.pool if predictor else 4 * count, rng)
        if predictor is None:
            first = np.array([config.row for config in landmarks(self.space)], dtype=np.int64)
            rows = np.concatenate([first, rows])
        _, unique = np.unique(rows, axis=0, return_index=True)
        rows = rows[[k for k in np.sort(unique) if self.space.config(rows[k]).id not in known]]
        if predictor is None or len(rows) <= count:
            return rows[:count]
        _, std = predictor.predict(rows)
        return rows[diverse(rows, unusual(std, self.factors.value(rows)), count)]

    # -- the loop ------------------------------------------------------------------------------------------------------
    def run(self, n: int, goal: Goal, progress: bool = True) -> Collected:
        """Collect until the goal is reached, the time is over, or n pairs are known.

        Ctrl-C ends it like the limit of time: what was measured is returned.

        Raises:
            ValueError: it ended before there was enough to learn from and to judge on.
        """
        self.deadline = time.monotonic() + goal.seconds if goal.seconds is not None else np.inf
        history = list[dict[str, Any]]()
        with ExitStack() as stack:
            bar = stack.enter_context(show_progress("measuring subnets", n)) if progress else None
            if bar:
                bar.advance(len(self.measurer.records))
            try:
                stopped = self._advance(n, goal, bar, history)
            except TimeoutError:
                stopped = "time"
            except KeyboardInterrupt:
                stopped = "interrupted"
        pairs, held = self._parts(None)
        if min(len(held), len(pairs) - FEWEST) < 1:
            raise ValueError(
                f"{len(pairs)} pairs to learn from and {len(held)} to judge on are too few ({stopped}); what was "
                "measured is kept: start again with more time, or a larger n"
            )
        said = {"until_tau": goal.tau, "near": self.near.tolist(), "stopped": stopped, "rounds": history}
        return Collected(pairs, held, said)

    def _advance(self, n: int, goal: Goal, bar: Progress | None, history: list[dict[str, Any]]) -> str:
        """Go on to the end and say what that was; `history` gets each judgement as it is made."""
        self._measure(self.held[: max(0, n)], bar, "judges first")
        for number in itertools.count(1):
            done = self.rounds[number - 1] if number <= len(self.rounds) else None
            ids = [*self.base, *(name for r in self.rounds[: number - 1] for name in r["ids"])]
            learned, held = self._parts(set(ids))
            judged = done["judged"] if done else {"pairs": len(learned), "kendall_equal_cost": None}
            predictor = None
            if done is None and len(learned) >= FEWEST:
                predictor = self.make(rng=np.random.default_rng([self.seed, number, 1]))
                predictor.fit(learned.indices, learned.scores)
                mean, _ = predictor.predict(held.indices)
                judged["kendall_equal_cost"] = kendall_at_equal_cost(held.scores, mean, held.costs[self.kind], WIDTH)[0]
            tau = judged["kendall_equal_cost"]
            history.append(judged)
            if tau is not None and goal.tau is not None and tau >= goal.tau:
                return "goal"
            known = {*ids, *(self.space.config(row).id for row in self.held)}
            if done is None:
                rng = np.random.default_rng([self.seed, number])
                if len(known) >= n:
                    return "n"
                rows = self._choose(predictor, min(self.batch, n - len(known)), known, rng)
                if not len(rows):
                    return "space exhausted"
                done = {"ids": [self.space.config(row).id for row in rows], "rows": rows.tolist(), "judged": judged}
                self.rounds.append(done)
                self._note(done)
            shown = "" if tau is None else f"tau {tau:.3f}" + (f" of {goal.tau:g}" if goal.tau else "")
            self._measure(np.array(done["rows"], dtype=np.int64), bar, f"round {number} {shown}".rstrip())
        raise AssertionError("itertools.count has no end")

    def _measure(self, rows: Indices, bar: Progress | None, note: str) -> None:
        """Measure what is not known of some rows.

        Raises:
            TimeoutError: the time is over.
        """
        missing = [config for config in map(self.space.config, rows) if config.id not in self.measurer.records]
        if missing and time.monotonic() >= self.deadline:
            raise TimeoutError
        for count, _ in enumerate(self.measurer(missing), 1):
            if bar:
                bar.advance(note=note)
            if count < len(missing) and time.monotonic() >= self.deadline:
                raise TimeoutError

    def _parts(self, ids: set[str] | None) -> tuple[Pairs, Pairs]:
        """(pairs of these ids, or of all records; held-out pairs that are measured), none in both."""
        judges = {self.space.config(row).id for row in self.held}
        records = self.measurer.records
        learned = [r for name, r in records.items() if name not in judges and (ids is None or name in ids)]
        fingerprint = self.space.fingerprint
        held = [records[name] for name in sorted(judges) if name in records]
        return Pairs.of(learned, fingerprint), Pairs.of(held, fingerprint)


def unusual(std: Table, costs: Table, bins: int = BINS) -> Table:
    """Standard deviations [n] over the median of those of about the same cost."""
    order = np.argsort(costs, kind="stable")
    usual = np.empty(len(std))
    for part in np.array_split(order, min(bins, len(std))):
        usual[part] = max(float(np.median(std[part])), 1e-12)
    return std / usual


def diverse(rows: Indices, worth: Table, count: int) -> NDArray[np.int64]:
    """Positions of `count` rows [n, d]: the worthiest, then the largest worth x distance from the nearest chosen.

    The distance is the share of genes that differ.
    """
    chosen = [int(np.argmax(worth))]
    distance = (rows != rows[chosen[0]]).mean(1)
    while len(chosen) < count:
        best = int(np.argmax(worth * distance))
        chosen.append(best)
        distance = np.minimum(distance, (rows != rows[best]).mean(1))
    return np.array(chosen, dtype=np.int64)
