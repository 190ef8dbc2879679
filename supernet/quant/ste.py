"""Quantization with straight-through gradients, forward and backward written out.

ONNX arithmetic: q = clamp(round_half_even(v / s) + z, lo, hi), x^ = (q - z) s, true division, integer z. Backward after
LSQ (Esser et al., ICLR 2020) and LSQ+ (Bhalgat et al., CVPRW 2020), with the zero-point rounded (EQ-Net's real-valued
offset has no QDQ equivalent):

|            | d x^ / d v | d x^ / d s         | d x^ / d z |
|------------|------------|--------------------|------------|
| inside     | 1          | (q - z) - v / s    | 0          |
| below lo   | 0          | lo - z             | -s         |
| above hi   | 0          | hi - z             | -s         |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def encode(v: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Integer codes of `v`, as floats; everything broadcasts against `v`."""
    return torch.clamp(torch.round(v / scale) + zero, low, high)


def forward(v: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The quantized tensor: decode(encode(v))."""
    return (encode(v, scale, zero, low, high) - zero) * scale


def backward(
    grad: Tensor, v: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to v, to scale and to the zero-point, the last two not yet reduced (shape of v)."""
    ratio = v / scale
    code = torch.round(ratio) + zero
    clamped = torch.clamp(code, low, high)
    outside = clamped != code
    grad_v = grad.masked_fill(outside, 0.0)
    grad_scale = grad * (clamped - zero - ratio.masked_fill(outside, 0.0))
    return grad_v, grad_scale, (grad_v - grad) * scale


def _reduced(
    grad: Tensor, v: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_v, grad_scale, grad_zero = backward(grad, v, scale, zero, low, high)
    return grad_v, grad_scale.sum_to_size(scale.shape), grad_zero.sum_to_size(scale.shape)


VARIANTS = 64


class _Functions:
    """The two functions in use: plain ones, or compiled by `compile_quantizers`."""

    forward: Callable[..., Tensor] = staticmethod(forward)
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = staticmethod(_reduced)


def compile_quantizers(on: bool = True) -> None:
    """Fuse the quantizer's forward and backward with torch.compile (dynamic shapes), or go back to eager functions.

    The rest of the network stays eager, so depth and any other Python choice cost no recompilation.
    """
    if on:  # ranks, broadcast scales and gradient modes make more variants than the default 8, after which eager runs
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    _Functions.forward = staticmethod(torch.compile(forward, dynamic=True) if on else forward)
    _Functions.backward = staticmethod(torch.compile(_reduced, dynamic=True) if on else _reduced)


class FakeQuantize(torch.autograd.Function):
    """`forward` with the hand-written `backward`; masks are computed again, so only `v` is saved."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(v, scale, zero, low, high)
        run = forward if torch.compiler.is_compiling() else _Functions.forward
        return run(v, scale, zero, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = _reduced if torch.compiler.is_compiling() else _Functions.backward
        return *run(grad, *ctx.saved_tensors), None, None


class RoundThrough(torch.autograd.Function):
    """Round half to even, with the gradient passed on as it is."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return torch.round(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant: LSQ's 1 / sqrt(N q_max)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


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


class TableQuantize(torch.autograd.Function):
    """Quantization to an arbitrary grid by table, with the gradients of `FakeQuantize` (the code is the level).

    Inside reaches half a step beyond the outermost levels, as it does on an integer grid.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, scale: Tensor, zero: Tensor, levels: Tensor, bounds: Tensor) -> Tensor:
        ctx.save_for_backward(v, scale, zero, levels, bounds)
        return (nearest_level(v, scale, zero, levels, bounds) - zero) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, scale, zero, levels, bounds = ctx.saved_tensors
        ratio = v / scale
        first, last = (
            (levels[1] - levels[0]) / 2,
            (levels[-1] - torch.where(levels < levels[-1], levels, -torch.inf).amax()) / 2,
        )
        inside = (ratio + zero >= levels[0] - first) & (ratio + zero <= levels[-1] + last)
        grad_v = torch.where(inside, grad, 0.0)
        grad_scale = grad * (nearest_level(v, scale, zero, levels, bounds) - zero - torch.where(inside, ratio, 0.0))
        return (
            grad_v,
            grad_scale.sum_to_size(scale.shape),
            ((grad_v - grad) * scale).sum_to_size(scale.shape),
            None,
            None,
        )
