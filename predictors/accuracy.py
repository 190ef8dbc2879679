"""What a subnet will be worth, learned from measured ones; and how good such a prediction is at equal cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from supernet.config import QuantConfig
from supernet.cost import Costs, Factors
from supernet.interfaces import Predictor
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]
CHECK_EVERY, PATIENCE = 5, 20
"""Steps between two looks at what each member has not seen, and how many looks without a gain end the training."""
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Penalties that ridge regression chooses from; inputs and scores are standardised."""


class Measured(Protocol):
    """Subnets [n, d] and what was measured of them, as `predictors.pairs.Pairs` holds them."""

    @property
    def indices(self) -> Indices: ...
    @property
    def scores(self) -> Table: ...
    @property
    def halves(self) -> Table: ...
    @property
    def costs(self) -> dict[str, Table]: ...


class Ensemble:
    """Perceptrons of equal shape, each trained without a random part of the pairs; mean and spread of their outputs.

    Inputs are `SearchSpace.features`, the log of some costs and of the additive sensitivity, if there is one.
    Scores are standardised, so outputs are in units around their mean. A linear path beside the hidden layers
    starts from ridge regression, since most of what bits do is additive; then all of it is trained with Adam (1e-3
    as in OFA, Cai et al., ICLR 2020; weight decay 1e-2 in place of its 1e-4, which ranks better with a few hundred
    pairs), and every member stops where the error on what it has not seen was smallest.

    The standard deviation is c * sqrt(spread^2 + mean spread^2). c makes the squared standardised error of the
    pairs average 1, each predicted only by those members that have not seen it.

    Args:
        space: what is predicted.
        costs: its costs, needed where `cost_features` names some.
        sensitivity: additive quality cost, or None; the log of its value is one more input.
        rng: draws the start and the parts; None: one seeded with 0.
        members: number of perceptrons, at least 2.
        hidden: width of both hidden layers.
        steps: most training steps, each over all pairs.
        unseen: share of the pairs that each member does not see, in (0, 1).
        learning_rate, weight_decay: of Adam.
        cost_features: kinds of cost whose log is an input; None: BitOps and bytes, if there are costs.

    Raises:
        ValueError: an option out of range, or cost features without costs.
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
        cost_features: Sequence[str] | None = None,
    ) -> None:
        if members < 2 or min(hidden, steps) < 1 or not 0 < unseen < 1:
            raise ValueError(
                "an ensemble has members >= 2, hidden >= 1, steps >= 1 and unseen in (0, 1); "
                f"got {members}, {hidden}, {steps}, {unseen}"
            )
        kinds = costs.kinds if costs else {}
        wanted = [k for k in ("bitops", "bytes") if k in kinds] if cost_features is None else list(cost_features)
        unknown = [kind for kind in wanted if kind not in kinds]
        if unknown:
            raise ValueError(
                f"no cost {unknown[0]!r} to learn from; pass the space's costs, or choose of {list(kinds)}"
            )
        self.space, self.sensitivity, self.rng = space, sensitivity, rng or np.random.default_rng(0)
        self.factors = {kind: kinds[kind] for kind in wanted}
        self.options: dict[str, Any] = {
            "members": members,
            "hidden": hidden,
            "steps": steps,
            "unseen": unseen,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "cost_features": list(self.factors),
        }
        self.tensors: dict[str, Tensor] = {}

    def inputs(self, indices: Indices) -> Float[Tensor, "n f"]:
        """[n, f] features of canonical rows, before standardisation."""
        extra = [np.log(np.maximum(f.value(indices), 1e-12)) for f in self.factors.values()]
        if self.sensitivity is not None:
            extra.append(np.log(np.maximum(self.sensitivity.value(indices), 1e-12)))
        return torch.from_numpy(np.column_stack([self.space.features(indices), *extra]).astype(np.float32))

    def fit(self, indices: Indices, scores: Table) -> None:
        """Learn from scores [n] of rows [n, d]; n must be at least 8.

        Raises:
            ValueError: too few pairs, or scores that are not finite.
        """
        if len(scores) < 8 or not np.isfinite(scores).all():
            raise ValueError(f"a predictor learns from 8 or more finite scores, got {len(scores)}; collect more pairs")
        x, y = self.inputs(indices), torch.from_numpy(np.asarray(scores, dtype=np.float32))
        self.tensors = {
            "x_mean": x.mean(0),
            "x_std": torch.where(x.std(0) > 1e-6, x.std(0), torch.ones(())),
            "y_mean": y.mean(),
            "y_std": y.std().clamp_min(1e-6),
            "floor": torch.zeros(()),
            "stretch": torch.ones(()),
        }
        unseen = self._unseen(len(y))
        self.tensors |= self._trained(self._standardised(x), (y - y.mean()) / self.tensors["y_std"], unseen)
        self._calibrate(x, y, unseen)

    def _unseen(self, n: int) -> Tensor:
        """[members, n] which pairs each member does not see; every pair is unseen by at least one."""
        members = self.options["members"]
        count = max(1, min(n - 4, round(self.options["unseen"] * n)))
        masks = np.zeros((members, n), dtype=bool)
        for mask in masks:
            mask[self.rng.permutation(n)[:count]] = True
        orphans = np.flatnonzero(~masks.any(0))
        masks[self.rng.integers(members, size=len(orphans)), orphans] = True
        return torch.from_numpy(masks)

    def _trained(self, x: Tensor, y: Tensor, unseen: Tensor) -> dict[str, Tensor]:
        """Weights of all members, trained side by side, each as it was when it did best on what it had not seen."""
        weights = {name: w.requires_grad_() for name, w in self._start(x, y, unseen).items()}
        optimizer = torch.optim.Adam(
            weights.values(), lr=self.options["learning_rate"], weight_decay=self.options["weight_decay"]
        )
        seen, unseen = (~unseen).float(), unseen.float()
        best = {name: w.detach().clone() for name, w in weights.items()}
        least, last_gain = torch.full((len(seen),), torch.inf), 0
        for step in range(self.options["steps"]):
            error = (_forward(weights, x) - y).square()
            if step % CHECK_EVERY == 0:
                held = (error.detach() * unseen).sum(1) / unseen.sum(1)
                better = held < least
                least = torch.where(better, held, least)
                last_gain = step if better.any() else last_gain
                for name, w in weights.items():
                    best[name][better] = w.detach()[better]
            if step - last_gain > CHECK_EVERY * PATIENCE:
                break
            optimizer.zero_grad()
            ((error * seen).sum(1) / seen.sum(1)).sum().backward()
            optimizer.step()
        return {name: w.clone(memory_format=torch.contiguous_format) for name, w in best.items()}

    def _start(self, x: Tensor, y: Tensor, unseen: Tensor) -> dict[str, Tensor]:
        """Kaiming-normal hidden layers, a last layer of zeros, and ridge regression in the linear path."""
        m, h, features = self.options["members"], self.options["hidden"], x.shape[1]

        def normal(rows: int, columns: int) -> Tensor:
            drawn = self.rng.standard_normal((m, rows, columns)) * np.sqrt(2 / rows)
            return torch.from_numpy(drawn.astype(np.float32))

        return {
            "w1": normal(features, h),
            "b1": torch.zeros(m, 1, h),
            "w2": normal(h, h),
            "b2": torch.zeros(m, 1, h),
            "w3": torch.zeros(m, h, 1),
            "b3": torch.zeros(m, 1, 1),
            "linear": ridge(x, y, unseen),
        }

    def _calibrate(self, x: Tensor, y: Tensor, unseen: Tensor) -> None:
        outputs = self._outputs(x)
        spread = outputs.std(0)
        self.tensors["floor"] = spread.square().mean()
        honest = (outputs * unseen).sum(0) / unseen.sum(0)
        ratio = (y - honest).square() / (spread.square() + self.tensors["floor"]).clamp_min(1e-12)
        self.tensors["stretch"] = ratio.mean().sqrt()

    def _standardised(self, x: Tensor) -> Tensor:
        return (x - self.tensors["x_mean"]) / self.tensors["x_std"]

    @torch.no_grad()
    def _outputs(self, x: Tensor) -> Tensor:
        """[members, n] predicted scores."""
        return _forward(self.tensors, self._standardised(x)) * self.tensors["y_std"] + self.tensors["y_mean"]

    def predict(self, indices: Indices) -> tuple[Table, Table]:
        """Mean [n] and standard deviation [n] of the score of rows [n, d]."""
        if "w1" not in self.tensors:
            raise ValueError("this predictor has learned nothing yet; call fit with measured pairs, or load one")
        outputs = self._outputs(self.inputs(self.space.canonical(indices)))
        std = self.tensors["stretch"] * (outputs.var(0) + self.tensors["floor"]).sqrt()
        return outputs.mean(0).double().numpy(), std.double().numpy()


def ridge(x: Float[Tensor, "n f"], y: Float[Tensor, " n"], unseen: Tensor) -> Float[Tensor, "m f 1"]:
    """Ridge regression of each member on what it sees; of STRENGTHS, the one that predicts the unseen [m, n] best."""
    seen = (~unseen).double()[..., None]
    x, y = x.double(), y.double()
    gram = torch.einsum("mni,nj->mij", seen * x, x)
    right = torch.einsum("mni,n->mi", seen * x, y)[..., None]
    identity = torch.eye(x.shape[1], dtype=torch.float64)
    tried = [torch.linalg.solve(gram + strength * identity, right) for strength in STRENGTHS]
    errors = [float((((x @ w)[..., 0] - y).square() * unseen).sum()) for w in tried]
    return tried[int(np.argmin(errors))].float()


def _forward(weights: Mapping[str, Tensor], x: Float[Tensor, "n f"]) -> Float[Tensor, "m n"]:
    """Outputs of every member: two hidden layers and a linear path beside them."""
    wide = x.expand(len(weights["w1"]), -1, -1)
    hidden = F.silu(torch.baddbmm(weights["b1"], wide, weights["w1"]))
    hidden = F.silu(torch.baddbmm(weights["b2"], hidden, weights["w2"]))
    return (torch.baddbmm(weights["b3"], hidden, weights["w3"]) + torch.bmm(wide, weights["linear"]))[..., 0]


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


# -- how good a predictor is -------------------------------------------------------------------------------------------


def kendall(scores: Table, predicted: Table) -> float | None:
    """Kendall's tau-b; None where one side is constant or there are fewer than two."""
    tau = float(stats.kendalltau(scores, predicted).statistic) if len(scores) > 1 else float("nan")
    return tau if np.isfinite(tau) else None


def kendall_at_equal_cost(
    scores: Table, predicted: Table, costs: Table, window: float = 0.05
) -> tuple[float | None, int]:
    """Kendall's tau-b over the pairs of points whose costs differ by at most a factor 1 + window; and their number.

    A predictor can rank subnets well by reading their cost alone; a search under a budget compares subnets of one
    cost. None where no such pair is left, or one side ties in all of them.
    """
    i, j = np.triu_indices(len(scores), 1)
    near = np.abs(np.log(costs[i] / costs[j])) <= np.log1p(window)
    i, j = i[near], j[near]
    a, b = np.sign(scores[i] - scores[j]), np.sign(predicted[i] - predicted[j])
    weight = np.sqrt(float((a != 0).sum()) * float((b != 0).sum()))
    return (float((a * b).sum() / weight) if weight else None), len(i)


def ceiling(halves: Table, costs: Table, window: float = 0.05) -> float | None:
    """The tau at equal cost that a perfect predictor would reach, given how well the measurements repeat.

    The two halves of the images agree with some tau; as correlation r = sin(pi tau / 2), Spearman and Brown's 2 r /
    (1 + r) is that of two full measurements, and its root that of one measurement with the truth.
    """
    tau, _ = kendall_at_equal_cost(halves[:, 0], halves[:, 1], costs, window)
    if tau is None or tau <= 0:
        return None
    r = np.sin(np.pi * tau / 2)
    return float(2 / np.pi * np.arcsin(np.sqrt(2 * r / (1 + r))))


def controls(space: SearchSpace, pairs: Measured, kind: str = "bitops") -> dict[str, Table]:
    """What a predictor has to beat: the mean bits of the active tensors, and the cost alone."""
    bits = np.zeros(pairs.indices.shape)
    for i, d in enumerate(space.dimensions):
        if d.quantizes:
            bits[:, i] = np.array([c.bits for c in d.choices if isinstance(c, QuantConfig)])[pairs.indices[:, i]]
    quantizes = np.array([d.quantizes for d in space.dimensions])
    count = (space.active(pairs.indices) & quantizes).sum(1)
    return {
        "mean bits": (bits * space.active(pairs.indices)).sum(1) / np.maximum(count, 1),
        "cost alone": pairs.costs[kind],
    }


def report(
    predictor: Predictor, held_out: Measured, space: SearchSpace, *, kind: str = "bitops", window: float = 0.05
) -> dict[str, Any]:
    """How well held-out pairs are predicted, as JSON holds it.

    Keys: `pairs`, `kendall`, `kendall_equal_cost` (and `pairs_equal_cost`, `window`, `cost`), `ceiling_equal_cost`,
    `share_of_ceiling`, `rmse`, `within_1_std` (0.68 if calibrated), `within_2_std` (0.95), `controls` with the two
    taus of each.
    """
    mean, std = predictor.predict(held_out.indices)
    costs, scores = held_out.costs[kind], held_out.scores
    equal, count = kendall_at_equal_cost(scores, mean, costs, window)
    most = ceiling(held_out.halves, costs, window)
    error = np.abs(scores - mean)
    return {
        "pairs": len(scores),
        "kendall": kendall(scores, mean),
        "kendall_equal_cost": equal,
        "pairs_equal_cost": count,
        "window": window,
        "cost": kind,
        "ceiling_equal_cost": most,
        "share_of_ceiling": equal / most if equal is not None and most else None,
        "rmse": float(np.sqrt(np.mean(error**2))),
        "within_1_std": float(np.mean(error <= std)),
        "within_2_std": float(np.mean(error <= 2 * std)),
        "controls": {
            name: {
                "kendall": kendall(scores, values),
                "kendall_equal_cost": kendall_at_equal_cost(scores, values, costs, window)[0],
            }
            for name, values in controls(space, held_out, kind).items()
        },
    }
