"""Traces against torch's exact Hessian and against a quadratic whose Hessian is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from predictors.hessian_trace import HessianTrace
from supernet.elastic.supernet import SuperNet


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 3, bias=False), nn.Linear(3, 3)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def supernet(model, x):
    net = SuperNet(model, x[:1], bits=(2, 4, 8), first_last_bits=None, sites=False)
    net.calibrate([x])
    return net


def test_traces_are_those_of_the_exact_hessian():
    torch.manual_seed(0)
    x, model, probes = torch.randn(16, 4), Net(), 600
    with torch.no_grad():
        model.two.weight.mul_(3)
    y = model(x).argmax(1)
    found, read = HessianTrace(probes=probes).traces(supernet(model, x), x, y)

    def loss(one, two):
        return F.cross_entropy(functional_call(model, {"one.weight": one, "two.weight": two}, (x,)), y)

    blocks = hessian(loss, (model.one.weight.detach(), model.two.weight.detach()))
    for k, name in enumerate(("one", "two")):
        size = model.get_submodule(name).weight.numel()
        own, other = (blocks[k][j].reshape(size, -1) for j in (k, 1 - k))
        spread = float((2 * (own - own.diag().diag()).square().sum() + other.square().sum()).sqrt()) / probes**0.5
        assert 4 * spread < 0.4 * own.trace()
        assert found[f"{name}.weight"] == pytest.approx(float(own.trace()), abs=4 * spread)
    inner = torch.tanh(model.one(x)).detach()
    for name, start, after in (("one", x, model), ("two", inner, model.two)):
        each = [
            hessian(lambda v, after=after, k=k: F.cross_entropy(after(v[None]), y[k : k + 1]), start[k]).trace()
            for k in range(16)
        ]
        assert found[f"{name}.input"] == pytest.approx(float(torch.stack(each).mean()), rel=0.15)
        assert torch.allclose(torch.cat(read[f"{name}.input"]), start, atol=1e-6)


def test_a_quadratic_is_exact_with_one_probe_and_the_score_is_its_mean_diagonal_times_the_squared_change():
    torch.manual_seed(0)
    x = torch.eye(4).repeat(5, 1) * torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(5)[:, None]
    net = supernet(nn.Sequential(nn.Linear(4, 2, bias=False)), x)

    def half_squares(logits, wanted):
        return 0.5 * logits.square().sum() / len(logits)

    scored = HessianTrace(images=20, probes=1, loss=half_squares)
    traces, _ = scored.traces(net, x, torch.zeros(20))
    assert traces["0.weight"] == pytest.approx(2 * (1 + 4 + 9 + 16) / 4, rel=1e-5)  # 2 outputs x mean of x x'
    weight = net.model.get_submodule("0").weight.detach()
    quantizer, table = net.quantizers["0.weight_quantizer"], scored.scores(net, x, torch.zeros(20))["0.weight"]
    with quantizer.using(1):
        change = float((quantizer(weight) - weight).square().sum())
    assert table[1] == pytest.approx(15.0 / 8 * change, rel=1e-4)
    many, _ = HessianTrace(images=20, probes=400, loss=half_squares).traces(net, x, torch.zeros(20))
    assert many["0.input"] == pytest.approx(float(weight.square().sum()), rel=0.1)  # of w' w


def test_a_negative_trace_counts_by_its_amount():
    torch.manual_seed(0)
    x = torch.randn(20, 4)
    net = supernet(nn.Sequential(nn.Linear(4, 2, bias=False)), x)
    down, up = (
        HessianTrace(images=20, loss=lambda a, b, s=sign: s * a.square().mean()).scores(net, x, torch.zeros(20))
        for sign in (-1, 1)
    )
    assert all(np.array_equal(down[gene], up[gene]) and (up[gene] >= 0).all() for gene in up)
