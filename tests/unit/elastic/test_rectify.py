"""The ReLU at the end of a region is torch's, and takes its place only where that changes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from supernet.backbones.cifar_resnet import CifarResNet
from supernet.elastic.rectify import rectifies, rectify
from supernet.elastic.regions import Regions
from supernet.elastic.supernet import SuperNet


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_relu(dtype: torch.dtype) -> None:
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1.2e-38, -1.2e-38, 6.0e4, -6.0e4], dtype=torch.float64)
    x = torch.cat([edges, torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))]).to(dtype)
    x[(x.abs() > 0) & (x.abs() < 1.2e-38)] = 0  # below float32's normal numbers the factor is no longer 1
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = rectify(ours), torch.relu(plain)
    out.backward(grad)
    expected.backward(grad)
    assert torch.equal(out, expected)
    assert ours.grad is not None
    assert torch.equal(ours.grad, plain.grad)
    assert ours.grad.dtype == dtype


class Ends(nn.Module):
    """One way to write the last operator."""

    def __init__(self, end: Callable[[Tensor], Tensor] | nn.Module, twice: bool) -> None:
        super().__init__()
        self.end, self.twice = end, twice

    def forward(self, x: Tensor) -> Any:
        y = x * 2
        z = self.end(y)
        return z + y if self.twice else z + x


@pytest.mark.parametrize(
    ("end", "found"),
    [
        (nn.ReLU(), True),
        (nn.ReLU(inplace=True), True),
        (F.relu, True),
        (torch.relu, True),
        (lambda y: y.relu(), True),
        (lambda y: y.relu_(), True),
        (nn.ReLU6(), False),
        (torch.abs, False),
        (lambda y: y.sigmoid(), False),
    ],
)
def test_knows_relu_in_every_spelling_but_not_where_its_input_is_read_again(end: Any, found: bool) -> None:
    def seen(twice: bool) -> list[bool]:
        graph = fx.symbolic_trace(Ends(end, twice))
        modules = dict(graph.named_modules())
        nodes = [n for n in graph.graph.nodes if n.op not in ("placeholder", "output")]
        return [rectifies(n, modules.get(str(n.target)) if n.op == "call_module" else None) for n in nodes]

    assert seen(twice=False) == [False, found, False]
    assert not any(seen(twice=True))


def test_stands_where_a_region_ends_and_not_within() -> None:
    codes: list[str] = []

    def compile(function: Any) -> Any:
        codes.append(" ".join(function.__code__.co_names))
        return function

    net = SuperNet(CifarResNet(8, channels=(4, 4, 8)), torch.randn(1, 3, 32, 32), sites=False)
    Regions(net.model, compile)
    ends = [code for code in codes if "rectify" in code]
    assert len(ends) == len(codes) - 1  # all but the head, which ends in a linear layer
    assert all(code.count("rectify_rectify") == 1 for code in ends)
