"""The Quantizer: one tensor, several ways to quantize it, and which one is active is data.

Every choice has its learned steps in one flat bank; a choice-indexed table says which entry of the bank each channel
uses, so that per-tensor, per-channel and any later block shape run the same code. The active choice arrives as one row
of an int64 table that is *bound*, never written: filling a buffer in place would break the backward of a subnet run
before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from supernet.config import PerTensor, QuantConfig
from supernet.formats.integer import Integer
from supernet.quant.ranges import order_statistics, start_values
from supernet.quant.ste import (
    ASYMMETRIC,
    BYPASS,
    LOW,
    Select,
    TableQuantize,
    encode,
    fake_quantize,
    limits,
    nearest_level,
    quantize,
    slopes,
    table_quantize,
    table_within,
    within,
)

FIELDS = ("choice", "low", "high", "asymmetric", "bypass")
CELLS_PER_TENSOR, CELLS_PER_CHANNEL, CELLS_PER_LAYER = 2048, 256, 1 << 16
"""Order statistics that start values are found with: of the whole, of a channel at least, of all channels together."""


class Quantizer(nn.Module):
    """Fake-quantizes a tensor with the active one of its choices; scales (and zero-points) are learned for each.

    Args:
        choices: the ways to quantize, at least one.
        channels: entries along axis 0 that have scales of their own under per-channel choices (activations: 1).
        weight: True for weights (channels on axis 0); False for activations (one scale, axis 0 is the batch).
        bypass: choices with at least this many bits pass the input through, because it already sits on a grid of that
            many bits (0: never).

    Attributes:
        scale: [T] learned steps of all choices, positive; parameters, or borrowed from a Bank.
        zero_point: [T] learned zero-points before rounding, 0 where symmetric.
        row: [5] int64, the bound choice: index, lowest and highest code, asymmetric?, bypass?
        enabled: False makes it the identity (float reference, calibration).
        fuse: True runs compiled functions outside of compiled graphs (supernet.quant.ste.fused).
    """

    changes = 0  # how often any quantizer's grids have changed; tables of them are as old as the number they noted
    scale: Tensor
    zero_point: Tensor
    row: Tensor
    index: Tensor
    share: Tensor
    signed: Tensor
    levels: Tensor
    bounds: Tensor

    def __init__(
        self, choices: Sequence[QuantConfig], channels: int = 1, weight: bool = False, bypass: int = 0
    ) -> None:
        super().__init__()
        if not choices:
            raise ValueError(
                "a quantizer needs at least one choice; give one or more bit-widths, granularities, symmetries"
            )
        self.choices, self.channels, self.weight, self.bypass = tuple(choices), channels, weight, bypass
        self.integer = all(isinstance(c.format, Integer) for c in self.choices)
        if not self.integer and any(not c.symmetric for c in self.choices if not isinstance(c.format, Integer)):
            shifted = [str(c) for c in self.choices if not c.symmetric and not isinstance(c.format, Integer)]
            raise ValueError(f"a zero-point needs an integer grid; make these symmetric: {', '.join(shifted)}")
        sizes = [1 if isinstance(c.granularity, PerTensor) else channels for c in self.choices]
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        self.spans = list(zip(starts, sizes, strict=True))
        self.scale = nn.Parameter(torch.ones(sum(sizes)))
        self.zero_point = nn.Parameter(torch.zeros(sum(sizes)))
        index = [torch.arange(channels) + s if n > 1 else torch.full((channels,), s) for s, n in self.spans]
        self.register_buffer("index", torch.stack(index), persistent=False)
        share = torch.tensor([float(channels // n) for _, n in self.spans])
        self.register_buffer("share", share, persistent=False)
        self.register_buffer("signed", torch.tensor(True))
        self.unsigned, self.enabled, self.fuse = False, True, False
        self.given: tuple[Tensor, Tensor] | None = None
        self.register_buffer("row", torch.zeros(len(FIELDS), dtype=torch.int64), persistent=False)
        self.set_unsigned(False)

    # -- which grid ---------------------------------------------------------------------------------------------------
    def fields(self, choice: int) -> list[int]:
        """The table row of one choice: see FIELDS."""
        return self._rows[choice]

    def _fields(self, choice: int) -> list[int]:
        low, high = self.limits(choice)
        config = self.choices[choice]
        bypass = bool(self.bypass) and config.bits >= self.bypass
        return [choice, int(low), int(high), int(not config.symmetric), int(bypass)]

    def limits(self, choice: int) -> tuple[float, float]:
        """Lowest and highest code of one choice; codes start at 0 where the tensor is never negative."""
        config = self.choices[choice]
        if self.unsigned and isinstance(config.format, Integer):
            return 0.0, float(2**config.bits - 1)
        levels = config.format.levels(config.symmetric)
        return levels[0], levels[-1]

    def _tabulate(self) -> None:
        """Tables for grids that are not all integer: levels and midpoints of each choice, padded to one length."""
        grids = []
        for k, config in enumerate(self.choices):
            low, high = self.limits(k)
            integer = isinstance(config.format, Integer)
            grids.append(
                torch.arange(low, high + 1) if integer else torch.tensor(config.format.levels(config.symmetric))
            )
        most = max(len(g) for g in grids)
        levels = torch.stack([torch.cat([g, g[-1:].expand(most - len(g))]) for g in grids])
        bounds = torch.stack([torch.cat([_bounds(g), torch.full((most - len(g),), torch.inf)]) for g in grids])
        self.register_buffer("levels", levels.float().to(self.scale.device), persistent=False)
        self.register_buffer("bounds", bounds.float().to(self.scale.device), persistent=False)

    def bind(self, row: Int[Tensor, " f"]) -> None:
        """Make the choice of `row` active. The tensor must not be written to afterwards."""
        self._buffers["row"] = row

    def borrow(self, scale: Tensor, zero_point: Tensor) -> None:
        """Use tensors of a bank instead of parameters of one's own."""
        for name, tensor in (("scale", scale), ("zero_point", zero_point)):
            self._parameters.pop(name, None)
            self.__dict__[name] = tensor

    def own(self) -> None:
        """Have parameters of one's own again, with the values that were borrowed."""
        for name in ("scale", "zero_point"):
            if name in self.__dict__:
                self.register_parameter(name, nn.Parameter(self.__dict__.pop(name).clone()))

    @contextmanager
    def using(self, choice: int) -> Iterator[None]:
        """One choice bound inside the context; what was bound before comes back, also after an error."""
        before = self.row
        self.bind(torch.tensor(self.fields(choice), device=before.device))
        try:
            yield
        finally:
            self.bind(before)

    @property
    def choice(self) -> int:
        """Index of the bound choice."""
        return int(self.row[0])

    # -- arithmetic ---------------------------------------------------------------------------------------------------
    def select(self) -> tuple[Tensor, Tensor]:
        """[C] scale and integer zero-point of the bound choice: handed in by the bank, or out of one's own."""
        if self.given is not None:
            return self.given
        entry = self.index.index_select(0, self.row[:1]).view(-1)
        low, high, shifted = self.row[LOW : ASYMMETRIC + 1].to(self.scale.dtype).unbind()
        factor = torch.rsqrt(high * self.share.index_select(0, self.row[:1]))
        return Select.apply(self.scale, self.zero_point, entry, factor, shifted, low, high)

    @torch.no_grad()
    def parameters_of(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale, integer zero-point, lowest and highest code of the bound choice, shaped to broadcast against `v`."""
        (scale, zero), shape = self.select(), (-1, *[1] * (v.dim() - 1))
        low, high, _ = limits(self.row, scale, False)
        return scale.view(shape), zero.view(shape), low, high

    def forward(self, v: Tensor) -> Tensor:
        """The quantized tensor, with gradients to `v`, scale and zero-point; `v` itself while it is not enabled."""
        if not self.enabled:
            return v
        operands = (v, *self.select(), self.row, self._elements(v), bool(self.bypass))
        if self.integer:
            return fake_quantize(*operands, self.fuse and not torch.compiler.is_compiling())
        return TableQuantize.apply(*operands, *self._grid())

    @torch.no_grad()
    def linearise(self, v: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The quantized tensor and, element by element, its derivatives to scale and zero-point.

        They hold LSQ's 1 / sqrt(N), so that their products with the gradient sum to what `forward` passes back.

        Args:
            v: an activation.
            scale, zero: [1] of `select`.
        """
        bypass = self.row[BYPASS] > 0 if self.bypass else None
        if self.integer:
            low, high, _ = limits(self.row, scale, False)
            quantized, inside = (f(v, scale, zero, low, high, bypass) for f in (quantize, within))
        else:
            levels, bounds = self._grid()
            quantized = table_quantize(v, scale, zero, levels, bounds, bypass)
            inside = table_within(v, scale, zero, levels, bypass)
        of_scale, of_zero = slopes(v, quantized, inside, scale)
        factor = self._elements(v) ** -0.5
        return quantized.to(v.dtype), of_scale * factor, of_zero * factor

    def _elements(self, v: Tensor) -> int:
        """Values that each scale is responsible for; of activations those of one example."""
        return max(v.numel() // (self.channels if self.weight else max(v.shape[0], 1)), 1)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Levels and bounds of the bound choice."""
        levels, bounds = (table.index_select(0, self.row[:1])[0] for table in (self.levels, self.bounds))
        return levels, bounds

    @torch.no_grad()
    def encode(self, v: Tensor) -> Tensor:
        """Codes (grid levels) of `v` under the bound choice, as floats; `forward(v) == decode(encode(v))` exactly."""
        scale, zero, low, high = self.parameters_of(v)
        if self.integer:
            return encode(v, scale, zero, low, high)
        return nearest_level(v, scale, zero, self.levels[self.choice], self.bounds[self.choice])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes under the bound choice."""
        scale, zero, _, _ = self.parameters_of(codes)
        return (codes - zero) * scale

    # -- start values -------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def start(self, data: Tensor, extremes: tuple[float, float] | None = None, share: float = 0.0) -> None:
        """Set scale and zero-point of every choice from data: the weight itself, or a sample of the activations.

        An activation that is never negative becomes unsigned for good (its codes start at 0).

        Args:
            data: all values, or an even sample of them.
            extremes, share: smallest and largest value of what was sampled, and the share of it that one value is. The
                sample may have missed them, and each counts for no more than it is, however many the others stand for.
        """
        data = data.float()
        if not self.weight:
            self.set_unsigned(float(data.min()) >= 0 and (extremes is None or extremes[0] >= 0))
        for size in sorted({n for _, n in self.spans}):
            cells = CELLS_PER_TENSOR if size == 1 else max(CELLS_PER_CHANNEL, CELLS_PER_LAYER // size)
            sample, weights = order_statistics(data.reshape(size, -1), cells)
            if extremes is not None:
                sample = torch.cat([sample, sample.new_tensor([extremes])], 1)
                weights = torch.cat([weights, weights.new_full((2,), share)])
            these = [k for k, (_, n) in enumerate(self.spans) if n == size]
            low, high = zip(*(self.limits(k) for k in these), strict=True)
            symmetric = [self.choices[k].symmetric for k in these]
            levels = [self._levels(k) for k in these]
            scale, zero = start_values(sample, low, high, symmetric, self.unsigned, levels, weights)
            for k, s, z in zip(these, scale, zero, strict=True):
                at, n = self.spans[k]
                self.scale[at : at + n] = s
                self.zero_point[at : at + n] = z

    def _levels(self, choice: int) -> Tensor | None:
        """Levels of a choice whose grid is not integer."""
        config = self.choices[choice]
        if isinstance(config.format, Integer):
            return None
        return torch.tensor(config.format.levels(config.symmetric), device=self.scale.device)

    def set_unsigned(self, unsigned: bool) -> None:
        """Codes from 0 on (True) or around 0 (False); the bound row follows."""
        self.unsigned = unsigned
        Quantizer.changes += 1
        self.signed.fill_(not unsigned)
        self._rows = [self._fields(k) for k in range(len(self.choices))]
        if not self.integer:
            self._tabulate()
        self.bind(torch.tensor(self.fields(self.choice), device=self.row.device))

    def only(self, choice: int) -> Quantizer:
        """A new Quantizer that has just this choice, with its learned values."""
        at, n = self.spans[choice]
        fixed = Quantizer([self.choices[choice]], self.channels, self.weight, self.bypass).to(self.scale.device)
        fixed.set_unsigned(self.unsigned)
        fixed.scale.data.copy_(self.scale.data[at : at + n])
        fixed.zero_point.data.copy_(self.zero_point.data[at : at + n])
        fixed.enabled, fixed.fuse = self.enabled, self.fuse
        return fixed

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}signed" in state_dict:
            self.set_unsigned(not bool(state_dict[f"{prefix}signed"]))

    def extra_repr(self) -> str:
        """The choices, shortened, and what the tensor is."""
        shown = str(self.choices[0]) if len(self.choices) == 1 else f"{len(self.choices)} choices"
        return (
            f"{shown}, {'weight' if self.weight else 'activation'}, channels={self.channels}, unsigned={self.unsigned}"
        )


def _bounds(levels: Tensor) -> Tensor:
    """Midpoints of ascending levels, one ulp lower where a tie must go up, to an even number of steps from zero."""
    middle = (levels[1:] + levels[:-1]).double() / 2
    zero = int(torch.argmin(levels.abs()))
    upper_is_even = (torch.arange(1, len(levels)) - zero) % 2 == 0
    middle = middle.float()
    return torch.where(upper_is_even, torch.nextafter(middle, torch.tensor(-torch.inf)), middle)
