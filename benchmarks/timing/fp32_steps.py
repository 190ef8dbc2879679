"""The fp32 training steps that everything else is compared with; torch and timm are all they need."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import problems
from benchmarks.timing.contestants import SANDWICH, STEP, SUBNETS, Contestant, Problem


class Plain:
    """fp32 training; its sandwich is as many forward and backward passes as ours has, and one update."""

    def __init__(self, contestant: Contestant, problem: Problem, seed: int) -> None:
        start = time.perf_counter()
        torch.manual_seed(seed)
        self.batch = problems.batch(problem, contestant.layout, seed)
        self.module = problems.network(problem).to(memory_format=problems.memory_format(contestant.layout)).train()
        self.optimizers: list[torch.optim.Optimizer] = [problems.sgd(self.module.parameters())]
        self.run = torch.compile(self.module) if contestant.compile == "whole" else self.module
        self.seconds = {"build": time.perf_counter() - start}
        self.measures = {STEP: lambda: self.passes(1), SANDWICH: lambda: self.passes(SUBNETS)}

    def passes(self, n: int) -> Tensor:
        """n forward and backward passes and one update; the last loss."""
        images, labels = self.batch
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for _ in range(n):
            loss = F.cross_entropy(self.run(images), labels)
            loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()
