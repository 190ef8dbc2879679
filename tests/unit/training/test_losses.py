"""Distribution loss against known distributions, distillation against closed forms."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from supernet.training.losses import GroupProgressive, Plain, WeightDistribution, kurtosis, skewness

TASK = SimpleNamespace(loss=F.cross_entropy)


def quantiles(name, n=400_001):
    """Equally likely points of a distribution, so that moments are nearly exact."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    if name == "uniform":
        return u
    if name == "normal":
        return torch.special.ndtri(u)
    return -torch.sign(u - 0.5) * torch.log1p(-2 * (u - 0.5).abs())


def mse_of_best_clip(x, bits):
    """Smallest error of symmetric rounding over a fine grid of clip values, at unit variance."""
    x = ((x - x.mean()) / x.std()).detach().double()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales = torch.linspace(0.02, 1.0, 99, dtype=torch.float64) * x.abs().max() / high
    return min(float((x - torch.clamp(torch.round(x / s), low, high) * s).square().mean()) for s in scales)


@pytest.mark.parametrize(("name", "expected"), [("uniform", 1.8), ("normal", 3.0), ("laplace", 6.0)])
def test_moments_of_known_distributions(name, expected):
    x = quantiles(name)
    assert float(kurtosis(x)) == pytest.approx(expected, rel=2e-3)
    assert float(skewness(x)) == pytest.approx(0.0, abs=1e-9)
    assert float(kurtosis(5 * x - 3)) == pytest.approx(float(kurtosis(x)), rel=1e-9)


def test_skewness_of_an_exponential_is_two():
    u = (torch.arange(400_001, dtype=torch.float64) + 0.5) / 400_001
    assert float(skewness(-torch.log1p(-u))) == pytest.approx(2.0, rel=5e-3)


def test_flat_weights_cost_nothing_and_the_gradient_is_right():
    penalty = WeightDistribution()
    assert float(penalty.of(quantiles("uniform", 20_001))) == pytest.approx(0.0, abs=1e-6)
    x = torch.from_numpy(np.random.default_rng(0).laplace(size=(4, 5))).requires_grad_()
    assert torch.autograd.gradcheck(penalty.of, (x,))


def test_constant_weights_have_a_finite_penalty():
    x = torch.ones(8, requires_grad=True)
    WeightDistribution().of(x).backward()
    assert torch.isfinite(x.grad).all()


def test_minimising_the_penalty_flattens_a_laplace_tensor_and_lowers_its_rounding_error():
    x = torch.from_numpy(np.random.default_rng(1).laplace(size=4096)).float().requires_grad_()
    before = [mse_of_best_clip(x, bits) for bits in (2, 4)]
    optimizer, penalty = torch.optim.Adam([x], lr=0.02), WeightDistribution(kurtosis=1.0)
    for _ in range(600):
        optimizer.zero_grad()
        penalty.of(x).backward()
        optimizer.step()
    assert kurtosis(x).item() == pytest.approx(1.8, abs=0.05)
    assert [mse_of_best_clip(x, bits) for bits in (2, 4)] < [0.75 * b for b in before]


def test_all_layers_but_the_first_count():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    net = SimpleNamespace(model=model, layers=[SimpleNamespace(name=str(i)) for i in range(3)])
    penalty = WeightDistribution()
    expected = (penalty.of(model[1].weight) + penalty.of(model[2].weight)) / 2
    assert penalty(net).item() == pytest.approx(expected.item())
    penalty(net).backward()
    assert model[0].weight.grad is None and model[2].weight.grad is not None
    assert Plain(penalty).regulariser(net).item() == pytest.approx(expected.item())
    assert Plain().regulariser(net) is None


def test_guidance_is_half_divergence_half_task_loss():
    torch.manual_seed(0)
    teacher, student, labels = torch.randn(7, 5), torch.randn(7, 5, requires_grad=True), torch.arange(7) % 5
    p, q = F.softmax(teacher, 1), F.softmax(student, 1)
    expected = 0.5 * (p * (p.log() - q.log())).sum(1).mean() + 0.5 * F.cross_entropy(student, labels)
    loss = GroupProgressive().subnet_loss(1, student, labels, TASK, teacher)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradient = torch.autograd.grad(loss, student)[0]
    closed = (0.5 * (q - p) + 0.5 * (q - F.one_hot(labels, 5))) / 7
    assert torch.allclose(gradient, closed, atol=1e-6)


def test_the_teacher_gets_no_gradient():
    teacher, student = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    GroupProgressive().subnet_loss(2, student, torch.zeros(3, dtype=torch.long), TASK, teacher).backward()
    assert teacher.grad is None and student.grad is not None


def test_first_subnet_and_plain_take_the_task_loss():
    logits, labels, teacher = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(6, 3)
    expected = F.cross_entropy(logits, labels)
    assert torch.equal(GroupProgressive().subnet_loss(0, logits, labels, TASK, None), expected)
    assert torch.equal(Plain().subnet_loss(1, logits, labels, TASK, teacher), expected)


def test_temperature_keeps_the_size_of_the_gradient():
    teacher, student = torch.randn(200, 10), torch.randn(200, 10, requires_grad=True)
    labels = torch.zeros(200, dtype=torch.long)
    sizes = []
    for temperature in (1.0, 8.0):
        loss = GroupProgressive(1.0, temperature).subnet_loss(1, student, labels, TASK, teacher)
        sizes.append(float(torch.autograd.grad(loss, student)[0].norm()))
    assert 0.3 < sizes[1] / sizes[0] < 3


@pytest.mark.parametrize("settings", [{"distillation": 1.5}, {"temperature": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="temperature"):
        GroupProgressive(**settings)
