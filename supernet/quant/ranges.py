"""Start values of scales and zero-points: the range that loses least, for every choice at once.

EQ-Net shrinks the range step by step and measures sum |x - x^|^2.4, one choice after the other (131 s for a ResNet-20).
Here a row of data is represented by weighted order statistics, and 13 of SHRINK shrink factors are measured, from
coarse to fine. That finds the best where the error has one minimum. Rounding can give it more, and then the best of
another may be missed; tests/unit/quant/test_ranges.py says how much that costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

NORM = 2.4
SHRINK = 32
LOWEST = 0.15
COARSE, FINER = 4, (2, 1)
TAIL = 8
ELEMENTS = 1 << 18
"""What is measured at once; larger tensors leave the cache."""


def order_statistics(rows: Float[Tensor, "r m"], most: int) -> tuple[Float[Tensor, "r k"], Float[Tensor, " k"]]:
    """Order statistics that stand for each row, and the share of the row that each of them stands for.

    Ranks are cut into about `most` equal cells, but near both ends no cell is wider than a TAIL-th of its distance from
    the end; each is represented by its middle rank. So minimum and maximum are among the values with the weight of one
    value, not of a cell, which would forbid to clip them (at 8 bits, ranges found with equal weights had up to 1.15
    times the least error on a ViT's weights), and the tails, where values far apart share a cell, are finer.
    """
    count = rows.shape[1]
    assert most >= 4 * TAIL
    if count <= most:
        return rows, torch.full((count,), 1 / count, device=rows.device)
    tail = _tail(count / most)
    within = count - 2 * tail[-1]
    middle = np.linspace(0, within, max(1, round(within * most / count)) + 1).round().astype(np.int64)[1:-1] + tail[-1]
    edges = np.array([*tail, *middle, *(count - end for end in reversed(tail))])
    at, sizes = (edges[:-1] + edges[1:] - 1) // 2, np.diff(edges)
    values = _sorted(rows)[:, torch.from_numpy(at).to(rows.device)]
    return values, torch.from_numpy((sizes / count).astype(np.float32)).to(rows.device)


def _tail(width: float) -> list[int]:
    """Distances from the end of a row between which cells are narrower than `width`: 0, 1, 2 ... TAIL * width."""
    edges = [0]
    while edges[-1] < TAIL * width:
        edges.append(edges[-1] + max(1, min(edges[-1] // TAIL, int(width))))
    return edges


def _sorted(rows: Tensor) -> Tensor:
    """Each row in ascending order; numpy's vectorised sort takes a tenth of torch's time."""
    if rows.device.type != "cpu":
        return rows.sort(dim=1).values
    return torch.from_numpy(np.sort(rows.numpy(), axis=1))


def start_values(
    rows: Float[Tensor, "r m"],
    low: Sequence[float],
    high: Sequence[float],
    symmetric: Sequence[bool],
    unsigned: bool,
    levels: Sequence[Float[Tensor, " l"] | None] | None = None,
    weights: Float[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "k r"], Float[Tensor, "k r"]]:
    """Scale and zero-point of each row for each of k choices, by least |x - x^|^2.4 over a grid of shrunken ranges.

    Args:
        rows: data, each row with a scale of its own.
        low, high, symmetric: smallest and largest code of each choice, and whether its zero-point is fixed at 0.
        unsigned: the data is never negative, and codes start at 0.
        levels: of each choice, ascending; None: all integers from low to high.
        weights: share of each column in the error, the same for all rows; None: equal ones.

    Returns:
        scale [k, r] > 0 and integer zero-point [k, r]. A row of zeros gets scale 1.
    """
    levels = levels or [None] * len(low)
    limits = torch.tensor([list(low), list(high), [float(s) for s in symmetric]], device=rows.device)
    weights = rows.new_full(rows.shape[1:], 1 / rows.shape[1]) if weights is None else weights
    scale, zero = _candidates(rows, limits, unsigned)
    integer = [k for k, grid in enumerate(levels) if grid is None]
    found = torch.stack([scale[:, 0], zero[:, 0]], 1)
    for these, grid in [(integer, None), *(([k], grid) for k, grid in enumerate(levels) if grid is not None)]:
        if these:
            found[these] = _least(rows, weights, scale[these], zero[these], limits[:2, these], grid)
    empty = (rows == 0).all(1)
    return torch.where(empty, 1.0, found[:, 0]), torch.where(empty, 0.0, found[:, 1])


def _candidates(
    rows: Float[Tensor, "r m"], limits: Float[Tensor, "3 k"], unsigned: bool
) -> tuple[Float[Tensor, "k g r"], Float[Tensor, "k g r"]]:
    """Scale and zero-point of every shrunken range; a row of zeros has the range 0..1."""
    low, high, symmetric = (limit[:, None, None] for limit in limits)
    least, most = rows.amin(1).clamp(max=0.0), rows.amax(1).clamp(min=0.0)
    most = torch.where(most > least, most, 1.0)
    shrink = torch.linspace(1.0, LOWEST, SHRINK, device=rows.device, dtype=rows.dtype)[:, None]
    around_zero = (symmetric > 0) & (not unsigned)
    span = torch.where(around_zero, 2 * torch.maximum(most, -least), most - least)
    scale = (shrink * span / (high - low)).clamp_min(torch.finfo(rows.dtype).tiny)
    zero = torch.clamp(low - torch.round(shrink * least / scale), low, high)
    return scale, torch.where(symmetric > 0, 0.0, zero)


def _least(
    rows: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, limits: Float[Tensor, "2 k"], levels: Tensor | None
) -> Float[Tensor, "k 2 r"]:
    """The candidate of least error of each choice and row: the best of every fourth, then of its neighbours."""

    def measured(at: Tensor) -> Tensor:
        return _errors(rows, weights, scale.gather(1, at), zero.gather(1, at), limits, levels)

    def best(at: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        least = errors.argmin(1, keepdim=True)
        return at.gather(1, least), errors.gather(1, least)

    coarse = torch.tensor([*range(0, SHRINK - 1, COARSE), SHRINK - 1], device=rows.device)
    at = coarse[:, None].expand(scale.shape[0], -1, scale.shape[2])
    at, errors = best(at, measured(at))
    for distance in FINER:
        near = torch.cat([at - distance, at + distance], 1).clamp(0, SHRINK - 1)
        at, errors = best(torch.cat([at, near], 1), torch.cat([errors, measured(near)], 1))
    return torch.cat([scale.gather(1, at), zero.gather(1, at)], 1)


def _errors(
    rows: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, limits: Float[Tensor, "2 k"], levels: Tensor | None
) -> Float[Tensor, "k g r"]:
    """Weighted sum of |x - x^|^2.4 for each choice, candidate and row, in slices that fit into the cache."""
    choices, candidates, count = scale.shape
    together = max(1, ELEMENTS // (candidates * rows.numel()))
    each = max(1, min(count, ELEMENTS // (candidates * rows.shape[1])))
    low, high = (limit[:, None, None, None] for limit in limits)
    out = torch.empty_like(scale)
    for k in range(0, choices, together):
        for r in range(0, count, each):
            at = (slice(k, k + together), slice(None), slice(r, r + each))
            s, z, some = scale[at][..., None], zero[at][..., None], rows[at[2]]
            codes = some / s
            if levels is None:
                codes.round_().add_(z)
                torch.maximum(codes, low[at[0]], out=codes)  # clamp with tensors takes five times as long
                torch.minimum(codes, high[at[0]], out=codes)
            else:
                codes = levels[torch.bucketize(codes, (levels[1:] + levels[:-1]) / 2)]
            difference = codes.sub_(z).mul_(s).sub_(some).abs_()
            out[at] = difference.log_().mul_(NORM).exp_() @ weights  # pow takes four times as long; exp(log(0)) is 0
    return out
