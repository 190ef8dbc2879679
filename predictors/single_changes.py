"""One choice of one tensor quantized, all else in float: what that does to the output of the network.

A space of 7 bit-widths in all forms has 42 choices for each layer, each a pass over the images. Most of them can be
spared: what a choice does to the network follows from what it does to the output of its own layer, which costs a
matrix product, along a curve of each tensor's own; so a few choices are run and the others read off that curve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from predictors.layer_outputs import observed, relative_errors
from predictors.sensitivity import Table, evaluated, sites, switched_on
from supernet.artefacts import progress
from supernet.elastic.supernet import SuperNet

BATCH = 64
"""Images of one pass."""
POSITIONS = 256
"""Output positions of each layer for the error of its own output."""

Judge = Callable[[Tensor, Tensor], float]


def single_changes(
    net: SuperNet, images: Tensor, judge: Judge, title: str, runs: int | None = None
) -> dict[str, Table]:
    """What `judge` says of the network with one choice switched on, for every choice of every gene, by its name.

    BatchNorm keeps the statistics of the float network.

    Args:
        net: left as it was.
        images: [n, ...].
        judge: (logits of the float network, logits with the change) -> how bad that is.
        title: of the progress display.
        runs: choices of each tensor that are run, at least 2: those of least and most error of the layer's output and
            some between, evenly spread over the log of that error; the others are interpolated, linearly in the
            error. None: all are run.
    """
    errors: dict[str, Table] = {}
    if runs is not None:
        seen = observed(net, images, POSITIONS, np.random.default_rng(0))
        own = {x.name: relative_errors(net.model.get_submodule(x.name), seen[x.name].inputs) for x in net.layers}
        errors = {gene: own[layer.name][gene == layer.input] for layer, gene, _ in sites(net)}
    found: dict[str, Table] = {}
    with torch.no_grad(), evaluated(net, net.space.largest(), images, floating=True) as run:
        tensors = list(sites(net))
        picked = {g: anchors(errors[g], runs) if runs else np.arange(len(o.quantizer.choices)) for _, g, o in tensors}
        exact = passed(run, images)
        with progress(title, sum(map(len, picked.values()))) as bar:
            for _, gene, operand in tensors:
                judged = []
                for choice in picked[gene].tolist():
                    with switched_on(operand.quantizer, choice):
                        judged.append(judge(exact, passed(run, images)))
                    bar.advance(note=gene)
                found[gene] = np.array(judged) if runs is None else between(errors[gene], picked[gene], judged)
    return found


def passed(run: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Logits of all images, batch by batch."""
    return torch.cat([run(part) for part in images.split(BATCH)])


def checked(runs: int | None) -> int | None:
    """`runs` as it is.

    Raises:
        ValueError: fewer than 2, between which nothing can be interpolated.
    """
    if runs is not None and runs < 2:
        raise ValueError(f"runs must be at least 2, or null for every choice, got {runs}")
    return runs


def anchors(errors: Table, count: int) -> NDArray[np.int64]:
    """Positions of at most `count` of some errors, in ascending order of them and evenly spread over their logs."""
    logs = np.log(np.maximum(errors, 1e-20))
    wanted = np.linspace(logs.min(), logs.max(), count)
    nearest = np.unique(np.abs(logs[:, None] - wanted).argmin(0))
    _, distinct = np.unique(errors[nearest], return_index=True)
    return nearest[distinct]


def between(errors: Table, picked: NDArray[np.int64], judged: list[float]) -> Table:
    """What was judged of the picked positions, and for the others what lies between by error."""
    return np.interp(errors, errors[picked], judged)
