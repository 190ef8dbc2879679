"""Quantization and its gradients in plain float64, the witness of every faster form; and operands to compare on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Plain:
    """Output and gradients; `slack` is the sum of |gradient|, times the factor, that went into each scale."""

    out: NDArray[np.float64]
    v: NDArray[np.float64]
    scale: NDArray[np.float64]
    zero: NDArray[np.float64]
    slack: NDArray[np.float64]


def plainly(
    v: Tensor,
    scale: Tensor,
    zero: Tensor,
    low: float,
    high: float,
    grad: Tensor,
    factor: float = 1.0,
    bypass: bool = False,
) -> Plain:
    """ONNX's arithmetic forward and LSQ's gradients, as the papers write them.

    Args:
        scale, zero: [C], one for each entry of axis 0 of `v`, or [1].
        factor: what the gradients of scale and zero-point are multiplied by.
        bypass: `v` is passed through.
    """
    x, g = v.detach().double().numpy(), np.broadcast_to(grad.double().numpy(), v.shape)
    s, z = (t.detach().double().numpy().reshape(-1, *[1] * (x.ndim - 1)) for t in (scale, zero))
    q = np.round(x / s) + z
    below, above = q < low, q > high
    inside = ~(below | above)
    code = np.where(below, low, np.where(above, high, q))
    by_scale = g * np.where(inside, (q - z) - x / s, code - z)
    by_zero = g * np.where(inside, 0.0, -s)
    axes = tuple(range(int(len(scale) > 1), x.ndim))
    on = 0.0 if bypass else factor
    return Plain(
        x if bypass else (code - z) * s,
        g if bypass else g * inside,
        by_scale.sum(axes).reshape(-1) * on,
        by_zero.sum(axes).reshape(-1) * on,
        np.abs(g).sum(axes).reshape(-1) * on,
    )


def values(shape: tuple[int, ...], scale: Tensor, zero: Tensor, low: float, high: float, seed: int = 0) -> Tensor:
    """Values inside and well outside of the codes' range, none of them near a tie between two codes."""
    generator = torch.Generator().manual_seed(seed)
    s, z = (t.detach().view(-1, *[1] * (len(shape) - 1)) for t in (scale, zero))
    v = (torch.rand(shape, generator=generator) * 1.4 - 0.7) * (high - low + 4) * s + ((low + high) / 2 - z) * s
    ratio = v.double() / s.double()
    tie = ((ratio - ratio.floor()) - 0.5).abs() < 1e-2
    return torch.where(tie, v + 0.05 * s, v)


def check(found: dict[str, Tensor], expected: Plain, what: object = "") -> None:
    """Output and gradients of a float32 computation; those of `v` are exact, sums may differ in the last digits."""
    tolerance = 1e-5 * expected.slack + 1e-12
    assert np.allclose(found["out"].detach().numpy(), expected.out, rtol=1e-6, atol=1e-12), what
    assert np.array_equal(found["v"].numpy(), expected.v.astype(np.float32)), what
    assert found["scale"].shape == expected.scale.shape and found["zero"].shape == expected.zero.shape
    assert (np.abs(found["scale"].numpy() - expected.scale) <= tolerance + 1e-5 * np.abs(expected.scale)).all(), what
    assert np.allclose(found["zero"].numpy(), expected.zero, rtol=1e-5, atol=tolerance.max()), what


def _innermost(axis: int) -> Callable[[Tensor], Tensor]:
    return lambda v: v.movedim(axis, -1).contiguous().movedim(-1, axis)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda v: v.contiguous(),
    "channels last": _innermost(1),
    "axis 0 innermost": _innermost(0),
    "with gaps": lambda v: torch.stack([v, v], -1)[..., 0],
    "flipped axes": lambda v: v.permute(*reversed(range(v.dim()))).contiguous().permute(*reversed(range(v.dim()))),
    "repeated": lambda v: v[..., :1].expand_as(v),
}
"""The same values in memory in every order that a network may hand over; `repeated` repeats some of them."""
