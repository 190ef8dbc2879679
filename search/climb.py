"""One step after another to a better row within a budget, each by an integer program of what single changes do.

Around a row the score is taken for the sum of its single changes, as first-order expansions of the loss do for all
of mixed precision (HAWQ-V3, Yao et al., ICML 2021, arXiv:2011.10680, section 4); but here the changes are asked for
instead of expanded, so any score will do. Where the score is a sum, one step is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.allocation import Program
from search.keeping import keys
from search.variation import Limits, mutated, single_changes
from supernet.cost import Factors
from supernet.space import Indices

Table = NDArray[np.float64]
ROOMS = (0.6, 0.1)
"""Share of the budget that is left free at the row whose single changes are asked for, so that dearer ones fit: a
wide look, which sees nearly every change, and a near one, where sums of changes hold better, in turn."""
KICK = 3.0
"""Expected genes drawn anew where a climb has come to its end."""
PRICES = (0.5, 2.0)
"""Prices of a change, in mean gains of a change, that are tried where the program's own answer is no better."""


class Climb:
    """The climb within one budget.

    A round asks for the single changes of an *anchor*, which is the base taken down until some of the budget is free;
    then for the optimum of their sum within the budget, and, should it be no better than the base, for that of fewer
    changes. The best of all that becomes the next base. From a base that is no more improved on, the next round starts
    at the best row with some genes drawn anew. Genes that decide whether others are active change only then.

    Args:
        limits: the budgets.
        b: which of them.
    """

    def __init__(self, limits: Limits, b: int) -> None:
        self.limits, self.b = limits, b
        gates = {name for d in limits.space.dimensions for name, _ in d.active_if}
        self.fixed = [d.name for d in limits.space.dimensions if d.name in gates]
        none = np.zeros((0, len(limits.space)), dtype=np.int64)
        self.base, self.anchor, self.queue = none, none, none
        self.best: tuple[Indices, float] = (none, np.inf)
        self.stage, self.room = "idle", ROOMS[0]
        self.told: dict[bytes, float] = {}
        self.pending: set[bytes] = set()

    # -- ask and tell ---------------------------------------------------------------------------------------------
    def ask(self, n: int, rng: np.random.Generator) -> Indices:
        """[at most n, d] rows within the budget; none where earlier ones were not told yet, or nothing was ever."""
        if not len(self.queue) and not self.pending and len(self.best[0]):
            self._advance(rng)
        rows, self.queue = self.queue[:n], self.queue[n:]
        self.pending.update(keys(rows))
        return rows

    def tell(self, rows: Indices, values: Table) -> None:
        """Objectives [n, 1 + kinds] of rows [n, d], whoever asked for them."""
        for key, score in zip(keys(rows), values[:, 0].tolist(), strict=True):
            if key in self.pending:
                self.told[key] = score
                self.pending.remove(key)
        inside = np.flatnonzero((values[:, 1:] <= self.limits.bounds[self.b]).all(1))
        if len(inside):
            at = inside[np.argmin(values[inside, 0])]
            if values[at, 0] < self.best[1]:
                self.best = rows[at : at + 1], float(values[at, 0])

    # -- one stage after another ------------------------------------------------------------------------------------
    def _advance(self, rng: np.random.Generator) -> None:
        """Fill the queue with what the next stage asks for."""
        if self.stage == "changes":
            self._enqueue(self._proposals(0.0), "optimum")
            if len(self.queue):
                return
        if self.stage == "optimum" and self._score(self.base) <= min(self.told.values()):
            self._enqueue(np.concatenate([self._proposals(price) for price in PRICES]), "fewer")
            if len(self.queue):
                return
        improved = self.stage == "idle" or self.best[1] < self._score(self.base)
        self._start(self.best[0] if improved else self._kicked(rng), rng)

    def _start(self, base: Indices, rng: np.random.Generator) -> None:
        """A round around `base` [1, d]."""
        bounds = self.limits.bounds[self.b : self.b + 1]
        self.base, self.told = base, {}
        self.anchor = self.limits.fitted(base, bounds * (1 - self.room), rng, filling=0.0)
        self.room = ROOMS[1 - ROOMS.index(self.room)]
        if not self.limits.inside(self.anchor)[0, self.b]:  # a cost that does not fall with bits, such as latency
            self.anchor = base
        genes, values = single_changes(self.limits.space, self.anchor[0])
        changes = self.limits.space.spread(np.repeat(self.anchor, len(genes), axis=0), genes, values)
        rows = np.concatenate([base, self.anchor, changes])
        self._enqueue(rows[self.limits.inside(rows)[:, self.b]], "changes")

    def _enqueue(self, rows: Indices, stage: str) -> None:
        """Rows that this round does not know yet."""
        new = {key: row for key, row in zip(keys(rows), rows, strict=True) if key not in self.told}
        self.queue = np.array(list(new.values()), dtype=np.int64).reshape(-1, rows.shape[1])
        self.stage = stage

    def _kicked(self, rng: np.random.Generator) -> Indices:
        space = self.limits.space
        moved = mutated(space, self.best[0], min(1.0, KICK / max(1, len(space))), rng)
        bounds = self.limits.bounds[self.b : self.b + 1]
        moved = self.limits.fitted(moved, bounds, rng)
        return moved if self.limits.inside(moved)[0, self.b] else self.best[0]

    def _score(self, row: Indices) -> float:
        return self.told.get(keys(row)[0], np.inf) if len(row) else np.inf

    def _proposals(self, price: float) -> Indices:
        """[1, d] the optimum of the sum of single changes, each gene that leaves the base paying `price` mean gains."""
        space, here = self.limits.space, self._score(self.anchor)
        genes, values = single_changes(space, self.anchor[0])
        changes = space.spread(np.repeat(self.anchor, len(genes), axis=0), genes, values)
        known = {
            (int(g), int(k)): self.told[key] - here
            for g, k, key in zip(genes, values, keys(changes), strict=True)
            if key in self.told
        }
        known |= {(int(g), int(self.anchor[0, g])): 0.0 for g in genes}
        unit = float(np.mean([max(0.0, -v) for v in known.values()])) if known else 0.0
        tables = {int(g): np.zeros(int(space.sizes[g])) for g in genes}
        for (g, k), change in known.items():
            tables[g][k] = change + price * unit * (k != self.base[0, g])
        allowed = {space.dimensions[g].name: [k for i, k in known if i == g] for g in tables}
        allowed |= {name: [int(self.anchor[0, space.position[name]])] for name in self.fixed}
        named = {name: [space.dimensions[space.position[name]].choices[k] for k in ks] for name, ks in allowed.items()}
        kinds = {kind: self.limits.costs.kinds[kind] for kind in self.limits.budgets[self.b]}
        sum_of_changes = Factors(tuple(((g,), table) for g, table in tables.items()))
        return Program(space.restrict(named), sum_of_changes, kinds).solve(self.limits.budgets[self.b])[None]

    # -- state --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain Python."""
        rows = {name: getattr(self, name).tolist() for name in ("base", "anchor", "queue")}
        best = {"best": [self.best[0].tolist(), self.best[1] if len(self.best[0]) else None]}
        told = {"told": {key.hex(): score for key, score in self.told.items()}}
        stage = {"stage": self.stage, "room": self.room}
        return rows | best | stage | told | {"pending": sorted(key.hex() for key in self.pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""

        def shaped(rows: list[list[int]]) -> Indices:
            return np.array(rows, dtype=np.int64).reshape(-1, len(self.limits.space))

        self.base, self.anchor, self.queue = (shaped(state[name]) for name in ("base", "anchor", "queue"))
        row, score = state["best"]
        self.best, self.stage = (shaped(row), np.inf if score is None else score), state["stage"]
        self.room = state["room"]
        self.told = {bytes.fromhex(key): score for key, score in state["told"].items()}
        self.pending = {bytes.fromhex(key) for key in state["pending"]}
