"""Assignments measured in one trained supernet: outcome of each test image, kept in a file, and who wins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from benchmarks.assigning.bootstrap import paired
from predictors.measuring import tested, weights_digest
from search.allocation import Program
from supernet.artefacts import append_jsonl, read_jsonl
from supernet.config import SubnetConfig
from supernet.cost import Factors
from supernet.elastic.supernet import SuperNet
from supernet.interfaces import Batch
from supernet.space import magnitude

Outcomes = Bool[np.ndarray, " n"]


class Judge:
    """Outcomes on fixed images, each subnet measured once with BatchNorm statistics of its own.

    Args:
        net: the trained supernet.
        recalibration: images for BatchNorm.
        batches: images and labels to judge on.
        out: file that holds what is known; lines of other weights or other images are passed over.
    """

    def __init__(
        self, net: SuperNet, recalibration: Iterable[Tensor], batches: Iterable[Batch], out: Path | str
    ) -> None:
        self.net, self.recalibration, self.batches, self.out = net, list(recalibration), list(batches), Path(out)
        self.images = sum(len(y) for _, y in self.batches)
        of = {"recalibration": sum(map(len, self.recalibration)), "images": self.images}
        self.origin = {"weights": weights_digest(net)} | of
        known = read_jsonl(self.out) if self.out.exists() else []
        mine = [line for line in known if all(line.get(key) == value for key, value in self.origin.items())]
        self.known: dict[str, Outcomes] = {line["id"]: _unpacked(line["right"], self.images) for line in mine}

    def __call__(self, config: SubnetConfig) -> Outcomes:
        """[images] whether the subnet classifies each right."""
        if config.id not in self.known:
            right = tested(self.net, config, self.recalibration, self.batches)
            packed = np.packbits(right).tobytes().hex()
            append_jsonl(self.out, {"id": config.id} | self.origin | {"right": packed})
            self.known[config.id] = right
        return self.known[config.id]


def _unpacked(text: str, n: int) -> Outcomes:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=n).astype(bool)


def with_best_forms(net: SuperNet, config: SubnetConfig, sensitivity: Factors) -> SubnetConfig:
    """The same bits everywhere, granularity and symmetry as the sensitivity likes them best."""
    space = net.space
    alike = {
        dimension.name: [c for c in dimension.choices if magnitude(c) == magnitude(config[dimension.name])]
        for dimension in space.dimensions
        if dimension.name in config
    }
    return space.config(Program(space.restrict(alike), sensitivity, {}).solve({}))


def compared(ours: Sequence[Outcomes], theirs: Sequence[Outcomes], seed: int = 0) -> dict[str, Any]:
    """Accuracies of both sides, difference with interval and verdict; of several pairs of subnets their mean."""
    totals = [np.array(side, dtype=np.int64).sum(axis=0) for side in (ours, theirs)]
    means = {name: float(total.mean()) / len(ours) for name, total in zip(("ours", "theirs"), totals, strict=True)}
    return means | paired((totals[0] - totals[1]) / len(ours), np.random.default_rng(seed)).plain()
