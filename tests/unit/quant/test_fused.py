"""The fused functions: how many graphs they take, and that layout, type and gradients come back as they went in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.formats.integer import Integer
from supernet.quant.quantizer import Quantizer
from supernet.quant.ste import run_forward
from tests.unit.quant.graphs import HIDDEN, Graphs, counted
from tests.unit.quant.reference import LAYOUTS

pytestmark = HIDDEN
WEIGHTS = [QuantConfig(Integer(b), g, s) for b in (2, 5, 8) for g in (PerTensor(), PerChannel()) for s in (True, False)]
INPUTS = [QuantConfig(Integer(b), PerTensor(), s) for b in (2, 5, 8) for s in (True, False)]


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    with counted() as made:
        yield made


def quantized(shape: tuple[int, ...], weight: bool = False, bypass: int = 0, layout: str = "contiguous") -> Tensor:
    """One pass, forward and backward, of a fresh quantizer; the gradient of its scale."""
    made = Quantizer(WEIGHTS if weight else INPUTS, shape[0] if weight else 1, weight, bypass)
    made.fuse = True
    v = LAYOUTS[layout](torch.randn(shape)).requires_grad_()
    with made.using(len(made.choices) // 2):
        made(v).square().sum().backward()
    assert v.grad is not None and v.grad.shape == v.shape
    return made.scale.grad


def random_shape(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(n) for n in rng.integers(2, 9, size=rng.integers(2, 5)))


class TestGraphs:
    def test_one_forward_and_one_backward_serve_all_activations(self, graphs: Graphs, rng: np.random.Generator) -> None:
        quantized((2, 3, 4, 5))
        assert graphs.functions == 2
        with torch._dynamo.config.patch(error_on_recompile=True):
            for layout in LAYOUTS:
                for _ in range(20):
                    quantized(random_shape(rng), layout=layout)
            quantized((1, 3, 4, 5))
            quantized((2, 1))
        assert graphs.functions == 2

    def test_one_forward_and_one_backward_serve_all_weights(self, graphs: Graphs, rng: np.random.Generator) -> None:
        quantized((6, 3, 3, 3), weight=True)
        assert graphs.functions == 2
        with torch._dynamo.config.patch(error_on_recompile=True):
            for layout in LAYOUTS:
                for _ in range(20):
                    quantized(random_shape(rng), weight=True, layout=layout)
        assert graphs.functions == 2

    def test_a_square_weight_that_comes_first_costs_no_more_than_another_pair(
        self, graphs: Graphs, rng: np.random.Generator
    ) -> None:
        """Torch takes equal sizes of the first call for one size, and sees at the next that they are two."""
        quantized((6, 6), weight=True)
        quantized((5, 7), weight=True)
        assert graphs.functions <= 4
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(20):
                quantized(random_shape(rng), weight=True)

    def test_passing_through_is_one_more_pair(self, graphs: Graphs, rng: np.random.Generator) -> None:
        quantized((2, 3, 4, 5))
        quantized((2, 3, 4, 5), bypass=8)
        assert graphs.functions == 4
        for _ in range(20):
            quantized(random_shape(rng), bypass=8)
            quantized(random_shape(rng))
        assert graphs.functions == 4

    def test_gradients_or_not_makes_no_difference(self, graphs: Graphs) -> None:
        made, v = Quantizer(INPUTS), torch.randn(4, 5)
        made.fuse = True
        made(v).sum().backward()
        assert graphs.functions == 2
        with torch.no_grad():
            made(v)
        made(v.clone().requires_grad_()).sum().backward()
        made.requires_grad_(False)
        made(v)
        assert graphs.functions == 2

    def test_eager_quantizers_compile_nothing(self, graphs: Graphs) -> None:
        Quantizer(INPUTS)(torch.randn(4, 5)).sum().backward()
        assert graphs.functions == 0


class TestLayout:
    def test_what_lies_in_memory_without_gaps_comes_back_in_the_same_order(self, graphs: Graphs) -> None:
        """A copy in another order would cost as much as the kernel, twice."""
        limits = torch.tensor(-8.0), torch.tensor(7.0)
        for layout, channels in itertools.product(LAYOUTS, (1, 6)):
            v = LAYOUTS[layout](torch.randn(6, 3, 4, 5))
            out = run_forward(v, torch.full((channels,), 0.3), torch.zeros(channels), *limits, None, True)
            dense = layout in ("contiguous", "channels last") or (
                channels == 1 and layout in ("axis 0 innermost", "flipped axes")
            )
            assert out.shape == v.shape and (out.stride() == v.stride()) == dense, (layout, channels)

    def test_other_kernels_may_hand_over_gradients_in_any_layout(self, graphs: Graphs) -> None:
        grads = []
        for layout in LAYOUTS.values():
            made = Quantizer(INPUTS)
            made.fuse = True
            v = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
            grad = torch.arange(2.0).view(2, 1, 1, 1).expand(v.shape)
            made(v).backward(layout(grad))
            grads.append((v.grad, made.scale.grad))
        for by_value, by_scale in grads[1:]:
            assert torch.equal(by_value, grads[0][0]) and torch.equal(by_scale, grads[0][1])

    def test_half_precision_comes_back_as_it_went_in(self, graphs: Graphs) -> None:
        plain, fast = Quantizer(WEIGHTS, 6, weight=True), Quantizer(WEIGHTS, 6, weight=True)
        fast.fuse, found = True, []
        for made in (plain, fast):
            v = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
            out = made(v)
            out.backward(torch.ones_like(out))
            found.append((out, v.grad))
            assert out.dtype == v.grad.dtype == torch.bfloat16
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))

    def test_a_batch_without_images_is_taken(self, graphs: Graphs) -> None:
        made, v = Quantizer(INPUTS), torch.zeros(0, 3, 4, 4, requires_grad=True)
        made.fuse = True
        out = made(v)
        out.sum().backward()
        assert out.shape == v.grad.shape == v.shape and not made.scale.grad.any()
