"""The last judge of a latency budget: the whole network's time, where a sum of tables has only said what to expect."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from search.front import Candidate
from supernet.config import SubnetConfig, si

log = logging.getLogger(__name__)

KIND = "latency"
C = TypeVar("C", bound=Candidate)


class Stopwatch:
    """Times subnets as a whole for budgets that limit latency.

    Args:
        seconds: of a subnet, measured; None: nothing is timed, and every subnet counts as fast enough.
    """

    def __init__(self, seconds: Callable[[SubnetConfig], float] | None) -> None:
        self._seconds = seconds

    def of(self, config: SubnetConfig, limits: Mapping[str, float]) -> float | None:
        """Seconds of a subnet; None where the limits do not ask."""
        return self._seconds(config) if self._seconds is not None and KIND in limits else None

    def fits(self, config: SubnetConfig, limits: Mapping[str, float]) -> bool:
        """Whether a subnet, measured whole, keeps the limit on latency."""
        seconds = self.of(config, limits)
        return seconds is None or seconds <= limits[KIND]

    def first(self, ranked: Iterable[C], limits: Mapping[str, float]) -> C | None:
        """The first candidate that fits; the others are dropped."""
        for dropped, candidate in enumerate(ranked):
            if self.fits(candidate.config, limits):
                if dropped:
                    log.warning(
                        "latency <= %s: dropped %d better candidates, over it whole", si(limits[KIND], "s"), dropped
                    )
                return candidate
        return None

    def require(self, config: SubnetConfig, predicted: float, label: str, limits: Mapping[str, float]) -> None:
        """Raise ValueError unless this subnet, the fastest that there is, fits."""
        if not self.fits(config, limits):
            measured = self.of(config, limits)
            assert measured is not None
            raise ValueError(
                f"the fastest subnet within {label} takes {si(measured, 's')} measured whole (its table says "
                f"{si(predicted, 's')}), the limit is {si(limits[KIND], 's')}; raise budget.latency, or probe again if "
                "the machine was busy"
            )
