"""Draw the cost, then a subnet of that cost: so that every budget is trained, and not only the average one.

The sum of independent uniform choices is nearly normal and narrow. ShiftNAS (Zhang et al., ICCV 2023,
arXiv:2307.08300) therefore draws a cost target first and shifts its distribution to targets that still learn. Instead
of the paper's LSTM, subnets come from exponential tilting, which needs no training and never collapses to one
architecture per target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from supernet.cost import Costs, Factors, fill, repair
from supernet.space import Indices, SearchSpace, magnitude

Table = NDArray[np.float64]
NEAR = 0.05
"""How far below its target, relative, a row with ties may stay before it is filled."""
FAST, SLOW = 0.1, 0.02
"""Weights of a new loss in the two moving averages of each bin; their difference measures how fast the loss falls."""


class CostFirst:
    """Cost targets log-uniform over what can be reached, choices tilted towards the target.

    With c_l(k) the cost of joint choice k of layer l in the drawn architecture, p_l(k) is proportional to u(k)
    exp(-lambda c_l(k)), where u is uniform over bits and, given the bits, over forms. lambda is solved for each draw:
    the same random numbers are turned into choices at each trial lambda (inverse distribution function, choices
    ordered by cost, so the drawn cost falls with lambda), until the drawn cost is the largest that does not exceed
    the target; what it leaves is spent by raising random layers. Targets above the uniform mean get a negative lambda.
    Where a gene is tied across layers, or no drawn architecture can be so cheap, repair and fill bring the row there.

    Args:
        space: what to draw from; a view is honoured (between tied genes of different layers the tilting is
            approximate).
        costs: the space's costs.
        kind: which cost.
        bins: number of bins of log cost, at least 1.
        adapt: shift the distribution over bins by what `tell` says (ShiftNAS, section 3.3, with two moving averages
            of the loss of each bin in place of a second copy of the weights); False: stay uniform.
        feedback: with `adapt`, which losses are told, `train_loss` or `select_loss`.
        every: with `select_loss`, steps between two tellings.
        floor: with `adapt`, share of draws that stays uniform over bins, 0..1 (the paper has none; then cheap bins
            may starve).

    Raises:
        ValueError: an unknown kind, one that is no sum of lookups, or an option out of range.
    """

    def __init__(
        self,
        space: SearchSpace,
        costs: Costs,
        kind: str = "bitops",
        bins: int = 8,
        adapt: bool = False,
        feedback: Literal["train_loss", "select_loss"] = "train_loss",
        every: int = 100,
        floor: float = 0.3,
    ) -> None:
        if kind not in costs.kinds:
            raise ValueError(f"unknown cost {kind!r}; choose one of {', '.join(tilted(costs))}")
        if kind not in tilted(costs):
            raise ValueError(
                f"{kind} is no sum over layers and cannot be tilted; choose one of {', '.join(tilted(costs))}"
            )
        if not (bins >= 1 and 0 <= floor <= 1 and every >= 1):
            raise ValueError(
                f"bins and every are at least 1, floor lies in [0, 1]; got bins={bins}, every={every}, floor={floor}"
            )
        if feedback not in ("train_loss", "select_loss"):
            raise ValueError(f"feedback is train_loss or select_loss, got {feedback!r}")
        self.space, self.factors = space, tilted(costs)[kind]
        self.kind, self.adapt, self.floor = kind, adapt, floor
        self.feedback: Literal["none", "train_loss", "select_loss"] = feedback if adapt else "none"
        self.every = every
        self._tilt = Tilt(space, self.factors)
        low, high = self.factors.value(np.array([space.smallest().row, space.largest().row], dtype=np.int64))
        self.edges: Table = np.geomspace(max(low, 1e-12), max(high, low, 1e-12), bins + 1)
        self.fast, self.slow = np.full(bins, np.nan), np.full(bins, np.nan)

    def ask(self, n: int, rng: np.random.Generator) -> Indices:
        """[n, d] rows whose costs follow the distribution over bins."""
        k = rng.choice(len(self.probabilities), size=n, p=self.probabilities)
        low, high = np.log(self.edges[k]), np.log(self.edges[k + 1])
        return self.at(np.exp(low + (high - low) * rng.random(n)), rng)

    def at(self, targets: Table, rng: np.random.Generator) -> Indices:
        """[n, d] rows, one for each cost target [n], that cost at most the target and nearly as much.

        Where the space has no such subnet, one near below; below everything reachable, the smallest.
        """
        rows = self._tilt.draw(targets, rng)
        cost = self.factors.value(rows)
        outside = (cost > targets) | (bool(self.space.ties) & (cost < targets * (1 - NEAR)))
        for i in np.flatnonzero(outside):
            limits, kinds = {self.kind: float(targets[i])}, {self.kind: self.factors}
            rows[i : i + 1] = repair(self.space, rows[i : i + 1], limits, kinds, rng)
            rows[i : i + 1] = fill(self.space, rows[i : i + 1], limits, kinds, rng)
        return rows

    @property
    def probabilities(self) -> Table:
        """[bins], of the cost target: more where the loss falls faster (fast average below slow)."""
        n = len(self.fast)
        uniform = np.full(n, 1 / n)
        falling = self.slow - self.fast
        known = np.isfinite(falling)
        if not self.adapt or known.sum() < 2 or falling[known].std() == 0:
            return uniform
        standardised = np.where(known, (falling - falling[known].mean()) / falling[known].std(), 0.0)
        shifted = np.exp(standardised - standardised.max())
        return self.floor * uniform + (1 - self.floor) * shifted / shifted.sum()

    def bin_of(self, indices: Indices) -> NDArray[np.int64]:
        """[n] bin of the cost of rows [n, d]."""
        at = np.searchsorted(self.edges, self.factors.value(indices), side="right") - 1
        return np.clip(at, 0, len(self.fast) - 1)

    def tell(self, indices: Indices, scores: NDArray[np.float64], step: int, total_steps: int) -> None:
        """Update the moving averages of the bins that rows [n, d] with losses [n] fall into."""
        if not self.adapt:
            return
        for k, loss in zip(self.bin_of(indices), scores, strict=True):
            if np.isnan(self.fast[k]):
                self.fast[k] = self.slow[k] = loss
            self.fast[k] += FAST * (loss - self.fast[k])
            self.slow[k] += SLOW * (loss - self.slow[k])

    def state_dict(self) -> dict[str, Any]:
        """The moving averages of each bin."""
        return {"fast": self.fast.tolist(), "slow": self.slow.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        if len(state["fast"]) != len(self.fast):
            raise ValueError(
                f"state has {len(state['fast'])} cost bins, this sampler {len(self.fast)}; set bins to that"
            )
        self.fast, self.slow = np.array(state["fast"], dtype=float), np.array(state["slow"], dtype=float)


def tilted(costs: Costs) -> dict[str, Factors]:
    """The kinds of cost that are sums of lookups, which can be drawn for."""
    return {kind: cost for kind, cost in costs.kinds.items() if isinstance(cost, Factors)}


def drawing(space: SearchSpace, costs: Costs, limits: Mapping[str, float]) -> tuple[CostFirst, float]:
    """A sampler for rows near some limits, and the largest cost that it should be asked for.

    It draws for the first limited kind that can be drawn for. Where none can (a maximum, an average), for the first of
    all that can, up to the largest cost; the rows then have to be brought within the limits.
    """
    can = tilted(costs)
    kind = next((kind for kind in limits if kind in can), next(iter(can)))
    sampler = CostFirst(space, costs, kind=kind)
    return sampler, limits.get(kind, float(sampler.edges[-1]))


class Block:
    """Genes whose joint choice is drawn at once, and what each joint choice costs in each architecture.

    Joint choices of equal cost are one *level*; levels ascend in cost.

    Args:
        space: the space.
        genes: positions of quantized dimensions (of tied ones, the first).
        terms: (positions of architecture dimensions, table [their choices..., joint choices]) of the cost terms over
            these genes.
    """

    def __init__(self, space: SearchSpace, genes: tuple[int, ...], terms: list[tuple[tuple[int, ...], Table]]) -> None:
        self.genes = genes
        self.shape = tuple(len(space.dimensions[g].choices) for g in genes)
        weight = np.ones(self.shape)
        for axis, g in enumerate(genes):
            weight = np.moveaxis(np.moveaxis(weight, axis, -1) * _uniform_bits(space, g), -1, axis)
        joint = weight.size
        stacked = np.concatenate([t.reshape(-1, joint) for _, t in terms] or [np.zeros((1, joint))])
        # What is not admissible must not share a level with what is.
        stacked = np.where(weight.reshape(1, joint) > 0, stacked, stacked.max() + 1)
        _, first, self.level = np.unique(stacked, axis=1, return_index=True, return_inverse=True)
        order = np.argsort(stacked[:, first].sum(0), kind="stable")
        self.level = np.argsort(order)[self.level.ravel()]
        self.terms = [(dims, table[..., first[order]]) for dims, table in terms]
        members = np.zeros((len(first), joint))
        members[self.level, np.arange(joint)] = weight.ravel()
        self.mass = members.sum(1)
        self.within = np.cumsum(members, axis=1)  # unnormalised distribution function inside each level

    def costs(self, indices: Indices) -> Table:
        """[n, levels] cost of each level in the architectures of rows [n, d]."""
        total = np.zeros((len(indices), len(self.mass)))
        for dims, table in self.terms:
            total += table[tuple(indices[:, i] for i in dims)] if dims else table
        return total

    def choices(self, level: NDArray[np.int64], uniform: Table) -> tuple[NDArray[np.int64], ...]:
        """Choice [n] of each gene, given the level [n] and random numbers [n] in 0..1."""
        cumulated = self.within[level]
        joint = (cumulated <= uniform[:, None] * cumulated[:, -1:]).sum(1)
        return np.unravel_index(joint, self.shape) if self.genes else ()


class Tilt:
    """Draws rows of given cost: architecture first, then the choices of each block, tilted.

    Args:
        space: what to draw from.
        factors: the cost.
    """

    def __init__(self, space: SearchSpace, factors: Factors) -> None:
        self.space = space
        first = {i: min(group) for group in space.ties for i in group}
        self.members = {min(group): group for group in space.ties}
        grouped: dict[tuple[int, ...], list[tuple[tuple[int, ...], Table]]] = {}
        for dims, table in factors.terms:
            genes, term = _arranged(space, dims, table, first)
            grouped.setdefault(genes, []).append(term)
        covered = {g for genes in grouped for g in genes}
        for i, d in enumerate(space.dimensions):
            if d.quantizes and first.get(i, i) not in covered:
                covered.add(first.get(i, i))
                grouped[(first.get(i, i),)] = []
        self.blocks = [Block(space, genes, terms) for genes, terms in grouped.items()]
        widest = max((len(b.mass) for b in self.blocks), default=1)
        self.mass = np.stack([np.pad(b.mass, (0, widest - len(b.mass))) for b in self.blocks])
        self.up = np.tile(np.arange(widest), (len(self.blocks), 1))  # next admissible level
        for b, mass in enumerate(self.mass):
            good = np.flatnonzero(mass)
            self.up[b, good[:-1]] = good[1:]
        self.ends = np.array([space.smallest().row, space.largest().row], dtype=np.int64)
        self.elastic = any(not d.quantizes and space.admissible[i].sum() > 1 for i, d in enumerate(space.dimensions))

    def costs(self, indices: Indices) -> Table:
        """[n, blocks, levels] in the architectures of rows [n, d]; beyond a block's last level, that level again."""
        out = np.zeros((len(indices), *self.mass.shape))
        for b, block in enumerate(self.blocks):
            levels = block.costs(indices)
            out[:, b, : levels.shape[1]] = levels
            out[:, b, levels.shape[1] :] = levels[:, -1:]
        return out

    def draw(self, targets: Table, rng: np.random.Generator) -> Indices:
        """[n, d] rows that cost nearly, and at most, `targets` [n]; else the cheapest of their architecture."""
        rows = self.architectures(targets, rng)
        costs = self.costs(rows)
        u = rng.random(costs.shape[:2])
        level = self.spend(costs, self.solve(costs, targets, u), targets, rng)
        for b, block in enumerate(self.blocks):
            drawn = block.choices(level[:, b], rng.random(len(rows)))
            for gene, choice in zip(block.genes, drawn, strict=True):
                for i in self.members.get(gene, (gene,)):
                    rows[:, i] = choice
        return self.space.canonical(rows)

    def architectures(self, targets: Table, rng: np.random.Generator, tries: int = 8) -> Indices:
        """[n, d] rows with drawn architectures in which the targets can be met; the nearest where no try can."""
        n = len(targets)
        if not self.elastic:
            return np.tile(self.ends[1], (n, 1))
        rows = np.concatenate([self.space.sample_indices(n * tries, rng), np.repeat(self.ends, n, axis=0)])
        costs = self.costs(rows)
        low = np.where(self.mass > 0, costs, np.inf).min(2).sum(1)
        high = np.where(self.mass > 0, costs, -np.inf).max(2).sum(1)
        wanted = np.tile(targets, tries + 2)
        miss = np.maximum(np.maximum(low - wanted, wanted - high), 0.0).reshape(tries + 2, n)
        return rows[np.argmin(miss, axis=0) * n + np.arange(n)]

    def solve(self, costs: Table, targets: Table, u: Table, rounds: int = 48) -> NDArray[np.int64]:
        """[n, blocks] levels, drawn with the smallest multiplier (by bisection) that keeps within the target."""
        with np.errstate(divide="ignore"):
            log_mass = np.log(self.mass)
        unit = np.ptp(costs, axis=2).max(1)[:, None, None]
        unit = np.where(unit > 0, unit, 1.0)  # nothing to tilt
        low, high = np.full(len(targets), -1.0), np.full(len(targets), 1.0)
        best = self._drawn(costs, log_mass, unit, high, u)
        for _ in range(rounds):
            middle = (low + high) / 2
            level = self._drawn(costs, log_mass, unit, middle, u)
            fits = np.take_along_axis(costs, level[..., None], axis=2)[..., 0].sum(1) <= targets
            best[fits] = level[fits]
            low, high = np.where(fits, low, middle), np.where(fits, middle, high)
        return best

    def spend(
        self, costs: Table, level: NDArray[np.int64], targets: Table, rng: np.random.Generator, sweeps: int = 2
    ) -> NDArray[np.int64]:
        """[n, blocks] levels raised one by one, blocks in random order, where the target leaves room."""
        n = np.arange(len(level))
        drawn = np.take_along_axis(costs, level[..., None], axis=2)[..., 0]
        for turn in np.tile(rng.permuted(np.tile(np.arange(level.shape[1]), (len(level), 1)), axis=1), sweeps).T:
            higher = self.up[turn, level[n, turn]]
            dearer = costs[n, turn, higher]
            fits = drawn.sum(1) - drawn[n, turn] + dearer <= targets
            level[n, turn] = np.where(fits, higher, level[n, turn])
            drawn[n, turn] = np.where(fits, dearer, drawn[n, turn])
        return level

    @staticmethod
    def _drawn(costs: Table, log_mass: Table, unit: Table, t: Table, u: Table) -> NDArray[np.int64]:
        """[n, blocks] levels at multiplier sign(t) (e^(20 |t|) - 1) over the dearest block's span, t in -1..1."""
        multiplier = (np.sign(t) * np.expm1(20 * np.abs(t)))[:, None, None] / unit
        logits = log_mass - multiplier * costs
        weights = np.exp(logits - logits.max(2, keepdims=True))
        cumulated = np.cumsum(weights, axis=2)
        return (cumulated <= u[..., None] * cumulated[..., -1:]).sum(2)


def _uniform_bits(space: SearchSpace, gene: int) -> Table:
    """Probability of each choice: uniform over admissible bits, then over the admissible forms of those bits."""
    bits = np.array([magnitude(c) for c in space.dimensions[gene].choices])
    mask = space.admissible[gene]
    forms = np.array([np.sum(mask & (bits == b)) for b in bits])
    weight = np.where(mask, 1 / np.maximum(forms, 1), 0.0)
    return weight / weight.sum()


def _arranged(
    space: SearchSpace, dims: tuple[int, ...], table: Table, first: dict[int, int]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], Table]]:
    """A cost term as (quantized genes, (architecture dimensions, table with the joint quantized choices last))."""
    quantized = [a for a, i in enumerate(dims) if space.dimensions[i].quantizes]
    others = [a for a, i in enumerate(dims) if not space.dimensions[i].quantizes]
    genes = tuple(first.get(dims[a], dims[a]) for a in quantized)
    arranged = np.transpose(table, [*others, *quantized]).reshape(*(table.shape[a] for a in others), -1)
    return genes, (tuple(dims[a] for a in others), np.ascontiguousarray(arranged))
