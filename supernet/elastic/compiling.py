"""Which way to compile pays: the time to compile against the time that the planned passes save.

The estimate is a function of the network and the plan alone, so that the same run decides alike every time. Its figures
were measured with `benchmarks/step_time.py` and `benchmarks/compile.py` on two CPU cores; another machine scales both
sides, which leaves the decision nearly as it is. On a GPU they were not measured.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from supernet.elastic.regions import Regions
from supernet.elastic.supernet import SuperNet
from supernet.elastic.wrap import evaluating

# Nanoseconds that a pass spends beyond its convolutions and products for each activation that is quantized.
TRAINING = {"off": 16.0, "quantizers": 4.0, "regional": 2.6, "whole": 2.3}
EVALUATION = {"off": 4.5, "quantizers": 1.2, "regional": 0.7, "whole": 0.7}
# Seconds to compile with an empty cache: the quantizers' functions, one structure, one quantizer of a whole graph.
FUNCTIONS, STRUCTURE, QUANTIZER = 12.0, 7.0, 1.25
SHARE_OF_FORWARD = 0.4


@dataclass(frozen=True)
class Choice:
    """A mode for `SuperNet.compile`, and one line that says why."""

    mode: str
    why: str


def choose(net: SuperNet, examples: int, passes: str = "training") -> Choice:
    """The mode with the least estimated time for a number of examples.

    Args:
        net: the supernet.
        examples: that will pass through it, over all steps and subnets.
        passes: `training` (forward and backward) or `evaluation`.
    """
    rates = TRAINING if passes == "training" else EVALUATION
    part = 1.0 if passes == "training" else SHARE_OF_FORWARD
    work = examples * quantized_elements(net) * 1e-9
    compiling = {mode: part * seconds for mode, seconds in _seconds_to_compile(net).items()}
    total = {mode: seconds + rates[mode] * work for mode, seconds in compiling.items()}
    best = min(total, key=total.__getitem__)
    if best == "off":
        other = min((mode for mode in total if mode != "off"), key=total.__getitem__)
        gain = (rates["off"] - rates[other]) * work
        why = f"{other} would take about {compiling[other]:.0f} s to compile and save about {_spell(gain)}"
    else:
        gain = (rates["off"] - rates[best]) * work
        why = f"takes about {compiling[best]:.0f} s to compile and saves about {_spell(gain)} of {passes}"
    return Choice(best, f"compile={best}: {why}")


def quantized_elements(net: SuperNet) -> int:
    """Activations that are quantized for one example, in the largest subnet."""
    count = 0

    def meet(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count
        count += inputs[0].numel()

    handles = [q.register_forward_pre_hook(meet) for q in net.quantizers.values() if not q.weight]
    try:
        with net.as_subnet(net.space.largest()), evaluating(net), torch.no_grad():
            net.model(net.example.to(net.bank.scale.device))
    finally:
        for handle in handles:
            handle.remove()
    return count // net.example.shape[0]


def _seconds_to_compile(net: SuperNet) -> dict[str, float]:
    """By mode that the network allows."""
    seconds = {"off": 0.0, "quantizers": FUNCTIONS}
    with suppress(ValueError):  # what cannot be traced is no single graph either
        seconds["regional"] = FUNCTIONS + STRUCTURE * Regions(net.model, compile=lambda function: function).structures
        if not net.elastic_depths:
            seconds["whole"] = FUNCTIONS + QUANTIZER * len(net.quantizers)
    return seconds


def _spell(seconds: float) -> str:
    """A duration at the grain that an estimate deserves."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
