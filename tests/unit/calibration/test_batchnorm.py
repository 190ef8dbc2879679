"""BatchNorm recalibration against means taken by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from supernet.backbones.cifar_resnet import CifarResNet
from supernet.calibration.batchnorm import norms, recalibrate, recalibrated
from supernet.elastic.supernet import SuperNet

BATCHES = [torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)) * n for n in (4, 6, 5)]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.BatchNorm2d(4)
    )
    made[2].running_mean.fill_(7.0)
    made[2].eval()
    return made


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def test_statistics_are_the_mean_over_batches(model: nn.Module) -> None:
    recalibrate(model, BATCHES)
    first = [model[0](batch) for batch in BATCHES]  # dropout was off
    assert torch.allclose(model[2].running_mean, torch.stack([o.mean((0, 2, 3)) for o in first]).mean(0), atol=1e-5)
    assert torch.allclose(model[2].running_var, torch.stack([o.var((0, 2, 3)) for o in first]).mean(0), rtol=1e-5)
    assert model[2].num_batches_tracked == 3
    second = [nn.functional.batch_norm(o, None, None, model[2].weight, model[2].bias, True).relu() for o in first]
    expected = torch.stack([o.mean((0, 2, 3)) for o in second]).mean(0)
    assert torch.allclose(model[4].running_mean, expected, atol=1e-5), (
        "later layers see batches normalised by themselves"
    )


def test_modes_momenta_and_weights_are_left_alone(model: nn.Module) -> None:
    before = {n: t for n, t in state(model).items() if "running" not in n and "tracked" not in n}
    recalibrate(model, iter(BATCHES))
    assert [m.training for m in model] == [True, True, False, True, True] and model.training
    assert [m.momentum for m in norms(model)] == [0.3, 0.1]
    assert all(torch.equal(state(model)[n], t) for n, t in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_modes_come_back_after_an_error(model: nn.Module) -> None:
    with pytest.raises(RuntimeError):
        recalibrate(model, [BATCHES[0], torch.zeros(2, 5, 8, 8)])
    assert [m.training for m in model] == [True, True, False, True, True]
    assert [m.momentum for m in norms(model)] == [0.3, 0.1]


@pytest.mark.parametrize("batches", [[], iter(())], ids=["list", "iterator"])
def test_without_batches_nothing_is_changed(model: nn.Module, batches: Iterator[Tensor]) -> None:
    before = state(model)
    with pytest.raises(ValueError, match="at least one batch; raise the number of recalibration images"):
        recalibrate(model, batches)
    assert all(torch.equal(state(model)[n], t) for n, t in before.items())


def test_inside_the_context_they_are_new_and_afterwards_the_old_ones_are_back(model: nn.Module) -> None:
    before = state(model)
    with recalibrated(model, BATCHES) as inside:
        assert inside is model and model[2].running_mean.abs().max() < 7
    assert all(torch.equal(state(model)[n], t) for n, t in before.items())
    for bad in (BATCHES, [torch.zeros(2, 5, 8, 8)]):
        with pytest.raises(RuntimeError), recalibrated(model, bad):
            raise RuntimeError
        assert all(torch.equal(state(model)[n], t) for n, t in before.items())


def test_layers_without_statistics_are_left_out() -> None:
    plain = nn.BatchNorm2d(3, track_running_stats=False)
    assert norms(nn.Sequential(plain, nn.BatchNorm1d(2), nn.GroupNorm(1, 3))) and plain not in norms(
        nn.Sequential(plain)
    )
    recalibrate(nn.Sequential(plain), BATCHES)


def test_the_active_subnet_of_a_supernet_gets_its_own() -> None:
    """A low-bit subnet computes other activations, so its statistics differ; a materialised copy agrees."""
    torch.manual_seed(0)
    net = SuperNet(CifarResNet(8, channels=(4, 6, 8)), BATCHES[0][:1], bits=(2, 8))
    net.calibrate(BATCHES)
    found = {}
    for bits in ("w2a2", "w8a8"):
        config = net.space.uniform(bits)
        with net.as_subnet(config), recalibrated(net, BATCHES):
            found[bits] = net.model.get_buffer("layer3.0.bn2.running_mean").clone()
        subnet = net.materialise(config)
        recalibrate(subnet, BATCHES)
        assert torch.equal(subnet.get_buffer("layer3.0.bn2.running_mean"), found[bits])
    assert not torch.allclose(found["w2a2"], found["w8a8"], rtol=0.05)
