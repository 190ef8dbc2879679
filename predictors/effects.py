"""What each choice of each gene adds to the score, whatever the others are: ridge regression, in its dual form."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def effects(
    codes: Int[Tensor, "n d"], y: Float[Tensor, " n"], unseen: Bool[Tensor, "m n"], rows: int, ridge: float
) -> dict[str, Tensor]:
    """Least squares with one free number for every choice of every gene, shrunk to 0; of every member.

    Two subnets are as much alike as they have genes in common (the kernel), so the system has as many unknowns as there
    are pairs, however many choices the space has.

    Args:
        codes: entry of the table that each gene of each pair looks up.
        y: standardised scores.
        unseen: what each member does not look at.
        rows: entries of the table.
        ridge: variance of what a score holds besides, over that of an effect.

    Returns:
        `effects` [rows, m], and `level` [m], which is added to their sum.
    """
    marks = torch.zeros(len(codes), rows).scatter_(1, codes, 1.0)
    alike = marks @ marks.T
    found, levels = [], []
    for mask in ~unseen:
        level = y[mask].mean()
        system = alike[mask][:, mask] + ridge * torch.eye(int(mask.sum()))
        found.append(marks[mask].T @ torch.linalg.solve(system, y[mask] - level))
        levels.append(level)
    return {"effects": torch.stack(found, 1), "level": torch.stack(levels)}


def blend(one: Float[Tensor, "m n"], other: Float[Tensor, "m n"], y: Float[Tensor, " n"], unseen: Tensor) -> Tensor:
    """Share of `other`, in 0..1, with which the two answer best to what each member has not seen (stacking, Wolpert,
    Neural Networks 5, 1992)."""
    apart = (other - one) * unseen
    return (((y - one) * apart).sum() / apart.square().sum().clamp_min(1e-12)).clamp(0, 1)
