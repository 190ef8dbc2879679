"""The training step against the same step written out, the schedule, and what samplers are told."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from supernet.calibration.batchnorm import recalibrated
from supernet.elastic.supernet import SuperNet
from supernet.samplers.uniform import Uniform
from supernet.space import Indices
from supernet.training.fit import train
from supernet.training.losses import GroupProgressive, Plain, WeightDistribution
from supernet.training.module import Epochs, Schedule, SupernetModule

SEED = 5


class Recorder(Uniform):
    """A uniform sampler that keeps what it is told."""

    def __init__(
        self, space: Any, feedback: Literal["none", "train_loss", "select_loss"] = "none", every: int = 1
    ) -> None:
        super().__init__(space)
        self.feedback, self.every = feedback, every
        self.told: list[tuple[Indices, Any, int, int]] = []
        self.at_telling: Callable[[Indices], Any] | None = None

    def tell(self, indices: Indices, scores: Any, step: int, total_steps: int) -> None:
        expected = self.at_telling(indices) if self.at_telling else None
        self.told.append((indices, (scores, expected), step, total_steps))


def one_step(net: SuperNet, task: Any, out: Path, **options: Any) -> None:
    train(net, task, out=out, epochs=1, validation=(), seed=SEED, **({"sampler": Recorder(net.space)} | options))


class TestSchedule:
    def test_linear_rise_then_half_a_cosine(self) -> None:
        schedule, total = Schedule(warmup=0.1), 50
        for step in range(total):
            expected = (step + 1) / 5 if step < 5 else 0.5 * (1 + math.cos(math.pi * (step - 5) / 45))
            assert schedule.factor(step, total) == pytest.approx(expected)
        assert schedule.factor(4, total) == 1 and schedule.factor(49, total) < 0.002

    @pytest.mark.parametrize("total", [1, 2, 3])
    def test_the_shortest_runs_have_rates_too(self, total: int) -> None:
        assert all(0 < Schedule(warmup=0.0).factor(step, total) <= 1 for step in range(total))

    @pytest.mark.parametrize(
        "wrong", [{"lr": -1}, {"scale_lr": -1e-9}, {"clip": -1}, {"warmup": 1.0}, {"warmup": -0.1}]
    )
    def test_rates_out_of_range_are_refused(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="rates are at least 0 and warmup lies in"):
            Schedule(**wrong)  # type: ignore[arg-type]

    def test_other_optimizers_are_refused(self) -> None:
        with pytest.raises(ValueError, match="sgd or adamw, got 'lion'"):
            Schedule(optimizer="lion")


class TestEpochs:
    def made(self, net: SuperNet, task: Any, seed: int = SEED) -> SupernetModule:
        return SupernetModule(
            net, task, Uniform(net.space), Plain(), subnets=1, schedule=Schedule(), seed=seed, total_steps=9
        )

    def test_the_order_depends_on_seed_and_epoch_only(self, net: SuperNet, spots: Any, monkeypatch: Any) -> None:
        module = self.made(net, spots())
        epochs = Epochs(module)
        assert len(epochs) == 3

        def labels(epoch: int, disturb: int) -> Tensor:
            monkeypatch.setattr(SupernetModule, "current_epoch", epoch)
            np.random.seed(disturb)  # noqa: NPY002 (the disturbance)
            torch.manual_seed(disturb)
            drawn = torch.cat([y for _, y in epochs])
            return torch.cat([drawn.double(), torch.rand(3).double()])  # dropout follows too

        assert torch.equal(labels(0, 1), labels(0, 2)) and torch.equal(labels(7, 1), labels(7, 2))
        assert not torch.equal(labels(0, 1), labels(1, 1))
        other = Epochs(self.made(net, spots(), seed=6))
        assert not torch.equal(torch.cat([y for _, y in other]), labels(7, 1)[:-3])

    def test_ranks_share_each_batch(self, net: SuperNet, spots: Any, monkeypatch: Any) -> None:
        module = self.made(net, spots())
        monkeypatch.setattr(SupernetModule, "current_epoch", 0)
        whole = [x for x, _ in Epochs(module)]
        monkeypatch.setattr(SupernetModule, "world", 2)
        parts = []
        for rank in (0, 1):
            monkeypatch.setattr(SupernetModule, "global_rank", rank)
            parts.append([x for x, _ in Epochs(module)])
        for batch, even, odd in zip(whole, *parts, strict=True):
            assert torch.equal(batch[0::2], even) and torch.equal(batch[1::2], odd)


class TestOptimizers:
    @pytest.mark.parametrize("name", ["sgd", "adamw"])
    def test_every_parameter_is_in_exactly_one_group(self, net: SuperNet, spots: Any, name: str) -> None:
        schedule = Schedule(optimizer=name, weight_decay=0.3)
        module = SupernetModule(
            net, spots(), Uniform(net.space), Plain(), subnets=1, schedule=schedule, seed=0, total_steps=9
        )
        weights, scales = module.configure_optimizers()
        members = [p for o in (weights, scales) for g in o.param_groups for p in g["params"]]
        assert len(members) == len({id(p) for p in members}) and {id(p) for p in members} == {
            id(p) for p in net.parameters()
        }
        for group in weights.param_groups:
            assert group["weight_decay"] == (0.3 if group["params"][0].dim() > 1 else 0)
            assert len({p.dim() > 1 for p in group["params"]}) == 1
        relative, absolute = scales.param_groups
        assert relative["params"] == [net.bank.scale] and relative["relative"]
        assert absolute["params"] == [net.bank.zero_point] and not absolute["relative"]

    def test_frozen_parameters_stay_out(self, net: SuperNet, spots: Any) -> None:
        weight = net.model.get_parameter("0.weight")
        weight.requires_grad_(False)
        module = SupernetModule(
            net, spots(), Uniform(net.space), Plain(), subnets=1, schedule=Schedule(), seed=0, total_steps=9
        )
        members = [p for g in module.configure_optimizers()[0].param_groups for p in g["params"]]
        assert not [p for p in members if p is weight]

    def test_a_step_trains_at_least_one_subnet(self, net: SuperNet, spots: Any) -> None:
        with pytest.raises(ValueError, match="at least one subnet, got subnets=0"):
            SupernetModule(
                net, spots(), Uniform(net.space), Plain(), subnets=0, schedule=Schedule(), seed=0, total_steps=9
            )


class TestStep:
    def by_hand(self, net: SuperNet, task: Any, losses: Any, subnets: int) -> None:
        """Leave in `net` the gradients that the first step of a run must have, by one backward of the summed loss."""
        net.train()
        torch.manual_seed(SEED * 1_000_003)
        images, labels = next(iter(task.train(np.random.default_rng([SEED, 0, 0]))))
        rows = Uniform(net.space).ask(subnets, np.random.default_rng([SEED, 1, 0]))
        total, teacher = torch.zeros(()), None
        for k, row in enumerate(rows):
            with net.as_subnet(row):
                logits = net(images)
            total = total + losses.subnet_loss(k, logits, labels, task, teacher)
            teacher = logits.detach()
        extra = losses.regulariser(net)
        (total if extra is None else total + extra).backward()

    @pytest.mark.parametrize(
        "losses", [Plain(), GroupProgressive(distribution=WeightDistribution())], ids=["plain", "guided"]
    )
    @pytest.mark.parametrize("clip", [0.0, 0.05])
    def test_one_update_is_that_of_the_summed_loss(
        self, net: SuperNet, spots: Any, tmp_path: Path, losses: Any, clip: float
    ) -> None:
        schedule = Schedule(lr=0.1, scale_lr=0.01, zero_point_lr=0.02, weight_decay=0.01, clip=clip)
        task = spots(n=8)
        expected = copy.deepcopy(net)
        self.by_hand(expected, task, losses, subnets=3)
        start = {n: p.detach().clone() for n, p in net.named_parameters()}
        one_step(net, task, tmp_path, losses=losses, subnets=3, schedule=schedule)
        moved = 0
        for (name, p), q in zip(net.named_parameters(), expected.parameters(), strict=True):
            before = start[name]
            if q.grad is None or not q.grad.any():
                assert torch.equal(p, before), name
                continue
            grad, moved = q.grad, moved + 1
            if name == "bank.zero_point":
                wanted = before - 0.02 * torch.sign(grad)  # the first step of Adam
            elif name == "bank.scale":
                wanted = before * torch.exp(-0.01 * torch.sign(grad))
            else:
                grad = grad.clamp(-clip, clip) if clip else grad
                wanted = before - 0.1 * 1.9 * (grad + (0.01 * before if p.dim() > 1 else 0))  # Nesterov's first step
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
            if name.startswith("bank."):
                assert torch.equal(p[grad == 0], before[grad == 0]) and 5 < int((grad != 0).sum()) < len(grad) / 2
        assert moved == len(start)

    def test_scales_of_choices_that_were_not_drawn_are_bit_identical(
        self, net: SuperNet, spots: Any, tmp_path: Path
    ) -> None:
        start = {n: q.scale.detach().clone() for n, q in net.quantizers.items()}
        rows = Uniform(net.space).ask(2, np.random.default_rng([SEED, 1, 0]))
        one_step(net, spots(n=8), tmp_path, subnets=2)
        for layer in net.layers:
            for gene, what in ((layer.weight, "weight"), (layer.input, "input")):
                name, at = f"{layer.name}.{what}_quantizer", net.space.position[gene]
                quantizer, active = net.quantizers[name], net.space.active(rows)[:, at]
                drawn = {int(i) for i, on in zip(rows[:, at], active, strict=True) if on}
                for k, (first, n) in enumerate(quantizer.spans):
                    span = slice(first, first + n)
                    same = torch.equal(quantizer.scale.detach()[span], start[name][span])
                    bypassed = quantizer.bypass and quantizer.choices[k].bits >= quantizer.bypass
                    assert same == (k not in drawn or bool(bypassed)), (name, k)

    def test_blocks_that_do_not_run_do_not_move(self, net: SuperNet, spots: Any, tmp_path: Path) -> None:
        shallow = net.space.pin({"3.depth": 1})
        start = {n: p.detach().clone() for n, p in net.named_parameters()}
        one_step(net, spots(), tmp_path, sampler=Recorder(shallow))
        moved = {n for n, p in net.named_parameters() if not torch.equal(p, start[n])}
        assert moved and not [n for n in moved if n.startswith("model.3.1.")]


class TestFeedback:
    def test_none_is_told_nothing(self, net: SuperNet, spots: Any, tmp_path: Path) -> None:
        sampler = Recorder(net.space)
        one_step(net, spots(), tmp_path, sampler=sampler)
        assert not sampler.told

    def test_train_loss_is_told_after_every_step(self, net: SuperNet, spots: Any, tmp_path: Path, another: Any) -> None:
        sampler, twin, task = Recorder(net.space, "train_loss"), another().train(), spots()
        one_step(net, task, tmp_path, sampler=sampler, losses=Plain(), subnets=2)
        assert [(step, total) for _, _, step, total in sampler.told] == [(0, 3), (1, 3), (2, 3)]
        torch.manual_seed(SEED * 1_000_003)
        images, labels = next(iter(task.train(np.random.default_rng([SEED, 0, 0]))))
        rows, (scores, _), _, _ = sampler.told[0]
        for row, score in zip(rows, scores, strict=True):
            with twin.as_subnet(row):
                assert float(task.loss(twin(images), labels).detach()) == pytest.approx(score, rel=1e-5)

    def test_select_loss_is_told_every_so_many_steps_on_select(self, net: SuperNet, spots: Any, tmp_path: Path) -> None:
        sampler, task = Recorder(net.space, "select_loss", every=2), spots(n=40)

        def measured(rows: Indices) -> list[float]:
            twin, losses = copy.deepcopy(net), []
            for row in rows:
                with torch.no_grad(), twin.as_subnet(row), recalibrated(twin, task.recalibrate()):
                    twin.eval()
                    images, labels = (torch.cat(parts) for parts in zip(*task.select(), strict=True))
                    losses.append(float(task.loss(twin(images), labels)))
            return losses

        sampler.at_telling = measured
        before = net.training
        one_step(net, task, tmp_path, sampler=sampler, subnets=2)
        assert [step for _, _, step, _ in sampler.told] == [1, 3]
        for rows, (scores, expected), _, _ in sampler.told:
            assert len(rows) == 2 and scores == pytest.approx(expected, rel=1e-4)
        assert net.training == before


def test_a_model_of_plain_layers_is_trained_in_training_mode(spots: Any, tmp_path: Path) -> None:
    """Its BatchNorm moves: the statistics of the last subnets that ran."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    net = SuperNet(model, spots().example(), bits=(4, 8))
    net.calibrate(spots().recalibrate())
    one_step(net.eval(), spots(), tmp_path)
    assert net.model.get_buffer("1.num_batches_tracked") == 9
