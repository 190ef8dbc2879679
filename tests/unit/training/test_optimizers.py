"""LazyAdam: the selected entries follow Adam, the others do not move by a bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from supernet.training.optimizers import LazyAdam

BETAS, EPS = (0.9, 0.999), 1e-12


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.rand(n, generator=generator) + 0.5) for n in (6, 1, 4)]


def gradients(step: int, used: float = 0.5) -> list[torch.Tensor]:
    """Random gradients in which about half of the entries are exactly 0."""
    generator = torch.Generator().manual_seed(100 + step)
    made = [torch.randn(n, generator=generator) for n in (6, 1, 4)]
    return [g * (torch.rand(g.shape, generator=generator) < used) for g in made]


class Reference:
    """Adam written out for one number, in float64; on the logarithm where `relative`."""

    def __init__(self, value: float, relative: bool, lr: float) -> None:
        self.value, self.relative, self.lr = value, relative, lr
        self.mean = self.square = 0.0
        self.steps = 0

    def step(self, grad: float) -> None:
        import math

        if grad == 0:
            return
        slope = grad * self.value if self.relative else grad
        self.steps += 1
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * slope
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * slope**2
        hat = self.mean / (1 - BETAS[0] ** self.steps)
        move = self.lr * hat / ((self.square / (1 - BETAS[1] ** self.steps)) ** 0.5 + EPS)
        self.value = self.value * math.exp(-move) if self.relative else self.value - move


@pytest.mark.parametrize("relative", [True, False])
def test_every_entry_follows_an_adam_of_its_own(relative: bool) -> None:
    params = parameters()
    references = [[Reference(float(v), relative, 0.05) for v in p.detach()] for p in params]
    optimizer = LazyAdam([{"params": params, "relative": relative, "lr": 0.05}])
    for step in range(30):
        for p, g, row in zip(params, gradients(step), references, strict=True):
            p.grad = g
            for reference, value in zip(row, g, strict=True):
                reference.step(float(value))
        optimizer.step()
    for p, row in zip(params, references, strict=True):
        torch.testing.assert_close(
            p.detach().double(), torch.tensor([r.value for r in row]).double(), rtol=1e-4, atol=1e-5
        )


def test_with_every_entry_in_use_it_is_torchs_adam() -> None:
    ours, theirs = parameters(), parameters()
    lazy = LazyAdam([{"params": ours, "relative": False, "lr": 0.01}], eps=1e-8)
    adam = torch.optim.Adam(theirs, lr=0.01, eps=1e-8)
    for step in range(10):
        for a, b, g in zip(ours, theirs, gradients(step, used=2.0), strict=True):
            a.grad, b.grad = g, g.clone()
        lazy.step()
        adam.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("relative", [True, False])
def test_entries_without_a_gradient_are_bit_identical_in_value_and_moments(relative: bool) -> None:
    params = parameters()
    optimizer = LazyAdam([{"params": params, "relative": relative, "lr": 0.1}])
    for step in range(12):
        before = [p.detach().clone() for p in params]
        states = [copy.deepcopy(dict(optimizer.state[p])) for p in params]
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
        for p, old, state in zip(params, before, states, strict=True):
            assert p.grad is not None
            idle = p.grad == 0
            assert torch.equal(p.detach()[idle], old[idle])
            assert (p.detach()[~idle] != old[~idle]).all()
            for name, tensor in state.items():
                assert torch.equal(optimizer.state[p][name][idle], tensor[idle])


def test_plain_adam_would_move_them() -> None:
    """The control: what this optimizer is there for."""
    p = nn.Parameter(torch.ones(2))
    adam = torch.optim.Adam([p], lr=0.1)
    for grad in ([1.0, 1.0], [1.0, 0.0]):
        p.grad = torch.tensor(grad)
        adam.step()
    assert p[1] < 0.88


def test_a_parameter_without_gradient_is_left_alone() -> None:
    params = parameters()
    optimizer = LazyAdam([{"params": params, "relative": True}])
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.ones(6)
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert all(torch.equal(p, b) for p, b in zip(params[1:], before[1:], strict=True))
    assert not optimizer.state[params[1]]


def test_scales_stay_positive_whatever_the_gradient() -> None:
    p = nn.Parameter(torch.tensor([1e-6, 1.0, 1e3]))
    optimizer = LazyAdam([{"params": [p], "relative": True, "lr": 0.5}])
    for sign in (1, 1, 1, -1, 1) * 8:
        p.grad = torch.full((3,), sign * 1e6)
        optimizer.step()
    assert (p > 0).all() and torch.isfinite(p).all()


def test_a_relative_step_is_the_same_share_of_small_and_large_values() -> None:
    p = nn.Parameter(torch.tensor([1e-4, 10.0]))
    optimizer = LazyAdam([{"params": [p], "relative": True, "lr": 0.01}])
    p.grad = torch.tensor([3.0, 0.2])
    optimizer.step()
    torch.testing.assert_close(p.detach() / torch.tensor([1e-4, 10.0]), torch.full((2,), 0.9900498), rtol=1e-5, atol=0)


@pytest.mark.parametrize("relative", [True, False])
def test_at_a_rate_of_zero_nothing_moves(relative: bool) -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = LazyAdam([{"params": params, "relative": relative, "lr": 0.0}])
    for p, g in zip(params, gradients(0), strict=True):
        p.grad = g
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 0, got -1"):
        LazyAdam([{"params": parameters()}], lr=-1)


def test_it_continues_from_its_state() -> None:
    runs = []
    for interrupt in (False, True):
        params = parameters()
        optimizer = LazyAdam([{"params": params, "relative": True, "lr": 0.05}])
        for step in range(8):
            if interrupt and step == 4:
                state, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
                params = [nn.Parameter(v) for v in values]
                optimizer = LazyAdam([{"params": params, "relative": True, "lr": 0.05}])
                optimizer.load_state_dict(state)
            for p, g in zip(params, gradients(step), strict=True):
                p.grad = g
            optimizer.step()
        runs.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_closure_is_called_with_gradients() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = LazyAdam([{"params": [p], "relative": False, "lr": 0.1}])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4 and p.item() == pytest.approx(1.9)
