"""From a tool's sweep to its assignment for each of our limits, counted as we count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.assigning.problem import Sweep
from benchmarks.assigning.sweep import dearest_within
from supernet.config import SubnetConfig
from supernet.elastic.supernet import SuperNet
from supernet.export.bit_maps import import_bits


def imported(net: SuperNet, content: Any) -> SubnetConfig:
    """The subnet that a tool's map means.

    Bits are taken as they are said. Where a map says nothing of granularity and symmetry (MCT), or what it says is
    ModelOpt's or AIMET's own way, weights are per channel, inputs per tensor, both symmetric, or the next that the
    space has at these bits.
    """
    return import_bits(net, content, loose=True)


def chosen(net: SuperNet, sweep: Sweep, limits: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """For each budget that the tool can keep, its dearest assignment within it, with its BitOps."""
    costs = [net.costs.of(imported(net, entry["map"]))["bitops"] for entry in sweep]
    found = {}
    for budget, limit in limits.items():
        at = dearest_within(costs, limit)
        if at is not None:
            found[budget] = {"limit": limit, "bitops": costs[at]} | sweep[at]
    return found
