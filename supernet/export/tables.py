"""The tables of one target in a run: written by `probe`, read by `search`."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from supernet.artefacts import provenance, read_json, write_json
from supernet.config import SubnetConfig
from supernet.cost import Factors
from supernet.elastic.supernet import SuperNet
from supernet.export.latency import Anatomy, Writes, materialised
from supernet.export.legality import legal
from supernet.export.table import Table
from supernet.interfaces import Target
from supernet.space import SearchSpace

log = logging.getLogger(__name__)

LANDMARKS = 3
"""Subnets besides the two largest whose time corrects the sum."""


class Tables:
    """`probe/<target>/` of a run: legality-<profile>.jsonl, latency.jsonl, whole-<profile>.json.

    Args:
        run: the run directory.
        target: what was probed.
        profile: name of the profile that subnets are written with; times are by piece, whichever profile writes it.
        fresh: throw away what there is.

    Raises:
        ValueError: a table of another machine or version.
    """

    def __init__(self, run: Path, target: Target, profile: str, fresh: bool = False) -> None:
        self.folder, self.target, self.profile = run / "probe" / target.name, target, profile
        self.command = f"`elastibit probe run={run} target={target.name} profile={profile}`"
        origin, again = target.origin(), "fresh=true"
        self.legality = Table(self.folder / f"legality-{profile}.jsonl", origin, fresh, again)
        self.latency = Table(self.folder / "latency.jsonl", origin, fresh, again)
        self.whole = self.folder / f"whole-{profile}.json"
        if fresh:
            self.whole.unlink(missing_ok=True)

    def factors(self, net: SuperNet) -> Factors:
        """Seconds of every subnet, corrected by what whole subnets took.

        Raises:
            FileNotFoundError: this run was not probed, or not to the end.
            ValueError: it was probed for another space, or on another machine.
        """
        if not self.whole.is_file():
            raise FileNotFoundError(f"no latencies at {self.whole}; measure them with {self.command}")
        found = read_json(self.whole)
        if found.get("fingerprint") != net.fingerprint:
            raise ValueError(
                f"{self.whole} is of space {found.get('fingerprint')}, this run of {net.fingerprint}; measure them "
                f"with {self.command}"
            )
        if found.get("origin") != self.target.origin():
            raise ValueError(f"{self.whole} is of another machine or version; measure anew with {self.command}")
        terms = [
            (tuple(net.space.position[name] for name in term["genes"]), np.array(term["seconds"], dtype=float))
            for term in found["terms"]
        ]
        return Factors(tuple(terms)) * float(found["correction"])

    def seconds(self) -> dict[str, float]:
        """Of each piece, by key."""
        return {key: float(record["seconds"]) for key, record in self.latency.records.items()}

    def call(self) -> float:
        """Seconds of one run, whatever runs."""
        return statistics.median(float(record["call"]) for record in self.latency.records.values())

    def view(self, net: SuperNet, level: str) -> SearchSpace:
        """The part of a net's space that the target runs; see `supernet.export.legality.legal`."""
        if not self.legality.records:
            raise FileNotFoundError(f"no trials at {self.legality.path}; make them with {self.command}")
        return legal(net, self.legality.records, level)


def check(anatomy: Anatomy, target: Target, tables: Tables, n: int, rng: np.random.Generator) -> dict[str, Any]:
    """Time whole subnets beside what the pieces add up to, and write that down.

    The median ratio of the two on a few landmarks (the largest architecture with inputs of 8 bits and of fewer, others
    with less depth) is the one correction that predictions get: in a network caches are emptied by other operators,
    which no piece for itself shows. The n random subnets have no part in it; their errors say what a prediction is
    worth.
    """
    net, sums = anatomy.net, anatomy.factors(tables.seconds(), tables.call())
    rest = anatomy.landmarks[:: -max(1, len(anatomy.landmarks) // LANDMARKS)][:LANDMARKS]
    ends = [net.space.config(row) for row in (anatomy.landmarks[0], anatomy.fewest, *rest)]
    configs = {c.id: c for c in (*ends, *(net.space.sample(rng) for _ in range(n)))}
    measured = target.whole({key: materialised(net, anatomy.profile, c) for key, c in configs.items()})
    added = {key: float(sums.value(np.array([c.row]))[0]) for key, c in configs.items()}
    used = {c.id for c in ends}
    correction = statistics.median(measured[key] / added[key] for key in used)
    rows = []
    for key in configs:
        predicted = added[key] * correction
        figures = {"id": key, "indices": list(configs[key].row)}
        rows.append(
            figures
            | {"sum": added[key], "predicted": predicted, "measured": measured[key], "corrected_by": key in used}
        )
    off = [abs(added[key] * correction / measured[key] - 1) for key in configs if key not in used]
    found = {
        "fingerprint": net.fingerprint,
        "origin": target.origin(),
        "correction": correction,
        "most_off": max(off, default=0.0),
        "subnets": rows,
        "terms": [
            {"genes": [net.space.dimensions[i].name for i in dims], "seconds": seconds.tolist()}
            for dims, seconds in sums.terms
        ],
        "provenance": provenance(None),
    }
    write_json(tables.whole, found)
    return found


def timer(net: SuperNet, tables: Tables, profile: Writes) -> Callable[[SubnetConfig], float]:
    """A function that times a subnet as a whole, in seconds, each once.

    The largest subnet takes turns with it, whose time is known from the probe, and the ratio of the two is what is
    measured: a machine that is busier now than it was then judges no subnet by that. A pace 10 % off is warned of.
    """
    largest = read_json(tables.whole)["subnets"][0]
    reference = materialised(net, profile, np.array(largest["indices"]))
    known: dict[str, float] = {}
    warned: list[float] = []

    def seconds(config: SubnetConfig) -> float:
        if config.id not in known:
            times = tables.target.whole({"": materialised(net, profile, config), "largest": reference})
            known[config.id] = largest["measured"] * times[""] / times["largest"]
            pace = times["largest"] / largest["measured"]
            if abs(pace - 1) > 0.1 and not warned:
                warned.append(pace)
                log.warning("networks take %.2f times as long as when this run was probed; times are put right", pace)
        return known[config.id]

    return seconds
