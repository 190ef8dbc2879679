"""Freed memory stays with the process: counted in page faults by processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PAGES = 64 << 20 >> 12
SCRIPT = """
import resource, sys
import numpy as np
from supernet.memory import keep_freed

print(keep_freed() if sys.argv[1] == "keep" else None)
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(64 << 20, np.uint8)[::4096] = 1
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> tuple[str, list[int]]:
    """What `keep_freed` says, and the page faults of writing to 64 MiB and freeing them, each time."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    huge = {"NUMPY_MADVISE_HUGEPAGE": "0"}  # a fault each page
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], env=kept | huge | environment, capture_output=True, text=True, check=True
    )
    said, *counts = done.stdout.split()
    return said, [int(count) for count in counts]


def is_glibc() -> bool:
    return sys.platform.startswith("linux") and bool(os.confstr("CS_GNU_LIBC_VERSION"))


pytestmark = pytest.mark.skipif(not is_glibc(), reason="the allocator is not glibc's")


def test_a_block_is_given_back_and_cleared_anew_by_default() -> None:
    _, counts = faults("default")
    assert all(count > 0.9 * PAGES for count in counts)


def test_kept_memory_is_used_again_without_a_fault() -> None:
    said, (_, *later) = faults("keep")
    assert said == "True" and all(count < 0.01 * PAGES for count in later)


@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_settings_of_the_environment_count(environment: dict[str, str]) -> None:
    said, counts = faults("keep", **environment)
    assert said == "False" and all(count > 0.9 * PAGES for count in counts)
