"""Quantization with straight-through gradients: one fused forward and one fused backward for every form.

ONNX arithmetic: q = clamp(round_half_even(v / s) + z, lo, hi), x^ = (q - z) s, true division, integer z. Backward after
LSQ (Esser et al., ICLR 2020) and LSQ+ (Bhalgat et al., CVPRW 2020), with the zero-point rounded (EQ-Net's real-valued
offset has no QDQ equivalent):

|            | d x^ / d v | d x^ / d s         | d x^ / d z |
|------------|------------|--------------------|------------|
| inside     | 1          | (q - z) - v / s    | 0          |
| below lo   | 0          | lo - z             | -s         |
| above hi   | 0          | hi - z             | -s         |

Inside reaches half a step beyond the outermost levels, a tie included. A quantizer is one node of the autograd graph
and two kernels when compiled; which entries of the learned scales are in use is one more node, shared by all quantizers
of a network. The backward needs `v` alone: x^ and what lies outside are computed again, never stored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

CHOICE, LOW, HIGH, ASYMMETRIC, BYPASS = range(5)
"""Fields of a bound row [5] int64: index of the choice, lowest and highest code, zero-point in use?, pass through?"""

STEEP = 3e38
"""What makes the smallest excess over a limit more than one: near the largest float32."""


def traced() -> bool:
    """Whether this becomes part of a compiled graph: dynamo reads the code, or AOTAutograd runs it on fake tensors."""
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


def encode(v: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Integer codes of `v`, as floats; everything broadcasts against `v`."""
    return clamp_levels(torch.round(v / scale), zero, low, high) + zero


def clamp_levels(rounded: Tensor, zero: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The levels q - z of rounded ratios; clamp(n + z, lo, hi) - z is clamp(n, lo - z, hi - z), all being integers.

    In a compiled graph by two rectifications, which are one instruction each where a clamp has eight for the sake of
    NaN; integers make them exact.
    """
    lowest, highest = low - zero, high - zero
    if not traced():
        return torch.clamp(rounded, lowest, highest)
    return highest - torch.relu((highest - lowest) - torch.relu(rounded - lowest))


def forward(v: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor, bypass: Tensor | None = None) -> Tensor:
    """The quantized tensor, in the type of `v`; `v` itself where `bypass` is true."""
    return quantize(v, scale, zero, low, high, bypass).to(v.dtype)


def quantize(v: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor, bypass: Tensor | None = None) -> Tensor:
    """The quantized tensor in the type of the scale: the backward takes differences of it."""
    out = clamp_levels(torch.round(v / scale), zero, low, high) * scale
    return out if bypass is None else torch.where(bypass, v.to(out.dtype), out)


def within(v: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor, bypass: Tensor | None = None) -> Tensor:
    """1 inside the grid, up to half a step beyond the outermost levels, and where v passes through; 0 outside.

    The factor comes from rectifications: a compiler's masks cost more than all the rest of the kernel (measured on CPU,
    128x16x32x32, summed at once: 2.6 ms with masks, 1.2 ms so).
    """
    lowest, highest = (low - zero - 0.5) * scale, (high - zero + 0.5) * scale
    beyond = torch.relu(v - highest) + torch.relu(lowest - v)
    steep = STEEP if bypass is None else STEEP * (1 - bypass.to(scale.dtype))
    return torch.relu(1 - beyond * steep)


def backward(
    grad: Tensor, v: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor, bypass: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to v, and summed to their shape those to scale and zero-point.

    In one graph with the forward, the quantized tensor is that one.
    """
    inside = within(v, scale, zero, low, high, bypass)
    return straight_through(grad, v, quantize(v, scale, zero, low, high, bypass), inside, scale)


def straight_through(
    grad: Tensor, v: Tensor, quantized: Tensor, inside: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The table at the head of this file, in terms of x^: (q - z) - v / s is (x^ - v) / s, divided once it is summed.

    Args:
        grad: of the quantized tensor.
        v: what was quantized.
        quantized: x^, equal to v where that passed through.
        inside: 1 within the grid and where v passed through, 0 outside.
        scale: s; the zero-point has its shape.

    Returns:
        Gradients to v, and summed to the shape of `scale` those to scale and zero-point.
    """
    grad_v = grad * inside
    grad_scale = _summed(grad * (quantized - v * inside), scale) / scale
    return grad_v.to(grad.dtype), grad_scale, _summed(grad - grad_v, scale) * -scale


def slopes(v: Tensor, quantized: Tensor, inside: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of x^ to scale and zero-point for each element; arguments as those of `straight_through`."""
    return (quantized - v * inside) / scale, (inside - 1) * scale


def _summed(terms: Tensor, like: Tensor) -> Tensor:
    """`terms` [n, c, ...] summed to the shape of `like`.

    What becomes one number goes by way of the sums that a normalisation's backward takes there, so that a compiler
    computes both in one pass over the data: to [c] for images, to one of each row for tokens.
    """
    if like.numel() == 1 and terms.dim() > 1:
        terms = terms.sum([0, 2, 3] if terms.dim() == 4 else -1, keepdim=True)
    return terms.sum_to_size(like.shape)


# -- autograd ---------------------------------------------------------------------------------------------------------
@cache
def fused() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """`forward` and `backward` as compiled functions of rows [rows, elements] in the order of memory.

    One graph serves all shapes and layouts of activations and one all weights.
    """
    return torch.compile(_forward_rows, dynamic=True), torch.compile(_backward_rows, dynamic=True)


def _forward_rows(v: Tensor, scale: Tensor, *rest: Tensor | None) -> Tensor:
    return forward(v, scale, *rest)  # type: ignore[arg-type]


def _backward_rows(grad: Tensor, v: Tensor, scale: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad, v, scale, *rest)  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _gapless(shape: torch.Size, strides: tuple[int, ...], rows: int) -> bool:
    """Whether a tensor fills its memory without gaps or overlaps, axis 0 outermost where it has rows."""
    order = sorted((axis for axis in range(len(shape)) if shape[axis] > 1), key=lambda axis: -strides[axis])
    expected = 1
    for axis in reversed(order):
        if strides[axis] != expected:
            return False
        expected *= shape[axis]
    return rows == 1 or order[:1] == [0]


def _rows(v: Tensor, rows: int) -> Tensor:
    """A gapless tensor as [rows, elements] in the order of memory, without a copy.

    Detached, because a compiled function would be compiled again for each shape of the tensor that a view is of.
    """
    elements = v.numel() // rows
    return v.as_strided((rows, elements), (elements, 1)).detach()


def run_forward(
    v: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor, bypass: Tensor | None, fuse: bool
) -> Tensor:
    """`forward` with one scale for each row of `v`, or one for all; by the fused function if `fuse`."""
    if not fuse:
        shape = (-1, *[1] * (v.dim() - 1))
        return forward(v, scale.view(shape), zero.view(shape), low, high, bypass)
    count = scale.shape[0]
    if not _gapless(v.shape, v.stride(), count):
        v = v.contiguous()
    out = fused()[0](_rows(v, count), _rows(scale, count), _rows(zero, count), low, high, bypass)
    return out.as_strided(v.shape, v.stride())


def run_backward(
    grad: Tensor, v: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor, bypass: Tensor | None, fuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` with one scale for each row of `v`, or one for all; by the fused function if `fuse`."""
    if not fuse:
        shape = (-1, *[1] * (v.dim() - 1))
        return backward(grad, v, scale.view(shape), zero.view(shape), low, high, bypass)
    count = scale.shape[0]
    if not _gapless(v.shape, v.stride(), count):
        v = v.contiguous()
    if grad.stride() != v.stride():
        grad = torch.empty_strided(v.shape, v.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)
    laid = (_rows(t, count) for t in (grad, v, scale, zero))
    out, scales, zeros = fused()[1](*laid, low, high, bypass)
    return out.as_strided(v.shape, v.stride()), scales, zeros


class Select(torch.autograd.Function):
    """Scales and integer zero-points of the bound choices out of the learned ones of all choices.

    The gradient is multiplied by LSQ's 1 / sqrt(q_max) and the share of channels (1 / sqrt(N) is the quantizer's); it
    is zero for entries that are not in use. Rounding and clamping of the zero-point are passed straight through, so
    that one which has left its range comes back.

    Args (of `apply`):
        scale, zero_point: [T] learned values.
        entry: [S] int64, which of them are in use; an entry may be in use several times.
        factor: what its gradient is multiplied by; here and below [S], or one for all.
        shifted: 1 where the zero-point is in use, 0 where the form is symmetric.
        low, high: the codes that a zero-point may take.

    Returns:
        scale and zero-point, [S] each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scale: Tensor,
        zero_point: Tensor,
        entry: Tensor,
        factor: Tensor,
        shifted: Tensor,
        low: Tensor,
        high: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(entry, factor, shifted)
        ctx.size = scale.shape[0]
        zero = torch.clamp(torch.round(zero_point.index_select(0, entry)) * shifted, low, high)
        return scale.index_select(0, entry), zero

    @staticmethod
    def backward(ctx: Any, grad_scale: Tensor, grad_zero: Tensor) -> tuple[Tensor | None, ...]:
        entry, factor, shifted = ctx.saved_tensors
        scales, zeros = grad_scale * factor, grad_zero * (factor * shifted)
        empty = scales.new_zeros(ctx.size)
        return empty.index_add(0, entry, scales), empty.index_add(0, entry, zeros), None, None, None, None, None


class FakeQuantize(torch.autograd.Function):
    """Quantization to an integer grid.

    Args (of `apply`):
        v: what is quantized, one scale for each entry of axis 0 or one for all.
        scale, zero: [C] of the bound choice; C = 1: one for all.
        row: [5] the bound choice.
        elements: values that each scale is responsible for (activations: of one example); gradients of scale and
            zero-point are multiplied by LSQ's 1 / sqrt(N).
        may_bypass: whether the row may say that `v` passes through.
        fuse: whether to run the compiled functions where this is not part of a compiled graph.
    """

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, scale: Tensor, zero: Tensor, row: Tensor, elements: int, may_bypass: bool, fuse: bool
    ) -> Tensor:
        ctx.save_for_backward(v, scale, zero, row)
        ctx.elements, ctx.may_bypass, ctx.fuse = elements, may_bypass, fuse
        return run_forward(v, scale, zero, *limits(row, scale, may_bypass), fuse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, scale, zero, row = ctx.saved_tensors
        grad_v, grad_scale, grad_zero = run_backward(
            grad, v, scale, zero, *limits(row, scale, ctx.may_bypass), ctx.fuse
        )
        factor = ctx.elements**-0.5
        return grad_v, grad_scale.view(-1) * factor, grad_zero.view(-1) * factor, None, None, None, None


def fake_quantize(
    v: Tensor, scale: Tensor, zero: Tensor, row: Tensor, elements: int, may_bypass: bool, fuse: bool
) -> Tensor:
    """`FakeQuantize` as a function that dynamo may take for an operator (`supernet.elastic.regions`).

    Inside a compiled graph `fuse` is False.
    """
    out: Tensor = FakeQuantize.apply(v, scale, zero, row, elements, may_bypass, fuse)
    return out


def limits(row: Tensor, like: Tensor, may_bypass: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lowest and highest code of a bound row, and whether it lets values pass through (None: it cannot)."""
    low, high = row[LOW : HIGH + 1].to(like.dtype).unbind()
    return low, high, row[BYPASS] > 0 if may_bypass else None


def nearest_level(v: Tensor, scale: Tensor, zero: Tensor, levels: Tensor, bounds: Tensor) -> Tensor:
    """Nearest level of any grid to v / scale + zero; ties go to the even level.

    A zero-point other than 0 belongs to an integer grid: there the ratio is rounded first, as `encode` does, so that
    both give the same codes.

    Args:
        levels: [L] ascending, padded by repeating the last one.
        bounds: [L - 1] midpoints, nudged so that ties go to the even level; infinite where padded.
    """
    ratio = v / scale
    return levels[torch.bucketize(torch.where(zero != 0, torch.round(ratio), ratio) + zero, bounds)]


def table_quantize(
    v: Tensor, scale: Tensor, zero: Tensor, levels: Tensor, bounds: Tensor, bypass: Tensor | None = None
) -> Tensor:
    """As `quantize`, of a grid by table."""
    out = (nearest_level(v, scale, zero, levels, bounds) - zero) * scale
    return out if bypass is None else torch.where(bypass, v.to(out.dtype), out)


def table_within(v: Tensor, scale: Tensor, zero: Tensor, levels: Tensor, bypass: Tensor | None = None) -> Tensor:
    """As `within`, of a grid by table."""
    first = (levels[1] - levels[0]) / 2
    last = (levels[-1] - torch.where(levels < levels[-1], levels, -torch.inf).amax()) / 2
    code = v / scale + zero
    inside = (code >= levels[0] - first) & (code <= levels[-1] + last)
    return (inside if bypass is None else inside | bypass).to(code.dtype)


class TableQuantize(torch.autograd.Function):
    """Quantization to an arbitrary grid by table, with the gradients of `FakeQuantize` (the code is the level).

    `apply` takes the arguments of `FakeQuantize` up to `may_bypass`, then the levels and bounds of the bound choice
    (see `nearest_level`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        scale: Tensor,
        zero: Tensor,
        row: Tensor,
        elements: int,
        may_bypass: bool,
        levels: Tensor,
        bounds: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(v, scale, zero, row, levels, bounds)
        ctx.elements, ctx.may_bypass = elements, may_bypass
        s, z = (t.view(-1, *[1] * (v.dim() - 1)) for t in (scale, zero))
        return table_quantize(v, s, z, levels, bounds, row[BYPASS] > 0 if may_bypass else None).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, scale, zero, row, levels, bounds = ctx.saved_tensors
        s, z = (t.view(-1, *[1] * (v.dim() - 1)) for t in (scale, zero))
        bypass = row[BYPASS] > 0 if ctx.may_bypass else None
        quantized, inside = table_quantize(v, s, z, levels, bounds, bypass), table_within(v, s, z, levels, bypass)
        grad_v, grad_scale, grad_zero = straight_through(grad, v, quantized, inside, s)
        factor = ctx.elements**-0.5
        return grad_v, grad_scale.view(-1) * factor, grad_zero.view(-1) * factor, None, None, None, None, None
