"""What a subnet costs, kind by kind; limits on it, as users type them; rows brought within them."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from supernet.config import SI, Layer, SubnetConfig, si
from supernet.costs.average import average_input_bits, average_weight_bits
from supernet.costs.peak import Step, peak_activation_bytes
from supernet.costs.sums import bitops, macs, stored_bytes
from supernet.factors import Cost as Cost
from supernet.factors import Factors as Factors
from supernet.factors import Table as Table
from supernet.factors import gated as gated
from supernet.space import Indices, SearchSpace

UNITS = {
    "bitops": "BitOps",
    "bitops_first_last_8": "BitOps",
    "bitops_inner": "BitOps",
    "bytes": "B",
    "macs": "MACs",
    "average_weight_bits": "bits",
    "average_input_bits": "bits",
    "peak_activation_bytes": "B",
    "latency": "s",
}


class Costs:
    """Every kind of cost of one space.

    Args:
        space: the space (any view of it).
        layers: its multiplying layers in order of execution.
        steps: what an inference holds, operator by operator; without them there is no `peak_activation_bytes`.
    """

    def __init__(self, space: SearchSpace, layers: Sequence[Layer], steps: Sequence[Step] = ()) -> None:
        self.space = space
        self.layers = tuple(layers)
        self.kinds: dict[str, Cost] = {
            "bitops": bitops(space, layers),
            "bitops_first_last_8": bitops(space, layers, "8"),
            "bitops_inner": bitops(space, layers, "out"),
            "bytes": stored_bytes(space, layers),
            "macs": macs(space, layers),
            "average_weight_bits": average_weight_bits(space, layers),
            "average_input_bits": average_input_bits(space, layers),
        }
        if steps:
            self.kinds["peak_activation_bytes"] = peak_activation_bytes(space, steps)

    def view(self, space: SearchSpace) -> Costs:
        """The same kinds for a view of the space: uniform bits and ends of ranges are the view's."""
        viewed = copy.copy(self)
        viewed.space = space
        return viewed

    def of(self, config: SubnetConfig | Sequence[int] | Indices) -> dict[str, float]:
        """Every cost of one subnet, by kind, in the kind's unit."""
        row = np.asarray(config.row if isinstance(config, SubnetConfig) else config)[None]
        return {kind: float(factors.value(row)[0]) for kind, factors in self.kinds.items()}

    def limit(self, kind: str, text: str | float) -> float:
        """A limit in the kind's unit: a number, a number with SI prefix (`2.5M`, `120kB`), or wXaY.

        wXaY is what the largest architecture costs at uniform X/Y bits with pinned layers pinned.

        Raises:
            ValueError: an unknown kind, or a limit that cannot be read.
        """
        if kind not in self.kinds:
            raise ValueError(
                f"a budget names its kind, one of {', '.join(self.kinds)}; got {kind!r} (e.g. budget.bitops=w4a4)"
            )
        if isinstance(text, bool):
            raise ValueError(f"a limit of {kind} is a number or wXaY, got {text!r}")
        if not isinstance(text, str):
            return _positive(kind, float(text))
        unit = UNITS.get(kind, "")
        if re.fullmatch(r"w\d+a\d+", text):
            return self.of(self.space.uniform(text))[kind]
        match = re.fullmatch(rf"\s*(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*([kMGTmun]?)\s*(?:{unit})?\s*", text)
        if not match:
            raise ValueError(
                f"a limit of {kind} is a number with SI prefix in {unit} (e.g. 2.5M) or wXaY, got {text!r}"
            )
        return _positive(kind, float(match[1] + (match[2] or "")) * SI[match[3]])

    def reachable(self, kind: str) -> tuple[float, float]:
        """Smallest and largest cost of this kind that the view can reach.

        From the smallest and the largest subnet, each gene takes the choice that is cheapest or dearest, until none
        changes; exact where terms share no gene but depth and grow with bits, as ours do (`search.allocation.reach` is
        exact for all).
        """
        cost, ends = self.kinds[kind], np.array([self.space.smallest().row, self.space.largest().row], dtype=np.int64)
        low = cheapest(self.space, ends[:1], cost.value)
        high = cheapest(self.space, ends[1:], lambda rows: -cost.value(rows))
        return float(cost.value(low)[0]), float(cost.value(high)[0])

    def check(self, budget: Mapping[str, float]) -> None:
        """Raise ValueError, naming the nearest reachable value, if a limit lies below all that the view can reach."""
        for kind, limit in budget.items():
            low = self.reachable(kind)[0]
            if limit < low * (1 - 1e-12):
                unit = UNITS.get(kind, "")
                raise ValueError(
                    f"no subnet has {kind} <= {si(limit, unit)}; the smallest reaches {si(low, unit)}: "
                    "raise the budget to that or more"
                )

    def limits(self, budget: Mapping[str, str | float]) -> dict[str, float]:
        """Limits by kind, in the kind's unit.

        Raises:
            ValueError: not a mapping kind -> limit, an unknown kind, an unreadable limit.
        """
        if not isinstance(budget, Mapping) or not budget:
            raise ValueError(
                f"a budget is a mapping kind -> limit, e.g. {{'bitops': 'w4a4'}}, with a kind of "
                f"{', '.join(self.kinds)}; got {budget!r}"
            )
        return {kind: self.limit(kind, text) for kind, text in budget.items()}

    def parse(self, budget: Mapping[str, str | float]) -> dict[str, float]:
        """`limits`, each checked for itself against what can be reached; ValueError where it cannot."""
        limits = self.limits(budget)
        self.check(limits)
        return limits


def _positive(kind: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"a limit of {kind} must be positive, got {value}")
    return value


def label(budget: Mapping[str, str | float]) -> str:
    """Name of a budget as users type it: its limits joined, e.g. `w3a3`, `2.5M-120kB`."""
    return "-".join(str(v) if isinstance(v, str) else f"{v:g}" for v in budget.values())


def over(limits: Mapping[str, float], kinds: Mapping[str, Cost], indices: Indices) -> Table:
    """[n] largest relative excess over the limits (<= 0: within all of them)."""
    excess = [kinds[kind].value(indices) / limit - 1 for kind, limit in limits.items()]
    return np.max(excess, axis=0) if excess else np.full(len(indices), -1.0)


def repair(
    space: SearchSpace,
    indices: Indices,
    limits: Mapping[str, float],
    kinds: Mapping[str, Cost],
    rng: np.random.Generator,
) -> Indices:
    """Rows brought within all limits by taking random active genes one step down until they fit.

    Rows that fit are returned untouched. Where no bits are left, each gene takes its cheapest form. Limits must be
    reachable (`Costs.check`), else a smallest subnet comes back.
    """
    indices = space.canonical(indices)
    down, _ = space.neighbours
    while len(bad := np.flatnonzero((excess := over(limits, kinds, indices)) > 1e-12)):
        moved = _descend(space, indices[bad], down, np.where(excess[bad] > 0.2, max(1, len(space) // 8), 1), rng)
        if (moved == indices[bad]).all():
            indices[bad] = cheapest(space, moved, functools.partial(over, limits, kinds))
            break
        indices[bad] = moved
    return indices


def cheapest(space: SearchSpace, rows: Indices, value: Callable[[Indices], Table]) -> Indices:
    """Rows [n, d] whose genes, one after the other, have taken the admissible choice of least `value` (rows -> [n]),
    again and again, until no choice of a single gene lowers it."""
    before, least = np.full(len(rows), np.inf), value(rows)
    while (least < before).any():
        for i, mask in enumerate(space.admissible):
            n, choices = len(rows), np.flatnonzero(mask)
            options = space.spread(
                np.tile(rows, (len(choices), 1)), np.full(n * len(choices), i), np.repeat(choices, n)
            )
            best = value(options).reshape(len(choices), n).argmin(0)
            rows = options.reshape(len(choices), n, -1)[best, np.arange(n)]
        before, least = least, value(rows)
    return rows


def _descend(
    space: SearchSpace, rows: Indices, down: list[NDArray[np.int64]], steps: NDArray[np.int64], rng: np.random.Generator
) -> Indices:
    for k in range(int(steps.max(initial=0))):
        lower = np.stack([table[rows[:, i]] for i, table in enumerate(down)], axis=1)
        movable = (lower != rows) & space.active(rows)
        act = movable.any(1) & (steps > k)
        gene = np.argmax(rng.random(rows.shape) * movable, axis=1)
        stepped = space.spread(rows, gene, lower[np.arange(len(rows)), gene])
        rows = np.where(act[:, None], stepped, rows)
    return rows


def fill(
    space: SearchSpace,
    indices: Indices,
    limits: Mapping[str, float],
    kinds: Mapping[str, Cost],
    rng: np.random.Generator,
    rounds: int = 32,
) -> Indices:
    """Rows within the limits, with random genes taken one step up where the row still fits: slack is spent."""
    _, up = space.neighbours
    for _round in range(rounds):
        higher = np.stack([table[indices[:, i]] for i, table in enumerate(up)], axis=1)
        movable = (higher != indices) & space.active(indices)
        gene = np.argmax(rng.random(indices.shape) * movable, axis=1)
        stepped = space.spread(indices, gene, higher[np.arange(len(indices)), gene])
        fits = movable.any(1) & (over(limits, kinds, stepped) <= 0)
        indices = np.where(fits[:, None], stepped, indices)
    return indices
