"""The search space: named dimensions with choices, and subnets as rows of choice indices.

A subnet is a row of d integers, row[i] in 0..len(choices_i)-1. It is *canonical* when tied genes agree and inactive
genes are 0, so that two rows are equal exactly if the subnets are. All operations are vectorised over [n, d] index
matrices.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supernet.config import Choice, Granularity, PerChannel, PerTensor, QuantConfig, SubnetConfig, plain

Indices = NDArray[np.int64]
Rule = Sequence[Choice] | Callable[[Choice], bool]


@dataclass(frozen=True, slots=True)
class Dimension:
    """One thing that may vary.

    Args:
        name: `<path of the module>.<what>`, e.g. `layer1.0.conv1.weight`, `layer1.depth`.
        choices: the values, at least one. Integers ascend.
        active_if: conjunction of (name of an earlier dimension, allowed choices): data, never a callable. () is always.
    """

    name: str
    choices: tuple[Choice, ...]
    active_if: tuple[tuple[str, tuple[Choice, ...]], ...] = ()

    def __post_init__(self) -> None:
        if not self.choices or len(set(self.choices)) != len(self.choices):
            raise ValueError(f"dimension {self.name} needs distinct choices, got {[str(c) for c in self.choices]}")

    @property
    def quantizes(self) -> bool:
        """Whether the choices are QuantConfigs (else: an architecture dimension of integers)."""
        return isinstance(self.choices[0], QuantConfig)


def magnitude(choice: Choice) -> int:
    """What orders the choices of a dimension: bits of a QuantConfig, the integer itself of an architecture choice."""
    return choice.bits if isinstance(choice, QuantConfig) else choice


class SearchSpace:
    """All subnets of one supernet, or the part of them that a view admits.

    A view (`restrict`, `pin`, `tie`) keeps dimensions, indices and fingerprint, and adds a mask of admissible choices
    and equalities between genes; `sample`, `mutate`, repair and the integer program honour them, so that what was
    learned on the whole space can be used on any view of it.

    Args:
        dimensions: in order; a dimension may depend on earlier ones only.
    """

    def __init__(self, dimensions: Sequence[Dimension]) -> None:
        self.dimensions = tuple(dimensions)
        self.position = {d.name: i for i, d in enumerate(self.dimensions)}
        if len(self.position) != len(self.dimensions):
            raise ValueError("dimension names must differ; two modules report the same path")
        self.sizes = np.array([len(d.choices) for d in self.dimensions], dtype=np.int64)
        self.admissible: tuple[NDArray[np.bool_], ...] = tuple(np.ones(n, dtype=bool) for n in self.sizes)
        self.ties: tuple[tuple[int, ...], ...] = ()
        self._conditions = [self._compile(d, i) for i, d in enumerate(self.dimensions)]

    def _compile(self, dimension: Dimension, at: int) -> list[tuple[int, NDArray[np.bool_]]]:
        conditions = []
        for name, allowed in dimension.active_if:
            other = self.position.get(name, at)
            if other >= at:
                raise ValueError(f"{dimension.name} depends on {name!r}, which must be an earlier dimension")
            conditions.append((other, np.array([c in allowed for c in self.dimensions[other].choices])))
        return conditions

    def __len__(self) -> int:
        return len(self.dimensions)

    # -- what is one subnet -------------------------------------------------------------------------------------------
    def active(self, indices: Indices) -> NDArray[np.bool_]:
        """Which genes of [n, d] rows matter."""
        active = np.ones(indices.shape, dtype=bool)
        for i, conditions in enumerate(self._conditions):
            for other, allowed in conditions:
                active[:, i] &= active[:, other] & allowed[indices[:, other]]
        return active

    def canonical(self, indices: Indices) -> Indices:
        """Canonical form of [n, d] rows: tied genes take the value of their first active member, inactive ones 0."""
        indices = np.array(indices, dtype=np.int64, ndmin=2)
        if indices.shape[1] != len(self) or (indices < 0).any() or (indices >= self.sizes).any():
            raise ValueError(
                f"rows must have {len(self)} indices, each in 0..size-1 of its dimension; got shape {indices.shape}"
            )
        active = self.active(indices)
        for group in self.ties:
            members = np.array(group)
            first = members[np.argmax(active[:, members], axis=1)]
            indices[:, members] = indices[np.arange(len(indices)), first][:, None]
        if any(not self.dimensions[i].quantizes for group in self.ties for i in group):
            active = self.active(indices)
        return np.where(active, indices, 0)

    def config(self, row: Sequence[int] | Indices) -> SubnetConfig:
        """The SubnetConfig of one index row."""
        canonical = self.canonical(np.asarray(row)[None])
        active = self.active(canonical)[0]
        return SubnetConfig(
            self.dimensions,
            canonical[0].tolist(),
            [d.name for d, on in zip(self.dimensions, active, strict=True) if on],
        )

    def indices(self, configs: SubnetConfig | Mapping[str, Choice] | Iterable[Mapping[str, Choice]]) -> Indices:
        """[n, d] canonical rows of configurations (one configuration gives n = 1).

        Raises:
            ValueError: a name or a choice that the space does not have, or an active dimension without a choice.
        """
        many = [configs] if isinstance(configs, Mapping) else list(configs)
        rows = np.full((len(many), len(self)), -1, dtype=np.int64)
        for row, config in zip(rows, many, strict=True):
            for name, choice in config.items():
                at = self.position.get(name)
                if at is None or choice not in self.dimensions[at].choices:
                    known = [str(c) for c in self.dimensions[at].choices] if at is not None else "no such dimension"
                    raise ValueError(f"{name}={choice} is not in this space ({known}); was it made for another model?")
                row[at] = self.dimensions[at].choices.index(choice)
        silent = self.active(rows.clip(0)) & (rows < 0)
        if silent.any():
            names = _few(self.dimensions[i].name for i in np.flatnonzero(silent.any(0)))
            raise ValueError(f"a configuration names a choice for every active dimension; missing: {names}")
        return self.canonical(rows.clip(0))

    def admits(self, indices: Indices) -> NDArray[np.bool_]:
        """[n] whether each row is canonical and its active genes are admissible in this view."""
        indices = np.asarray(indices)
        good = (self.canonical(indices) == indices).all(1)
        active = self.active(indices)
        for i, mask in enumerate(self.admissible):
            good &= mask[indices[:, i]] | ~active[:, i]
        return good

    # -- moves --------------------------------------------------------------------------------------------------------
    def sample_indices(self, n: int, rng: np.random.Generator) -> Indices:
        """[n, d] rows, every admissible choice of every gene equally likely."""
        return self.canonical(self._draw(n, rng))

    def _draw(self, n: int, rng: np.random.Generator) -> Indices:
        """[n, d] admissible choices of all genes, not canonical: inactive genes have one too."""
        table, counts = self._offered
        drawn = rng.integers(counts[:, None], size=(len(self), n))
        return table[np.arange(len(self))[:, None], drawn].T.copy()

    @cached_property
    def _offered(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Admissible choices of each dimension, [d, most] with zeros behind them, and how many they are, [d]."""
        counts = np.array([mask.sum() for mask in self.admissible], dtype=np.int64)
        table = np.zeros((len(self), max(counts, default=0)), dtype=np.int64)
        for row, mask, count in zip(table, self.admissible, counts, strict=True):
            row[:count] = np.flatnonzero(mask)
        return table, counts

    def sample(self, rng: np.random.Generator) -> SubnetConfig:
        """One subnet, every admissible choice of every gene equally likely."""
        return self.config(self.sample_indices(1, rng)[0])

    def mutate(self, indices: Indices, rate: float, rng: np.random.Generator) -> Indices:
        """Each gene drawn anew with probability `rate`; genes that this activates are drawn."""
        keep = self.active(indices) & (rng.random(indices.shape) >= rate)
        return self.canonical(np.where(keep, indices, self._draw(len(indices), rng)))

    @cached_property
    def neighbours(self) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        """For each dimension the next smaller and the next larger admissible choice (itself where there is none).

        Bits of a QuantConfig move within one (granularity, symmetry) while the next bits have it, else to any form.
        """
        down, up = ([self._ladder(i, sign) for i in range(len(self))] for sign in (-1, 1))
        return down, up

    def _ladder(self, i: int, direction: int) -> NDArray[np.int64]:
        choices, mask = self.dimensions[i].choices, self.admissible[i]
        step = np.arange(len(choices))
        for j, here in enumerate(choices):
            further = [k for k in np.flatnonzero(mask) if direction * (magnitude(choices[k]) - magnitude(here)) > 0]
            if further:
                step[j] = min(
                    further,
                    key=lambda k: (abs(magnitude(choices[k]) - magnitude(here)), not _same_form(choices[k], here)),
                )
        return step

    def spread(self, indices: Indices, gene: NDArray[np.int64], value: NDArray[np.int64]) -> Indices:
        """Rows in which gene[r] of row r, and whatever is tied to it, has become value[r].

        Genes that this activates take the value they are tied to, else their first admissible choice.
        """
        active, rows = self.active(indices), np.arange(len(indices))
        changed = np.where(active, indices, self._offered[0][:, 0])
        changed[rows, gene] = value
        for group in self.ties:
            members = np.array(group)
            led, named = active[:, members].any(1), np.isin(gene, members)
            leader = members[np.argmax(active[:, members], axis=1)]
            changed[np.ix_(led, members)] = indices[rows, leader][led, None]
            changed[np.ix_(named, members)] = value[named, None]
        return self.canonical(changed)

    # -- landmarks ----------------------------------------------------------------------------------------------------
    def uniform(
        self,
        bits: str,
        weight_form: tuple[Granularity, bool] = (PerChannel(), True),
        input_form: tuple[Granularity, bool] = (PerTensor(), True),
    ) -> SubnetConfig:
        """The largest architecture at uniform bits, e.g. `w4a4`: pinned layers stay pinned.

        A dimension that lacks these bits, in a space where others have them, takes the nearest it has.

        Raises:
            ValueError: `bits` is not of the form wXaY, or no dimension offers them.
        """
        match = re.fullmatch(r"w(\d+)a(\d+)", bits)
        if not match:
            raise ValueError(f"uniform bits are written wXaY, e.g. w4a4; got {bits!r}")
        wanted = {"weight": int(match[1]), "input": int(match[2])}
        forms: dict[str, tuple[Granularity, bool]] = {"weight": weight_form, "input": input_form}
        row = np.zeros(len(self), dtype=np.int64)
        for kind, number in wanted.items():
            offered = {
                magnitude(c) for d in self.dimensions if d.quantizes and d.name.endswith(kind) for c in d.choices
            }
            if number not in offered:
                raise ValueError(
                    f"{bits} asks for {number}-bit {kind}s, this space offers {sorted(offered)}; choose one of these"
                )
        for i, d in enumerate(self.dimensions):
            kind = d.name.rpartition(".")[2]
            row[i] = self._nearest(i, wanted.get(kind), forms.get(kind))
        return self.config(row)

    def _nearest(self, i: int, number: int | None, form: tuple[Granularity, bool] | None) -> int:
        """Admissible choice nearest to `number` (None: the largest), preferably of `form`."""
        choices = self.dimensions[i].choices
        target = max(magnitude(c) for c in choices) if number is None else number

        def distance(k: int) -> tuple[int, bool, int]:
            choice = choices[k]
            return abs(magnitude(choice) - target), isinstance(choice, QuantConfig) and choice.form != form, k

        return min(np.flatnonzero(self.admissible[i]).tolist(), key=distance)

    def extreme(self, sign: int) -> SubnetConfig:
        """The subnet with the smallest (sign -1) or largest (sign 1) choice of every gene, in the usual form."""
        forms: dict[str, tuple[Granularity, bool]] = {"weight": (PerChannel(), True), "input": (PerTensor(), True)}
        row = [
            self._nearest(i, sign * 10**6, forms.get(d.name.rpartition(".")[2])) for i, d in enumerate(self.dimensions)
        ]
        return self.config(row)

    def smallest(self) -> SubnetConfig:
        """The subnet of fewest bits and least depth."""
        return self.extreme(-1)

    def largest(self) -> SubnetConfig:
        """The subnet of most bits and greatest depth."""
        return self.extreme(1)

    # -- views --------------------------------------------------------------------------------------------------------
    def restrict(self, allowed: Mapping[str, Rule]) -> SearchSpace:
        """A view in which dimensions whose name matches a pattern admit fewer choices.

        Args:
            allowed: pattern (shell style, e.g. `*.weight`) -> the allowed choices, or a function that says of a choice
                whether it is.

        Raises:
            ValueError: a pattern matches nothing, or a dimension is left without a choice.
        """
        view = self._view()
        masks = list(self.admissible)
        for pattern, rule in allowed.items():
            hits = fnmatch.filter(self.position, pattern)
            if not hits:
                raise ValueError(f"no dimension matches {pattern!r}; there are {_few(self.position)}")
            for name in hits:
                i = self.position[name]
                d = self.dimensions[i]
                keep = np.array([rule(c) if callable(rule) else c in rule for c in d.choices])
                masks[i] = masks[i] & keep
                if not masks[i].any():
                    raise ValueError(f"{pattern!r} leaves {name} without a choice; it has {_few(d.choices)}")
        view.admissible = tuple(masks)
        for group in view.ties:
            view._share(group)
        return view

    def pin(self, choices: Mapping[str, Choice]) -> SearchSpace:
        """A view in which each dimension that matches a pattern has exactly the given choice."""
        return self.restrict({pattern: (choice,) for pattern, choice in choices.items()})

    def tie(self, groups: Iterable[Sequence[str]]) -> SearchSpace:
        """A view in which the dimensions of each group always take the same choice.

        Args:
            groups: each a sequence of names or patterns; what they match is one group.

        Raises:
            ValueError: members with different choices, fewer than two members, or a dimension in two groups.
        """
        view = self._view()
        for patterns in groups:
            group = sorted({self.position[name] for p in patterns for name in fnmatch.filter(self.position, p)})
            names = _few(self.dimensions[i].name for i in group)
            if len(group) < 2:
                raise ValueError(f"a tie needs two or more dimensions, {list(patterns)} matches {names or 'none'}")
            if len({self.dimensions[i].choices for i in group}) > 1:
                raise ValueError(f"tied dimensions need the same choices, these differ: {names}")
            if any(set(group) & set(other) for other in view.ties):
                raise ValueError(f"a dimension can be in one tie only: {names}")
            view.ties = (*view.ties, tuple(group))
            view._share(tuple(group))
        return view

    def _share(self, group: tuple[int, ...]) -> None:
        """Leave tied dimensions the admissible choices that they have in common."""
        common = np.logical_and.reduce([self.admissible[i] for i in group])
        if not common.any():
            names = _few(self.dimensions[i].name for i in group)
            raise ValueError(f"tied dimensions have no admissible choice in common: {names}")
        self.admissible = tuple(common if i in group else mask for i, mask in enumerate(self.admissible))

    def _view(self) -> SearchSpace:
        view = SearchSpace(self.dimensions)
        view.admissible, view.ties = self.admissible, self.ties
        return view

    # -- for predictors and files -------------------------------------------------------------------------------------
    def features(self, indices: Indices) -> NDArray[np.float32]:
        """[n, f] numbers in 0..1 that describe the rows: 5 for each quantized tensor, 2 for each other dimension.

        Quantized: active, bits / 8, noise 4^(2 - bits) (the variance of rounding falls fourfold with each bit),
        per-channel, symmetric. Architecture: active, choice / largest choice. All are 0 where inactive.
        """
        indices = np.asarray(indices)
        active = self.active(indices)
        columns = [dimension_numbers(d)[indices[:, i]] * active[:, i, None] for i, d in enumerate(self.dimensions)]
        return np.concatenate([np.zeros((len(indices), 0)), *columns], axis=1).astype(np.float32)

    def plain(self) -> dict[str, Any]:
        """Dimensions, fingerprint and view as JSON holds them (space.json)."""
        return {
            "fingerprint": self.fingerprint,
            "dimensions": [dict(zip(("name", "choices", "active_if"), d, strict=True)) for d in self._plain()],
            "admissible": [mask.tolist() for mask in self.admissible],
            "ties": [list(group) for group in self.ties],
        }

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits; equal for spaces with the same dimensions, whatever the view."""
        return hashlib.sha256(json.dumps(self._plain(), sort_keys=True).encode()).hexdigest()[:16]

    def _plain(self) -> list[list[Any]]:
        """Name, choices and conditions of each dimension."""
        return [
            [d.name, [plain(c) for c in d.choices], [[n, [plain(c) for c in a]] for n, a in d.active_if]]
            for d in self.dimensions
        ]


def _same_form(a: Choice, b: Choice) -> bool:
    return not isinstance(a, QuantConfig) or not isinstance(b, QuantConfig) or a.form == b.form


def dimension_numbers(dimension: Dimension) -> NDArray[np.float64]:
    """[choices, numbers] of one dimension in `SearchSpace.features`."""
    if dimension.quantizes:
        quantized = [c for c in dimension.choices if isinstance(c, QuantConfig)]
        forms = [[isinstance(c.granularity, PerChannel), c.symmetric] for c in quantized]
        return np.array([[1.0, c.bits / 8, 4.0 ** (2 - c.bits), *f] for c, f in zip(quantized, forms, strict=True)])
    numbers = np.array([magnitude(c) for c in dimension.choices], dtype=float)
    return np.stack([np.ones_like(numbers), numbers / numbers.max()], axis=1)


def _few(names: Iterable[Any], most: int = 6) -> str:
    listed = [str(n) for n in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
