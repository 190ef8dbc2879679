"""Our training steps: a new random configuration in every one of them.

Nothing but the step is timed: zero the gradients, draw and bind a configuration (ours), forward, loss, backward,
update. Clipping, schedule and logging of `elastibit train` are left out on both sides: fp32 could have them too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import problems
from benchmarks.timing.contestants import RANDOM_DEPTH, SANDWICH, STEP, SUBNETS, Contestant, Problem
from supernet.backbones.cifar_resnet import CifarResNet
from supernet.elastic.supernet import SuperNet
from supernet.samplers.sandwich import Sandwich
from supernet.training.losses import GroupProgressive
from supernet.training.module import Schedule, SupernetModule


class Loss:
    """The part of a task that a step needs."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(logits, labels)


def network(problem: Problem, depth: bool) -> nn.Module:
    """The float network of a problem, with elastic depth if asked for."""
    if problem.name == "resnet20":
        return CifarResNet(20, min_depth=1 if depth else None)
    return problems.network(problem)


class Elastic:
    """Our training; the calls of SupernetModule.training_step without the Trainer around them."""

    def __init__(self, contestant: Contestant, problem: Problem, seed: int) -> None:
        start = time.perf_counter()
        torch.manual_seed(seed)
        self.batch = problems.batch(problem, contestant.layout, seed)
        net = SuperNet(
            network(problem, contestant.depth), self.batch[0][:1], sites=contestant.sites, allow=problem.allow
        )
        self.net = self.module = net.to(memory_format=problems.memory_format(contestant.layout))
        images = problems.calibration(problem, contestant.layout, seed)
        built = time.perf_counter()
        net.calibrate(images)
        self.seconds = {"build": built - start, "scales": time.perf_counter() - built}
        net.train()
        net.compile(contestant.compile)
        full = {name: max(depths) for name in net.space.position for depths in [_depths(net, name)] if depths}
        self.space = net.space.pin(full) if full else net.space  # fp32's step has all blocks too
        self.sandwich = Sandwich(self.space, net.costs)
        self.losses, self.task, self.rng = GroupProgressive(), Loss(), np.random.default_rng([seed, 1])
        self.optimizers = self._optimizers(seed)
        self.measures: dict[str, Callable[[], Tensor]] = {
            STEP: lambda: self.one(self.space),
            SANDWICH: self.several,
            RANDOM_DEPTH: lambda: self.one(net.space),
        }

    def _optimizers(self, seed: int) -> list[torch.optim.Optimizer]:
        """Those of `elastibit train`: SGD for the weights, LazyAdam for scales and zero-points."""
        schedule = Schedule(
            lr=problems.LEARNING_RATE, momentum=problems.MOMENTUM, weight_decay=problems.WEIGHT_DECAY, clip=0.0
        )
        task: Any = self.task
        return SupernetModule(
            self.net, task, self.sandwich, self.losses, subnets=SUBNETS, schedule=schedule, seed=seed, total_steps=1
        ).configure_optimizers()

    def one(self, space: Any) -> Tensor:
        """A step of one subnet drawn from `space`; its loss."""
        images, labels = self.batch
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with self.net.as_subnet(space.sample(self.rng)):
            loss = self.task.loss(self.net(images), labels)
            loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def several(self) -> Tensor:
        """A sandwich step with distillation from each subnet to the next; the last loss."""
        images, labels = self.batch
        task: Any = self.task
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        teacher = None
        for k, row in enumerate(self.sandwich.ask(SUBNETS, self.rng)):
            with self.net.as_subnet(row):
                logits = self.net(images)
                loss = self.losses.subnet_loss(k, logits, labels, task, teacher)
                loss.backward()
            teacher = logits.detach()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()


def _depths(net: SuperNet, name: str) -> tuple[int, ...]:
    """The choices of a dimension that is a stage's depth; none for any other dimension."""
    choices = net.space.dimensions[net.space.position[name]].choices
    return tuple(c for c in choices if isinstance(c, int)) if name.endswith(".depth") else ()
