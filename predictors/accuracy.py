"""What a subnet will be worth, learned from measured ones: a falling curve of its error, a correction, and effects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from predictors.effects import blend, effects
from predictors.encoding import described
from predictors.judging import Measured
from predictors.members import Members, descend, layers, standard, through
from predictors.noise import Terms, logarithm, sums
from supernet.cost import Costs, Factors
from supernet.space import Indices, SearchSpace

CHUNK = 4096
"""Rows predicted at once; what lies between two layers then fits a processor's cache."""
LAYERS = 3


class Ensemble(Members):
    """Members that each see another part of the pairs: a falling curve of a weighed error + a correction, and effects.

    The error of a subnet is sum_t w_t T_t over the terms of the additive sensitivity, or of the variance of rounding
    where there is none. The sensitivity was measured on one layer at a time before any training; what its terms are
    worth is learned: log w = a_t (each term's own) + g . traits (shared by all weights, or all inputs, of equal bits
    or form) + d (each table entry's own). All start at 0 and are pulled back to it, so with few pairs the order is
    the sensitivity's. A logistic curve of log error gives the score: a plateau at full accuracy, one at chance.

    What is left is the part of two hidden layers over `SearchSpace.features` (Adam 1e-3 as in OFA, Cai et al., ICLR
    2020). Their output starts at 0 and every member keeps the weights that were best on what it had not seen, so a
    correction that does not generalise is none.

    Beside that stands a regression with a free effect for every choice of every gene (`predictors.effects`). It knows
    nothing of sensitivities or bits, so it needs many pairs, and errs where the other does not. The score is a blend of
    both, in the proportion that fits best what the members have not seen.

    Costs are no inputs: at equal cost they say nothing, and the fit over all costs gave them signs that ranked subnets
    of one cost wrongly.

    Args:
        space: what is predicted.
        costs: taken because all predictors are constructed alike.
        sensitivity: additive quality cost, or None.
        rng: draws the start and the parts; None: one seeded with 0.
        members: number of learners, at least 2.
        hidden: width of both hidden layers.
        steps: most training steps of the curve, and of the correction, each over all pairs.
        unseen: share of the pairs that each member does not see, in (0, 1).
        learning_rate, weight_decay: of the correction.
        pull: how strongly log weights are pulled to 0, in units of squared standardised error over one pair.
        ridge: how strongly effects are pulled to 0, in the same units.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        space: SearchSpace,
        costs: Costs | None = None,
        sensitivity: Factors | None = None,
        rng: np.random.Generator | None = None,
        members: int = 8,
        hidden: int = 32,
        steps: int = 600,
        unseen: float = 0.2,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        pull: float = 0.1,
        ridge: float = 10.0,
    ) -> None:
        del costs
        if min(hidden, steps) < 1 or not pull >= 0 or not ridge > 0:
            raise ValueError(
                "hidden and steps are at least 1, pull at least 0 and ridge above 0; "
                f"got {hidden}, {steps}, {pull} and {ridge}"
            )
        own = {"hidden": hidden, "steps": steps, "learning_rate": learning_rate, "weight_decay": weight_decay}
        super().__init__(space, sensitivity, rng, members, unseen, own | {"pull": pull, "ridge": ridge})
        self.inputs = described(space)
        self.terms = Terms(space, sensitivity, self.inputs)
        self.encoding = self.inputs.digest
        self._made: tuple[Tensor, Tensor] | None = None

    def _learned(self, indices: Indices, y: Float[Tensor, " n"], unseen: Tensor) -> dict[str, Tensor]:
        rows, genes = self.inputs.read(indices)
        codes = torch.cat([genes, self.terms.codes(rows)], dim=1)
        known = self._curve(codes, y, unseen)
        x = self.inputs.features(genes)
        known |= standard(x)
        base = falling(logarithm(sums(codes, len(known["entries"]))(known["entries"])), known["curve"])
        wide = ((x - known["x_mean"]) / known["x_std"]).expand(self.options["members"], -1, -1)
        h = self.options["hidden"]
        weights = layers(self.options["members"], (self.inputs.width, h, h, 1), self.rng, silent=True)
        optimizer = torch.optim.Adam(
            [w.requires_grad_() for w in weights.values()],
            lr=self.options["learning_rate"],
            weight_decay=self.options["weight_decay"],
            fused=True,
        )

        def output(w: Mapping[str, Tensor] = weights) -> Tensor:
            return base + through(w, torch.baddbmm(w["b1"], wide, w["w1"]), LAYERS)

        known |= (best := descend(weights, output, y, unseen, optimizer, self.options["steps"]))
        known |= (free := effects(genes, y, unseen, self.terms.single, self.options["ridge"]))
        summed = sums(genes, self.terms.single)(free["effects"]).T + free["level"][:, None]
        return known | {"blend": blend(output(best), summed, y, unseen)}

    def _curve(self, codes: Tensor, y: Float[Tensor, " n"], unseen: Tensor) -> dict[str, Tensor]:
        """`entries` [rows, members], the weighed tables, and `curve` [members, 4]."""
        terms, members = self.terms, self.options["members"]
        unit = terms.values / terms.values.mean().clamp_min(1e-12)
        summed = sums(codes, len(unit))
        start = guess(logarithm(summed(unit[:, None]))[0], y)
        weights = {
            "own": torch.zeros(members, terms.count),
            "shared": torch.zeros(members, terms.traits.shape[1]),
            "entry": torch.zeros(members, len(unit)),
            "curve": start.repeat(members, 1),
        }
        optimizer = torch.optim.Adam([w.requires_grad_() for w in weights.values()], lr=0.02, fused=True)
        strength = self.options["pull"] / (~unseen).float().sum(1)

        def entries(w: Mapping[str, Tensor]) -> Tensor:
            return unit[:, None] * (w["own"][:, terms.owner] + w["shared"] @ terms.traits.T + w["entry"]).T.exp()

        def output() -> Tensor:
            return falling(logarithm(summed(entries(weights))), weights["curve"])

        def penalty() -> Tensor:
            wild = weights["own"].square().sum(1) + weights["shared"].square().sum(1)
            return strength * (wild + 4 * weights["entry"].square().sum(1))

        best = descend(weights, output, y, unseen, optimizer, self.options["steps"], penalty=penalty)
        return {"entries": entries(best), "curve": best["curve"]}

    def _outputs(self, indices: Indices) -> Float[Tensor, "m n"]:
        known, members = self.tensors, self.options["members"]
        table = self._table()
        rows, genes = self.inputs.read(indices)
        joint = self.terms.codes(rows) if len(self.terms.offsets) else None
        found = []
        for k in range(0, len(rows), CHUNK):
            part = genes[k : k + CHUNK]
            summed = torch.nn.functional.embedding_bag(part, table, mode="sum")
            error, free = summed[:, :members], summed[:, members : 2 * members].T + known["level"][:, None]
            first = summed[:, 2 * members :].view(len(part), members, -1).transpose(0, 1)
            if joint is not None:
                error = error + torch.nn.functional.embedding_bag(joint[k : k + CHUNK], known["entries"], mode="sum")
            curve = falling(logarithm(error), known["curve"]) + through(known, first, LAYERS)
            found.append(torch.lerp(curve, free, known["blend"]))
        return torch.cat(found, dim=1)

    def _table(self) -> Tensor:
        """What one look-up of a gene brings: its term and effect for every member, and what their first layers get."""
        known = self.tensors
        if self._made is None or self._made[0] is not known["w1"]:
            first = self.inputs.fold(known["w1"], known["b1"], known["x_mean"], known["x_std"])
            self._made = known["w1"], torch.cat([known["entries"][: self.terms.single], known["effects"], first], dim=1)
        return self._made[1]


def falling(logs: Float[Tensor, "m n"], curve: Float[Tensor, "m 4"]) -> Float[Tensor, "m n"]:
    """Logistic curve of log error: top - drop * sigmoid(rate * (log error - middle)), drop and rate as logarithms."""
    top, drop, middle, rate = curve[..., None].unbind(1)
    return top - drop.exp() * torch.sigmoid(rate.exp() * (logs - middle))


def guess(logs: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, " 4"]:
    """A curve to start from: plateaus a little beyond the scores, slope of the regression line in the middle."""
    spread = logs.std().clamp_min(1e-6)
    slope = ((logs - logs.mean()) * (y - y.mean())).mean() / spread.square()
    drop = 1.5 * (y.max() - y.min()).clamp_min(1e-3)
    rate = (4 * (-slope).clamp_min(0.1 / float(spread)) / drop).clamp(1e-3, 1e3)
    top = y.max() + 0.1 * drop
    # Where the line reaches half of the drop.
    middle = logs.mean() + (y.mean() - (top - drop / 2)) / (rate * drop / 4)
    return torch.stack([top, drop.log(), middle, rate.log()])


def fit_predictor(
    space: SearchSpace,
    pairs: Measured,
    *,
    costs: Costs | None = None,
    sensitivity: Factors | None = None,
    rng: np.random.Generator | None = None,
    **options: Any,
) -> Ensemble:
    """An Ensemble that has learned from all `pairs`; see `Ensemble` for the options."""
    predictor = Ensemble(space, costs, sensitivity, rng, **options)
    predictor.fit(pairs.indices, pairs.scores)
    return predictor
