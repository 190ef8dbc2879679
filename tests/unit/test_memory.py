"""Freed memory stays with the process: counted in page faults by processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HELD = """
import sys
import numpy as np
from supernet.memory import keep_freed

print(keep_freed() if sys.argv[1] == "keep" else None)
held = np.ones(256 << 20, np.uint8)
print(*(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith(("AnonHugePages", "Rss"))))
"""


def faults(how: str, **environment: str) -> tuple[str, list[int]]:
    """What `keep_freed` says, and the page faults of writing to 64 MiB and freeing them, each time."""
    said, *counts = run(SCRIPT, how, **environment)
    return said, [int(count) for count in counts]


def run(script: str, how: str, **environment: str) -> list[str]:
    """The words that a script says in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    huge = {"NUMPY_MADVISE_HUGEPAGE": "0"}  # numpy asks for none
    done = subprocess.run(
        [sys.executable, "-c", script, how], env=kept | huge | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


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


@pytest.mark.skipif(
    not MODES.is_file() or "[madvise]" not in MODES.read_text(), reason="the system decides on huge pages by itself"
)
def test_the_heap_lies_on_huge_pages_and_is_no_larger_for_it() -> None:
    _, resident, huge = run(HELD, "default")
    said, kept, on_huge = run(HELD, "keep")
    assert said == "True" and int(huge) < 16 << 10
    assert int(on_huge) > 200 << 10  # of 256 MiB, in KiB
    assert int(kept) < int(resident) + (16 << 10)


def test_a_limit_on_addresses_leaves_the_rest_as_it_is() -> None:
    limit = "import resource\n\nresource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
    said, _, *later = run(limit + SCRIPT, "keep")
    assert said == "True" and all(int(count) < 0.01 * PAGES for count in later)
