"""The peers' training steps, called as their documentation says; runs in the peer's own environment.

Each quantizes an ordinary model with two calibration batches; what it returns trains like any module.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import problems
from benchmarks.timing.contestants import STEP, Contestant, Problem


def modelopt(model: nn.Module, batches: list[Tensor], problem: Problem) -> nn.Module:
    """NVIDIA ModelOpt: weights per channel, inputs per tensor, 8 bits, static ranges."""
    import modelopt.torch.quantization as mtq  # type: ignore[import-not-found]

    def loop(model: nn.Module) -> None:
        for images in batches:
            model(images)

    return mtq.quantize(model, mtq.INT8_DEFAULT_CFG, loop)


def nncf(model: nn.Module, batches: list[Tensor], problem: Problem) -> nn.Module:
    """NNCF: 8 bits, learned ranges, a kernel of its own that is compiled at first use."""
    import nncf  # type: ignore[import-not-found]

    kind = {"model_type": nncf.ModelType.TRANSFORMER} if problem.name.startswith("vit") else {}
    return nncf.quantize(model.eval(), nncf.Dataset(batches), subset_size=len(batches), **kind)


def brevitas(model: nn.Module, batches: list[Tensor], problem: Problem) -> nn.Module:
    """Brevitas, layer by layer: 8 bits for weights and inputs, scales from statistics, then learned."""
    from brevitas.graph.calibrate import calibration_mode  # type: ignore[import-not-found]
    from brevitas.graph.quantize import layerwise_quantize  # type: ignore[import-not-found]

    quantized = layerwise_quantize(model).eval()
    with torch.no_grad(), calibration_mode(quantized):
        for images in batches:
            quantized(images)
    return quantized


QUANTIZE: dict[str, Callable[[nn.Module, list[Tensor], Problem], nn.Module]] = {
    "modelopt": modelopt,
    "nncf": nncf,
    "brevitas": brevitas,
}


class Peer:
    """Training of a model that a peer has quantized."""

    def __init__(self, contestant: Contestant, problem: Problem, seed: int) -> None:
        start = time.perf_counter()
        torch.manual_seed(seed)
        self.batch = problems.batch(problem, contestant.layout, seed)
        model = problems.network(problem).to(memory_format=problems.memory_format(contestant.layout))
        built = time.perf_counter()
        two = problems.calibration(problem, contestant.layout, seed, images=2 * problem.batch)
        self.module = QUANTIZE[contestant.kind](model, two, problem).train()
        self.seconds = {"build": built - start, "scales": time.perf_counter() - built}
        self.optimizers: list[torch.optim.Optimizer] = [problems.sgd(self.module.parameters())]
        self.measures = {STEP: self.one}

    def one(self) -> Tensor:
        """A training step; its loss."""
        images, labels = self.batch
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.module(images), labels)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()
