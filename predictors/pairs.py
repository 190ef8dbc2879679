"""Measured subnets: what a predictor learns from, one line of pairs.jsonl each."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.measuring import Measurer, check
from supernet.artefacts import progress as show_progress
from supernet.artefacts import read_jsonl
from supernet.config import SubnetConfig
from supernet.elastic.supernet import SuperNet
from supernet.interfaces import Engine, Sampler, Task
from supernet.samplers.cost_first import CostFirst
from supernet.space import Indices, SearchSpace, magnitude

log = logging.getLogger(__name__)
CHUNK = 64
"""Subnets drawn at once; a longer collection starts with the same subnets as a shorter one."""
BARREN = 5
"""Draws of that many in a row without a new subnet after which a space counts as exhausted."""


@dataclass(frozen=True)
class Pairs:
    """Subnets and what was measured of them.

    Attributes:
        fingerprint: of the space.
        indices: [n, d] canonical rows.
        scores: [n] accuracy on select, 0..1.
        halves: [n, 2] accuracy on the even and on the odd images: how well the measurement repeats.
        costs: kind -> [n] in the kind's unit.
    """

    fingerprint: str
    indices: Indices
    scores: NDArray[np.float64]
    halves: NDArray[np.float64]
    costs: dict[str, NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, at: NDArray[np.int64]) -> Pairs:
        """The pairs at positions `at`."""
        costs = {kind: values[at] for kind, values in self.costs.items()}
        return Pairs(self.fingerprint, self.indices[at], self.scores[at], self.halves[at], costs)

    def split(self, rng: np.random.Generator, share: float = 0.2) -> tuple[Pairs, Pairs]:
        """(the rest, a random `share` of at least one pair); neither may be empty.

        Raises:
            ValueError: fewer than two pairs, or a share outside (0, 1).
        """
        if len(self) < 2 or not 0 < share < 1:
            raise ValueError(f"a split needs two or more pairs and a share in (0, 1), got {len(self)} and {share}")
        order = rng.permutation(len(self))
        held = min(len(self) - 1, max(1, round(share * len(self))))
        return self.take(np.sort(order[held:])), self.take(np.sort(order[:held]))

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], fingerprint: str) -> Pairs:
        """Pairs of the records of one space, in order of subnet id: however they were collected, the same order."""
        ordered = sorted(records, key=lambda r: str(r["id"]))
        kinds = ordered[0]["costs"] if ordered else {}
        return cls(
            fingerprint,
            np.array([r["row"] for r in ordered], dtype=np.int64),
            np.array([r["score"] for r in ordered], dtype=float),
            np.array([r["halves"] for r in ordered], dtype=float).reshape(-1, 2),
            {kind: np.array([r["costs"][kind] for r in ordered], dtype=float) for kind in kinds},
        )

    @classmethod
    def from_file(cls, path: Path | str, space: SearchSpace) -> Pairs:
        """Every pair of a file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is broken, empty, or of another space (names both fingerprints).
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no pairs at {path}; measure some with `elastibit predict run=...`")
        records = read_jsonl(path)
        if not records:
            raise ValueError(f"{path} holds no complete pair; measure some with `elastibit predict run=...`")
        check(records, {"fingerprint": space.fingerprint}, path)
        return cls.of(records, space.fingerprint)


def plan(net: SuperNet, n: int, rng: np.random.Generator, sampler: Sampler | None = None) -> list[SubnetConfig]:
    """The n distinct subnets that `collect` measures: landmarks first (uniform bits, extremes), then drawn ones.

    A longer plan starts with a shorter one from an equal generator. Fewer come back where the space has no more to
    offer.
    """
    space = net.space
    sampler = sampler or CostFirst(space, net.costs)
    chosen = {config.id: config for config in landmarks(space)}
    barren = 0
    while len(chosen) < n and barren < BARREN:
        before = len(chosen)
        for row in sampler.ask(CHUNK, rng):
            config = space.config(row)
            chosen.setdefault(config.id, config)
        barren = 0 if len(chosen) > before else barren + 1
    if len(chosen) < n:
        log.warning("%d pairs were asked for, but only %d distinct subnets were found", n, len(chosen))
    return list(chosen.values())[:n]


def landmarks(space: SearchSpace) -> list[SubnetConfig]:
    """The largest and smallest subnet, and those with as many bits for weights as for inputs, w2a2, w3a3, ..."""
    offered = [
        {magnitude(c) for d in space.dimensions if d.quantizes and d.name.endswith(kind) for c in d.choices}
        for kind in ("weight", "input")
    ]
    uniform = [space.uniform(f"w{b}a{b}") for b in sorted(set.intersection(*offered))]
    return [space.largest(), space.smallest(), *uniform]


def collect(
    net: SuperNet,
    task: Task,
    n: int,
    *,
    out: Path | str | None = None,
    rng: np.random.Generator | None = None,
    recalibrate_images: int | None = None,
    select_images: int | None = None,
    sampler: Sampler | None = None,
    engine: Engine | None = None,
    progress: bool = True,
) -> Pairs:
    """Measure n distinct subnets, spread evenly over log cost, each with its own BatchNorm statistics.

    Which subnets depends on `rng` alone, and each is written as soon as it is measured: a run that was killed goes on
    where it stopped and ends with the same set. Pairs that the file has already are kept and not measured again.

    Args:
        net: the supernet, calibrated or trained.
        task: gives the recalibration and the select images.
        n: number of pairs, at least 1.
        out: pairs.jsonl; None keeps the pairs in memory only.
        rng: draws the subnets; None: one seeded with 0.
        recalibrate_images, select_images: images used of each part; None: all.
        sampler: draws the subnets; None: cost-first over BitOps.
        engine: how subnets are measured; None: one after the other, in this process.
        progress: show it.

    Returns:
        All pairs of the file, or the n measured.

    Raises:
        ValueError: n < 1, or a file with pairs of another space, of other weights or of other numbers of images.
    """
    if n < 1:
        raise ValueError(f"the number of pairs must be at least 1, got {n}")
    measurer = Measurer(
        net, task, recalibrate_images=recalibrate_images, select_images=select_images, out=out, engine=engine
    )
    configs = plan(net, n, rng or np.random.default_rng(0), sampler)
    with ExitStack() as stack:
        bar = stack.enter_context(show_progress("measuring subnets", len(configs))) if progress else None
        for record in measurer(configs):
            if bar:
                bar.advance(note=f"{record['score']:.1%}")
    return Pairs.of(list(measurer.records.values()), net.fingerprint)
