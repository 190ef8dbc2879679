"""Training steps under bf16 autocast on any device: the float network's and ours; see benchmarks/gpu.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import problems
from benchmarks.timing.contestants import SUBNETS
from benchmarks.timing.device import synchronize
from benchmarks.timing.steps import Loss
from supernet.backbones.cifar_resnet import CifarResNet
from supernet.elastic.supernet import SuperNet
from supernet.samplers.sandwich import Sandwich
from supernet.training.losses import GroupProgressive
from supernet.training.module import Schedule, SupernetModule

VARIANTS = {  # name -> mode of compilation, deployment sites; what compiles soonest first, as time may run out
    "bf16.eager": ("off", False),
    "bf16.compiled": ("whole", False),
    "ours.regional": ("regional", True),
    "ours.whole": ("whole", True),
    "ours.regional.no_sites": ("regional", False),
    "ours.quantizers": ("quantizers", True),
    "ours.off": ("off", True),
}


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        model, size, batch, classes: the network and its images [batch, 3, size, size].
        rounds: at most; `steps` steps of each variant in each.
        configurations: random ones over which graphs are counted.
        product, copied: the side of the square matrices, and the bytes of the copy, that show the ceilings.
        calibration: batches that scales start from.
        patience: what the seconds that parts need are multiplied by.
    """

    model: str = "resnet18"
    size: int = 224
    batch: int = 256
    classes: int = 1000
    rounds: int = 40
    steps: int = 2
    configurations: int = 200
    product: int = 8192
    copied: int = 1 << 31
    calibration: int = 2
    patience: float = 1.0


@dataclass
class Side:
    """One variant, ready to train.

    Attributes:
        train: forward and backward passes of that many subnets (the float network: of itself); the last loss.
        seconds: of the parts of its preparation.
    """

    module: nn.Module
    optimizers: list[torch.optim.Optimizer]
    batch: tuple[Tensor, Tensor]
    train: Callable[[int], Tensor]
    seconds: dict[str, float] = field(default_factory=dict)

    def step(self, subnets: int = 1) -> Tensor:
        """Forward and backward passes of `subnets` subnets, and one update; the last loss."""
        self.clear()
        loss = self.train(subnets)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def clear(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


def network(setting: Setting) -> nn.Module:
    """The float network with random weights, the last BatchNorm of a block not at zero."""
    if setting.model == "resnet8":
        return CifarResNet(8, channels=(4, 4, 8))
    import timm

    return timm.create_model(setting.model, num_classes=setting.classes, zero_init_last=False)


def images(setting: Setting, device: str, seed: int) -> Tensor:
    """Random images [batch, 3, size, size] in channels_last."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(setting.batch, 3, setting.size, setting.size, generator=rng)
    return x.to(device, memory_format=torch.channels_last)


def side(name: str, setting: Setting, device: str, seed: int) -> Side:
    """Build one variant and take its first step."""
    mode, sites = VARIANTS[name]
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, setting.classes, (setting.batch,), generator=rng).to(device)
    batch = images(setting, device, seed), labels
    made = plain_side(mode, setting, batch) if name.startswith("bf16") else our_side(mode, sites, setting, batch, seed)
    start = time.perf_counter()
    made.step()
    synchronize(device)
    made.seconds["first_step"] = time.perf_counter() - start
    for _ in range(2):
        made.step()
    return made


def plain_side(mode: str, setting: Setting, batch: tuple[Tensor, Tensor]) -> Side:
    """The float network under autocast."""
    x, labels = batch
    module = network(setting).to(x.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    run = torch.compile(module) if mode == "whole" else module

    def train(subnets: int) -> Tensor:
        for _ in range(subnets):
            with torch.autocast(x.device.type, torch.bfloat16):
                loss = F.cross_entropy(run(x), labels)
            loss.backward()
        return loss.detach()

    return Side(module, [problems.sgd(module.parameters())], batch, train)


def our_side(mode: str, sites: bool, setting: Setting, batch: tuple[Tensor, Tensor], seed: int) -> Side:
    """The supernet under autocast: random configurations, or a sandwich with distillation."""
    x, labels = batch
    net = SuperNet(network(setting), x[:1].cpu().contiguous(), sites=sites)
    net = net.to(x.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    start = time.perf_counter()
    net.calibrate([images(setting, str(x.device), seed + 1 + k) for k in range(setting.calibration)])
    synchronize(x.device.type)
    seconds = {"scales": time.perf_counter() - start}
    net.train()
    net.compile(mode)
    losses, rng = GroupProgressive(), np.random.default_rng([seed, 1])
    task: Any = Loss()
    sampler = Sandwich(net.space, net.costs)
    schedule = Schedule(
        lr=problems.LEARNING_RATE, momentum=problems.MOMENTUM, weight_decay=problems.WEIGHT_DECAY, clip=0.0
    )
    module = SupernetModule(net, task, sampler, losses, subnets=SUBNETS, schedule=schedule, seed=seed, total_steps=1)

    def train(subnets: int) -> Tensor:
        teacher = None
        rows = sampler.ask(subnets, rng) if subnets > 1 else [net.space.sample(rng)]
        for k, row in enumerate(rows):
            with net.as_subnet(row):
                with torch.autocast(x.device.type, torch.bfloat16):
                    logits = net(x)
                    loss = losses.subnet_loss(k, logits, labels, task, teacher)
                loss.backward()
            teacher = logits.detach()
        return loss.detach()

    return Side(net, module.configure_optimizers(), batch, train, seconds)
