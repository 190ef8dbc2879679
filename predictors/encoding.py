"""Rows of choices as numbers: one small table for each gene, so that a first layer becomes a sum of looked-up rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from supernet.config import Choice, QuantConfig
from supernet.space import Dimension, Indices, SearchSpace, dimension_numbers, magnitude

ATTRIBUTES: tuple[Callable[[QuantConfig], Hashable], ...] = (
    lambda choice: type(choice.format).__name__,
    lambda choice: str(choice.granularity),
    lambda choice: choice.symmetric,
)
"""What a quantized tensor's choices may differ in, besides bits."""


class Encoding:
    """Inputs of a predictor: for each gene the numbers of its choice, one gene beside the other; 0 where inactive.

    A linear layer behind it is a sum over genes of one row each, out of a table that `fold` makes once. For a
    search's thousands of rows that is less work than the product with the numbers themselves.

    Args:
        space: what is encoded.
        tables: for each dimension [choices, numbers]; numbers may be 0 for what is left out.
    """

    def __init__(self, space: SearchSpace, tables: Sequence[NDArray[np.float64]]) -> None:
        self.space = space
        self.tables = [torch.from_numpy(np.pad(t, ((0, 1), (0, 0))).astype(np.float32)) for t in tables]
        sizes = np.array([len(t) for t in self.tables], dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self.inactive = self.offsets + sizes - 1
        self.widths = [t.shape[1] for t in self.tables]
        self.gated = any(d.active_if for d in space.dimensions)

    @property
    def width(self) -> int:
        """How many numbers describe a row."""
        return sum(self.widths)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with the way rows are encoded."""
        digest = hashlib.sha256()
        for table in self.tables:
            digest.update(repr(tuple(table.shape)).encode() + table.numpy().tobytes())
        return digest.hexdigest()[:16]

    def read(self, indices: Indices) -> tuple[Indices, Int[Tensor, "n d"]]:
        """Canonical rows, and the positions in the table of `fold` of each gene; an inactive gene has one of its own.

        Raises:
            ValueError: a row has an index that its dimension does not offer.
        """
        space = self.space
        rows = space.canonical(indices) if space.ties else _checked(space, indices)
        if not self.gated:
            return rows, torch.from_numpy(rows + self.offsets)
        active = space.active(rows)
        codes = np.where(active, rows + self.offsets, self.inactive)
        return np.where(active, rows, 0), torch.from_numpy(codes)

    def features(self, codes: Int[Tensor, "n d"]) -> Float[Tensor, "n f"]:
        """The numbers themselves."""
        local = codes - torch.from_numpy(self.offsets)
        return torch.cat([table[local[:, i]] for i, table in enumerate(self.tables)], dim=1)

    def fold(
        self,
        weight: Float[Tensor, "m f h"],
        bias: Float[Tensor, "m 1 h"],
        mean: Float[Tensor, " f"] | None = None,
        std: Float[Tensor, " f"] | None = None,
    ) -> Float[Tensor, "rows m*h"]:
        """Table of which the rows `codes`, summed, are (features - mean) / std @ weight + bias of every member."""
        m = (torch.zeros(self.width) if mean is None else mean).split(self.widths)
        s = (torch.ones(self.width) if std is None else std).split(self.widths)
        w = weight.split(self.widths, 1)
        folded = [torch.matmul((table - m[i]) / s[i], w[i]) for i, table in enumerate(self.tables)]
        folded[0] = folded[0] + bias  # each row looks the first gene up once
        return torch.cat(folded, dim=1).transpose(0, 1).flatten(1).contiguous()


def _checked(space: SearchSpace, indices: Indices) -> Indices:
    """Rows [n, d] as they are; ValueError where one has no such choice."""
    rows = np.atleast_2d(np.asarray(indices, dtype=np.int64))
    if rows.shape[1] != len(space) or (len(rows) and ((rows.max(0) >= space.sizes).any() or rows.min() < 0)):
        raise ValueError(
            f"rows must have {len(space)} indices, each in 0..size-1 of its dimension; got shape {rows.shape}"
        )
    return rows


def described(space: SearchSpace) -> Encoding:
    """Few numbers for each gene: `SearchSpace.features`."""
    return Encoding(space, [dimension_numbers(d) for d in space.dimensions])


def one_hot(space: SearchSpace, of: Callable[[Dimension], bool] = lambda _: True) -> Encoding:
    """A column for each choice of bits, and one for each format, granularity and symmetry where they vary.

    An architecture gene has a column for each choice. Dimensions that `of` turns down have none.
    """
    return Encoding(space, [columns(d.choices) if of(d) else np.zeros((len(d.choices), 0)) for d in space.dimensions])


def columns(choices: Sequence[Choice]) -> NDArray[np.float64]:
    """[choices, columns] of 0 and 1: which bits, and which format, granularity and symmetry where they vary."""
    parts = [_indicators([magnitude(c) for c in choices])]
    quantized = [c for c in choices if isinstance(c, QuantConfig)]
    for attribute in ATTRIBUTES if quantized else ():
        values = [attribute(c) for c in quantized]
        if len(set(values)) > 1:
            parts.append(_indicators(values))
    return np.concatenate(parts, axis=1)


def _indicators(values: Iterable[Hashable]) -> NDArray[np.float64]:
    listed = list(values)
    distinct = list(dict.fromkeys(listed))
    return np.array([[float(v == other) for other in distinct] for v in listed])
