"""The bank: learned scales and zero-points of all quantizers of a supernet in two flat parameters.

One gather gives every quantizer the values of its bound choice, and one scatter takes their gradients back, so that
neither the optimizer nor autograd nor a compiled graph handles them one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from supernet.quant.quantizer import FIELDS, Quantizer
from supernet.quant.ste import ASYMMETRIC, HIGH, LOW, Select


class Bound(NamedTuple):
    """A choice for each quantizer and what follows from it: rows of fields, entries in use, what Select wants to know.

    `rows` of one table belong to the network as it was when the table was made.
    """

    choices: NDArray[np.int64]
    rows: list[Tensor]
    table: list[tuple[Tensor, ...]]
    entry: Int[Tensor, " S"]
    limits: Float[Tensor, "4 S"]


class Bank(nn.Module):
    """Takes the scales and zero-points of quantizers over; each quantizer's own become views of its span.

    Args:
        quantizers: by name, at least one. They lose their parameters.

    Attributes:
        scale: [T] learned steps of all choices of all quantizers, positive.
        zero_point: [T] learned zero-points before rounding.
        bound: what `bind` has bound last.
        spans: where the entries of each quantizer lie, by name.
    """

    def __init__(self, quantizers: Mapping[str, Quantizer]) -> None:
        super().__init__()
        self.quantizers = dict(quantizers)  # a plain dict: they stay where they are in the network
        held = list(self.quantizers.values())
        sizes = [q.scale.numel() for q in held]
        ends = np.cumsum(sizes)
        self.spans = {n: slice(int(e) - s, int(e)) for n, e, s in zip(self.quantizers, ends, sizes, strict=True)}
        self.scale = nn.Parameter(torch.cat([q.scale.detach() for q in held]))
        self.zero_point = nn.Parameter(torch.cat([q.zero_point.detach() for q in held]))
        self._widths = [q.channels for q in held]
        self._slots = np.repeat(np.arange(len(held)), self._widths)
        self._channels = np.concatenate([np.arange(width) for width in self._widths])
        self._places: list[tuple[dict[str, Any], dict[str, Tensor | None]]] = []
        self.bind(np.zeros(len(held), dtype=np.int64))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files hold no references to the quantizers' insides, which would be those of another network."""
        return self.__dict__ | {"_places": []}

    def _lend(self) -> None:
        """Give every quantizer views of its span."""
        held = self.quantizers.values()
        for quantizer, at in zip(held, self.spans.values(), strict=True):
            quantizer.borrow(self.scale.detach()[at], self.zero_point.detach()[at])
        # Binding writes here directly: a method call for each quantizer costs more than all the rest.
        self._places = [(quantizer.__dict__, quantizer._buffers) for quantizer in held]

    def _settled(self) -> bool:
        """Whether views and tables are those of the network as it is; it may have been moved, copied or loaded."""
        if not self._places or self._tabulated != Quantizer.changes:
            return False
        first = self._places[0][0]["scale"]
        return bool(first.data_ptr() == self.scale.data_ptr() and first.device == self.scale.device)

    def _tabulate(self) -> None:
        """Fields of every choice, and where in the bank its entries start and whether each channel has its own."""
        held = list(self.quantizers.values())
        most = max(len(q.choices) for q in held)
        self._fields = np.zeros((len(held), most, len(FIELDS)), dtype=np.int64)
        self._starts, self._wide, self._share = (np.zeros((len(held), most), dtype=np.int64) for _ in range(3))
        for k, (quantizer, span) in enumerate(zip(held, self.spans.values(), strict=True)):
            for choice, (start, size) in enumerate(quantizer.spans):
                self._fields[k, choice] = quantizer.fields(choice)
                self._starts[k, choice] = span.start + start
                self._wide[k, choice], self._share[k, choice] = size > 1, quantizer.channels // size
        table = torch.from_numpy(self._fields.copy()).to(self.scale.device)
        self._rows = [rows.unbind() for rows in table.unbind()]
        self._tabulated = Quantizer.changes

    def bind(self, choices: NDArray[np.int64]) -> None:
        """Bind a choice to each quantizer, in their order; nothing is written to, so that earlier subnets keep theirs.

        Args:
            choices: [quantizers] index of each one's choice.
        """
        with torch.inference_mode(False):  # what is bound while evaluating serves training afterwards
            if not self._settled():
                self._lend()
                self._tabulate()
            rows = [rows[choice] for rows, choice in zip(self._rows, choices.tolist(), strict=True)]
            self._put(Bound(choices, rows, self._rows, *self._gather(choices)))

    def rebind(self, bound: Bound) -> None:
        """Bind again what `bound` was before; half the time of `bind`, unless the network has changed since."""
        if self._settled() and bound.table is self._rows:
            self._put(bound)
        else:
            self.bind(bound.choices)

    def _put(self, bound: Bound) -> None:
        self.bound = bound
        for (_, buffers), row in zip(self._places, bound.rows, strict=True):
            buffers["row"] = row

    def _gather(self, choices: NDArray[np.int64]) -> tuple[Int[Tensor, " S"], Float[Tensor, "4 S"]]:
        """Which entries are in use, and what Select wants to know of each."""
        order, device = np.arange(len(choices)), self.scale.device
        starts, wide, share = (table[order, choices][self._slots] for table in (self._starts, self._wide, self._share))
        fields = self._fields[order, choices][self._slots]
        low, high, shifted = (fields[:, at].astype(np.float32) for at in (LOW, HIGH, ASYMMETRIC))
        factor = 1 / np.sqrt(high * share, dtype=np.float32)
        entry = torch.from_numpy(starts + wide * self._channels).to(device)
        return entry, torch.from_numpy(np.stack([factor, shifted, low, high])).to(device)

    @contextmanager
    def selected(self) -> Iterator[None]:
        """Inside, every quantizer has scale and zero-point of its bound choice at hand, from one gather."""
        if not self._settled():
            self.bind(self.bound.choices)
        bound = self.bound
        scale, zero = Select.apply(self.scale, self.zero_point, bound.entry, *bound.limits.unbind())
        pairs = zip(scale.split(self._widths), zero.split(self._widths), strict=True)
        for (attributes, buffers), row, pair in zip(self._places, bound.rows, pairs, strict=True):
            attributes["given"] = pair if buffers["row"] is row else None  # one that is bound by hand selects by itself
        try:
            yield
        finally:
            for attributes, _ in self._places:
                attributes["given"] = None
