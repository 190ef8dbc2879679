"""One subnet trained alone, against torch's own training of the materialised module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from supernet.calibration.batchnorm import recalibrate, recalibrated
from supernet.elastic.supernet import SuperNet
from supernet.quant.quantizer import Quantizer
from supernet.run import weights_digest
from supernet.training.finetune import finetune
from supernet.training.module import Schedule
from tests.unit.training.conftest import Spots, model


@pytest.fixture(scope="module")
def net() -> SuperNet:
    made = SuperNet(model(), Spots().example(), bits=(2, 4, 8))
    made.calibrate(Spots().recalibrate())
    return made


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_untrained_it_is_the_subnet_of_the_supernet(net: SuperNet, tmp_path: Path) -> None:
    task, was = Spots(), net.training
    for config in (net.space.uniform("w4a4"), net.space.sample(np.random.default_rng(1))):
        subnet = finetune(net, config, task, out=tmp_path, epochs=0)
        with torch.no_grad(), net.as_subnet(config), recalibrated(net, task.recalibrate()):
            assert torch.equal(subnet(task.images), net.eval()(task.images))
        net.train(was)
    assert list(tmp_path.iterdir()) == []


def test_it_is_the_training_of_the_materialised_module(net: SuperNet, tmp_path: Path) -> None:
    """Plain SGD written out by hand gives the same weights, gains and running statistics; the scales stand still."""
    task, before = Spots(), weights_digest(net)
    config = net.space.sample(np.random.default_rng(2))
    schedule = Schedule(lr=0.05, scale_lr=0.0, zero_point_lr=0.0, weight_decay=0.01, momentum=0.0, warmup=0.0, clip=0.0)
    tuned = finetune(net, config, task, out=tmp_path, epochs=2, schedule=schedule, seed=3)
    assert weights_digest(net) == before and not (tmp_path / "work").exists() and (tmp_path / "metrics.csv").exists()

    by_hand, step = net.materialise(config), 0
    recalibrate(by_hand, task.recalibrate())
    by_hand.train()
    own = {id(p) for m in by_hand.modules() if isinstance(m, Quantizer) for p in m.parameters(recurse=False)}
    moving = [(n, p) for n, p in by_hand.named_parameters() if id(p) not in own]
    for epoch in range(2):
        torch.manual_seed(3 * 1_000_003 + epoch)  # of the dropout
        for images, labels in task.train(np.random.default_rng([3, 0, epoch])):
            loss = F.cross_entropy(by_hand(images), labels)
            gradients = torch.autograd.grad(loss, [p for _, p in moving], allow_unused=True)
            rate = 0.05 * schedule.factor(step, 2 * task.steps_per_epoch())
            with torch.no_grad():
                for (_, p), g in zip(moving, gradients, strict=True):
                    if g is not None:
                        p -= rate * (g + (0.01 * p if p.dim() > 1 else 0))
            step += 1
    start, ours, theirs = state(net.materialise(config)), state(tuned), state(by_hand)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-5), name
    weights = [n for n, p in moving if p.dim() > 1]
    assert weights and all(not torch.equal(ours[n], start[n]) for n in weights)


def test_scales_are_learned_too(net: SuperNet, tmp_path: Path) -> None:
    config = net.space.uniform("w2a2")
    tuned = finetune(net, config, Spots(), out=tmp_path, epochs=1, schedule=Schedule(lr=0.01, scale_lr=0.05))
    before = state(net.materialise(config))
    moved = [
        name for name, value in state(tuned).items() if name.endswith("scale") and not torch.equal(value, before[name])
    ]
    assert len(moved) > len(net.layers)


def test_killed_in_the_second_epoch_it_ends_alike(net: SuperNet, tmp_path: Path) -> None:
    config, schedule = net.space.uniform("w4a2"), Schedule(lr=0.05)
    straight = finetune(net, config, Spots(), out=tmp_path / "one", epochs=3, schedule=schedule, seed=5)
    with pytest.raises(RuntimeError, match="killed"):
        finetune(net, config, Spots(fail_at=(1, 1)), out=tmp_path / "two", epochs=3, schedule=schedule, seed=5)
    task = Spots()
    resumed = finetune(net, config, task, out=tmp_path / "two", epochs=3, schedule=schedule, seed=5)
    assert task.epoch == 2, "the first epoch is not made again"
    one, two = state(straight), state(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "one" / "metrics.csv").read_text() == (tmp_path / "two" / "metrics.csv").read_text()


def test_another_training_starts_anew(net: SuperNet, tmp_path: Path) -> None:
    config = net.space.uniform("w4a4")
    with pytest.raises(RuntimeError, match="killed"):
        finetune(net, config, Spots(fail_at=(1, 1)), out=tmp_path, epochs=2, seed=5)
    task = Spots()
    finetune(net, config, task, out=tmp_path, epochs=2, seed=6)
    assert task.epoch == 2
    with pytest.raises(ValueError, match="epochs is 0"):
        finetune(net, config, task, out=tmp_path, epochs=-1)
