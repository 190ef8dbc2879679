"""What a subnet costs, as sums of lookups: BitOps in three conventions, bytes, MACs; and budgets on them.

A cost is a `Factors`: a list of (dimensions, table over their joint choices), summed. That one form is evaluated in
bulk by the search, tilted by the cost-first sampler and solved exactly by the integer program.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from supernet.config import SI, Layer, PerChannel, QuantConfig, SubnetConfig, si
from supernet.space import Indices, SearchSpace, magnitude

UNITS = {
    "bitops": "BitOps",
    "bitops_first_last_8": "BitOps",
    "bitops_inner": "BitOps",
    "bytes": "B",
    "macs": "MACs",
    "latency": "s",
}
Table = NDArray[np.float64]


@dataclass(frozen=True)
class Factors:
    """A function of a subnet that is a sum of tables, each looked up by a few genes.

    Attributes:
        terms: (positions of the dimensions, table whose axes are their choices). No positions: a constant.
    """

    terms: tuple[tuple[tuple[int, ...], Table], ...] = field(default_factory=tuple)

    def value(self, indices: Indices) -> Table:
        """[n] values of canonical rows [n, d]."""
        indices = np.asarray(indices)
        total = np.zeros(len(indices))
        for dimensions, table in self.terms:
            total += table[tuple(indices[:, i] for i in dimensions)]
        return total

    def __add__(self, other: Factors) -> Factors:
        return Factors(self.terms + other.terms)

    def __mul__(self, factor: float) -> Factors:
        return Factors(tuple((dims, table * factor) for dims, table in self.terms))


def gated(space: SearchSpace, layer: Layer, genes: Sequence[str], table: Table) -> tuple[tuple[int, ...], Table]:
    """One term: `table` over `genes` where the layer runs, 0 where it does not."""
    dims = [space.position[g] for g in genes]
    for name, allowed in layer.active_if:
        other = space.position[name]
        on = np.array([c in allowed for c in space.dimensions[other].choices], dtype=float)
        if not on.all():
            dims, table = [*dims, other], table[..., None] * on
    return tuple(dims), table


def _bits(space: SearchSpace, name: str) -> Table:
    return np.array([magnitude(c) for c in space.dimensions[space.position[name]].choices], dtype=float)


def bitops(space: SearchSpace, layers: Sequence[Layer], first_last: str = "true") -> Factors:
    """Sum of MACs x weight bits x input bits over the layers that run.

    Three conventions are in print and differ by 20 % for a ResNet-18 at 4 bits: all layers at their true bits ("true"),
    first and last counted at 8 bits ("8"), first and last left out ("out").
    """
    terms = []
    for k, layer in enumerate(layers):
        edge = k in (0, len(layers) - 1)
        if edge and first_last == "out":
            continue
        if edge and first_last == "8":
            terms.append(gated(space, layer, (), np.array(64.0 * layer.macs)))
        else:
            product = _bits(space, layer.weight)[:, None] * _bits(space, layer.input)
            terms.append(gated(space, layer, (layer.weight, layer.input), layer.macs * product))
    return Factors(tuple(terms))


def stored_bytes(space: SearchSpace, layers: Sequence[Layer]) -> Factors:
    """Bytes of what a file has to hold: packed weight codes, scales (4 B), zero-points (1 B), biases (4 B).

    Behind a BatchNorm the scale is per channel and there is a bias in the file, whatever the granularity in training
    was; the input's own scale and zero-point count 5 B.
    """
    terms = []
    for layer in layers:
        table = []
        for choice in space.dimensions[space.position[layer.weight]].choices:
            assert isinstance(choice, QuantConfig)
            per_channel = layer.behind_norm or isinstance(choice.granularity, PerChannel)
            scales = layer.outputs if per_channel else 1
            codes = math.ceil(layer.weights * choice.bits / 8)
            bias = 4 * layer.outputs if layer.bias or layer.behind_norm else 0
            table.append(codes + scales * (4 if choice.symmetric else 5) + bias + 5)
        terms.append(gated(space, layer, (layer.weight,), np.array(table, dtype=float)))
    return Factors(tuple(terms))


def macs(space: SearchSpace, layers: Sequence[Layer]) -> Factors:
    """Multiply-accumulates of one example, bits left aside."""
    return Factors(tuple(gated(space, layer, (), np.array(float(layer.macs))) for layer in layers))


class Costs:
    """Every kind of cost of one space.

    Args:
        space: the space (any view of it).
        layers: its multiplying layers in order of execution.
    """

    def __init__(self, space: SearchSpace, layers: Sequence[Layer]) -> None:
        self.space = space
        self.layers = tuple(layers)
        self.kinds: dict[str, Factors] = {
            "bitops": bitops(space, layers),
            "bitops_first_last_8": bitops(space, layers, "8"),
            "bitops_inner": bitops(space, layers, "out"),
            "bytes": stored_bytes(space, layers),
            "macs": macs(space, layers),
        }

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

        From the smallest and the largest subnet, each gene takes the form that is cheapest or dearest; exact where
        terms share no gene but depth and grow with bits, as ours do.
        """
        cost, ends = self.kinds[kind], np.array([self.space.smallest().row, self.space.largest().row], dtype=np.int64)
        low = cheapest(self.space, ends[:1], cost.value)
        high = cheapest(self.space, ends[1:], (cost * -1.0).value)
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

    def parse(self, budget: Mapping[str, str | float]) -> dict[str, float]:
        """Limits by kind, in the kind's unit, checked against what can be reached.

        Raises:
            ValueError: not a mapping kind -> limit, an unknown kind, an unreadable or unreachable limit.
        """
        if not isinstance(budget, Mapping) or not budget:
            raise ValueError(
                f"a budget is a mapping kind -> limit, e.g. {{'bitops': 'w4a4'}}, with a kind of "
                f"{', '.join(self.kinds)}; got {budget!r}"
            )
        limits = {kind: self.limit(kind, text) for kind, text in budget.items()}
        self.check(limits)
        return limits


def _positive(kind: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"a limit of {kind} must be positive, got {value}")
    return value


def label(budget: Mapping[str, str | float]) -> str:
    """Name of a budget as users type it: its limits joined, e.g. `w3a3`, `2.5M-120kB`."""
    return "-".join(str(v) if isinstance(v, str) else f"{v:g}" for v in budget.values())


def over(limits: Mapping[str, float], kinds: Mapping[str, Factors], indices: Indices) -> Table:
    """[n] largest relative excess over the limits (<= 0: within all of them)."""
    excess = [kinds[kind].value(indices) / limit - 1 for kind, limit in limits.items()]
    return np.max(excess, axis=0) if excess else np.full(len(indices), -1.0)


def repair(
    space: SearchSpace,
    indices: Indices,
    limits: Mapping[str, float],
    kinds: Mapping[str, Factors],
    rng: np.random.Generator,
) -> Indices:
    """Rows brought within all limits by taking random active genes one step down until they fit.

    Rows that fit are returned untouched. Where no bits are left, each gene takes its cheapest form. Limits must be
    reachable (`Costs.check`), else a smallest subnet comes back.
    """
    indices = space.canonical(indices)
    down, _ = space.neighbours()
    while len(bad := np.flatnonzero((excess := over(limits, kinds, indices)) > 1e-12)):
        moved = _descend(space, indices[bad], down, np.where(excess[bad] > 0.2, max(1, len(space) // 8), 1), rng)
        if (moved == indices[bad]).all():
            indices[bad] = cheapest(space, moved, functools.partial(over, limits, kinds))
            break
        indices[bad] = moved
    return indices


def cheapest(space: SearchSpace, rows: Indices, value: Callable[[Indices], Table]) -> Indices:
    """Rows [n, d] whose genes, one after the other, have taken the admissible choice of least `value` (rows -> [n])."""
    for i, mask in enumerate(space.admissible):
        n, choices = len(rows), np.flatnonzero(mask)
        options = space.spread(np.tile(rows, (len(choices), 1)), np.full(n * len(choices), i), np.repeat(choices, n))
        best = value(options).reshape(len(choices), n).argmin(0)
        rows = options.reshape(len(choices), n, -1)[best, np.arange(n)]
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
    kinds: Mapping[str, Factors],
    rng: np.random.Generator,
    rounds: int = 32,
) -> Indices:
    """Rows within the limits, with random genes taken one step up where the row still fits: slack is spent."""
    _, up = space.neighbours()
    for _round in range(rounds):
        higher = np.stack([table[indices[:, i]] for i, table in enumerate(up)], axis=1)
        movable = (higher != indices) & space.active(indices)
        gene = np.argmax(rng.random(indices.shape) * movable, axis=1)
        stepped = space.spread(indices, gene, higher[np.arange(len(indices)), gene])
        fits = movable.any(1) & (over(limits, kinds, stepped) <= 0)
        indices = np.where(fits[:, None], stepped, indices)
    return indices
