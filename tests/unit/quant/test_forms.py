"""Every form of quantization against plain float64, gradients included: eager, and by the fused functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.formats.integer import Integer
from supernet.quant.quantizer import Quantizer
from supernet.quant.ste import fused
from tests.unit.quant.graphs import HIDDEN, counted
from tests.unit.quant.reference import LAYOUTS, check, plainly, values

pytestmark = HIDDEN
BITS = range(2, 9)
WEIGHTS = [QuantConfig(Integer(b), g, s) for b in BITS for g in (PerTensor(), PerChannel()) for s in (True, False)]
INPUTS = [QuantConfig(Integer(b), PerTensor(), s) for b in BITS for s in (True, False)]
KINDS = {
    "conv weight": (lambda: Quantizer(WEIGHTS, 6, weight=True), (6, 3, 3, 3)),
    "depthwise weight": (lambda: Quantizer(WEIGHTS, 6, weight=True), (6, 1, 3, 3)),
    "linear weight": (lambda: Quantizer(WEIGHTS, 6, weight=True), (6, 20)),
    "one channel": (lambda: Quantizer(WEIGHTS, 1, weight=True), (1, 5, 3, 3)),
    "images": (lambda: Quantizer(INPUTS), (3, 4, 5, 6)),
    "one image": (lambda: Quantizer(INPUTS), (1, 4, 5, 6)),
    "tokens": (lambda: Quantizer(INPUTS), (3, 7, 8)),
    "features": (lambda: Quantizer(INPUTS), (5, 9)),
    "behind a site": (lambda: Quantizer(INPUTS, bypass=8), (3, 4, 5, 6)),
}


def learned(kind: str, unsigned: bool) -> tuple[Quantizer, tuple[int, ...]]:
    """A quantizer with scales and zero-points as training may leave them: fractional, some beyond the codes."""
    make, shape = KINDS[kind]
    made, generator = make(), torch.Generator().manual_seed(len(kind))
    made.set_unsigned(unsigned)
    with torch.no_grad():
        made.scale.copy_(torch.rand(made.scale.shape, generator=generator) * 0.2 + 0.05)
        for k, (at, n) in enumerate(made.spans):
            low, high = made.limits(k)
            made.zero_point[at : at + n] = low + (torch.rand(n, generator=generator) * 1.4 - 0.2) * (high - low)
    return made, shape


def compare(kind: str, layout: str, unsigned: bool, fuse: bool) -> None:
    """Forward and backward of every choice of one kind."""
    made, shape = learned(kind, unsigned)
    made.fuse = fuse
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for k, config in enumerate(made.choices):
        (at, n), (low, high) = made.spans[k], made.limits(k)
        span = slice(at, at + n)
        scale = made.scale.detach()[span]
        zero = made.zero_point.detach()[span].round().clamp(low, high) * (not config.symmetric)
        v = LAYOUTS[layout](values(shape, scale, zero, low, high, seed=k)).requires_grad_()
        elements = v.numel() // (n if made.weight else shape[0])
        bypass = bool(made.bypass) and config.bits >= made.bypass
        expected = plainly(v, scale, zero, low, high, grad, (elements * high) ** -0.5, bypass)
        made.scale.grad = made.zero_point.grad = None
        with made.using(k):
            out = made(v)
        out.backward(grad)
        if config.symmetric:
            expected.zero[:] = 0
        found = {"out": out, "v": v.grad, "scale": made.scale.grad[span], "zero": made.zero_point.grad[span]}
        check(found, expected, (kind, layout, str(config)))
        others = np.delete(np.arange(len(made.scale)), np.arange(len(made.scale))[span])
        assert not made.scale.grad[others].any() and not made.zero_point.grad[others].any()
        if not bypass and layout != "repeated":
            assert (found["v"] == 0).any() and found["scale"].all(), "values on both sides of the limits"


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_eager(kind: str, layout: str, unsigned: bool) -> None:
    compare(kind, layout, unsigned, fuse=False)


def everything(fuse: bool) -> None:
    for kind in KINDS:
        for layout in LAYOUTS:
            for unsigned in (False, True):
                compare(kind, layout, unsigned, fuse)


def test_fused_as_traced() -> None:
    """Three pairs of graphs serve all of it: activations, those that may pass through, and weights."""
    with counted() as graphs:
        everything(fuse=True)
        assert graphs.functions == 6


@pytest.mark.slow
def test_fused_as_compiled() -> None:
    torch._dynamo.reset()
    fused.cache_clear()
    everything(fuse=True)
