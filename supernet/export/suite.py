"""Several profiles at once: `profile=all`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """Every one of some profiles that a subnet can have; `supernet.export.bundle` writes each into a folder of its own.

    Args:
        profiles: names of files of conf/profile.

    Raises:
        ValueError: none, or one twice.
    """

    profiles: Sequence[str]

    def __post_init__(self) -> None:
        if not self.profiles or len(set(self.profiles)) < len(self.profiles):
            raise ValueError(
                f"a suite takes profiles, each once, got {list(self.profiles)}; e.g. profile.profiles=[int8,packed]"
            )
