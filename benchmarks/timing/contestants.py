"""What is timed: three problems, and the ways to take one training step on each of them.

Plain data without torch: the driver reads it, and so do the workers, which may live in a peer's own environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

STEP, SANDWICH, RANDOM_DEPTH = "step", "sandwich", "random_depth"
MEMORY, START, PYTHON = "memory", "start", "python"
MEASURES = (STEP, SANDWICH, RANDOM_DEPTH, MEMORY, START, PYTHON)
"""What can be asked for; the first three are timed in every round, the others once."""

SUBNETS = 4
"""Of a sandwich step: highest bits, two drawn, lowest bits; fp32's sandwich has as many forward and backward passes."""

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
FP32, OURS = "fp32", "ours"


@dataclass(frozen=True)
class Problem:
    """A network and a batch of random images [batch, 3, size, size] with ten classes.

    Attributes:
        allow: modules that our SuperNet may leave in float: the products inside attention have no weights to quantize.
        depth: whether a version with elastic depth is timed too.
    """

    name: str
    batch: int
    size: int
    allow: tuple[str, ...] = ()
    depth: bool = False


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("resnet20", 128, 32, depth=True),
        Problem("resnet18", 16, 64),
        Problem("vit_tiny", 16, 64, allow=("blocks.*.attn",)),
    )
}


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    Attributes:
        name: of the table, the JSON and `--variants`.
        kind: `fp32`, `ours`, or a peer's name.
        compile: fp32: `off` or `whole`; ours: a mode of SuperNet.compile; peers: `off`. (torch.compile of ModelOpt's
            model meets the recompile limit and is not faster, *measured* with 0.47.0 and torch 2.14.)
        layout: memory format of weights and images.
        sites: ours: whether tensors between operators are quantized as well.
        depth: ours: whether the space has elastic depth. Its `step` and `sandwich` draw bits and forms only and run at
            full depth, so that they compare with an fp32 step of the whole network; `random_depth` draws the depth too.
    """

    name: str
    kind: str
    compile: str = "off"
    layout: str = CONTIGUOUS
    sites: bool = True
    depth: bool = False

    @property
    def timed(self) -> tuple[str, ...]:
        """The measures that its worker answers in every round; uncompiled, ours is there for one figure only."""
        if self.kind not in (FP32, OURS) or (self.kind == OURS and self.compile == "off"):
            return (STEP,)
        return (STEP, SANDWICH, RANDOM_DEPTH) if self.depth else (STEP, SANDWICH)


def contestants(problem: Problem, peers: Sequence[str] = ()) -> list[Contestant]:
    """All contestants of a problem: fp32, ours, and the peers that were asked for.

    Ours runs in channels_last, the layout we advise; one variant shows the other layout. ModelOpt, which a goal names,
    is timed in both layouts; the other peers as their documentation calls them.
    """
    fp32 = [
        Contestant(f"fp32.{'eager' if mode == 'off' else 'compiled'}{suffix}", FP32, mode, layout)
        for mode in ("off", "whole")
        for layout, suffix in ((CONTIGUOUS, ""), (CHANNELS_LAST, ".channels_last"))
    ]
    ours = [
        Contestant(f"ours.{mode}", OURS, mode, CHANNELS_LAST) for mode in ("off", "quantizers", "regional", "whole")
    ]
    if problem.depth:  # `whole` refuses elastic depth
        deep = ("quantizers", "regional")
        ours += [Contestant(f"ours.depth.{mode}", OURS, mode, CHANNELS_LAST, depth=True) for mode in deep]
    ours += [replace(one, name=f"{one.name}.no_sites", sites=False) for one in ours]
    ours += [Contestant("ours.whole.contiguous", OURS, "whole", CONTIGUOUS)]
    rivals = [Contestant(peer, peer) for peer in peers]
    if "modelopt" in peers:
        rivals.append(Contestant("modelopt.channels_last", "modelopt", layout=CHANNELS_LAST))
    return fp32 + ours + rivals
