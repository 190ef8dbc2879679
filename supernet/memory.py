"""What a process frees stays with it, for the next step to use, and lies on huge pages where the system has them.

glibc gives large blocks back to the system as soon as they are freed, and the system clears the pages of every new one:
20,000 page faults in each step of a ResNet-20 at 128x3x32x32. Without them an fp32 step took 181 ms instead of 233, and
an elastic one 198 instead of 226 (measured on two CPU cores). A training process asks for the same blocks again and
again.

Pages of 4 KiB are also slow to look up, most of all in a virtual machine, where each look-up is two: with pages of
2 MiB an fp32 step took 194 ms instead of 236, and an elastic one 212 instead of 263 (measured there).
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # as <malloc.h> numbers them
GROWTH = 64 << 20
"""Bytes that the heap grows by at least."""
MADV_HUGEPAGE, HUGE = 14, 2 << 20
SHARE = 2
"""The heap's room on huge pages is this part of the machine's memory; addresses only, until they are written to."""
MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


@cache
def keep_freed() -> bool:
    """Have large blocks taken from the heap, on huge pages, and the heap never shrink, until the process ends.

    For processes of our own, never on import: it is the whole process that is changed.

    Returns:
        Whether it was done: on Linux with glibc, unless the environment has settings of its own (`MALLOC_*_` or
        `GLIBC_TUNABLES`), which count. Huge pages are asked for where the system leaves that to its processes.
    """
    own = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    if own or "malloc" in os.environ.get("GLIBC_TUNABLES", "") or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    settings = ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, GROWTH))
    if not hasattr(libc, "mallopt") or not all(libc.mallopt(name, value) == 1 for name, value in settings):
        return False
    if _huge_pages_are_there_for_the_asking() and _addresses_are_free():
        _ask_for_huge_pages(libc, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // SHARE)
    return True


def _huge_pages_are_there_for_the_asking() -> bool:
    return MODES.is_file() and "[madvise]" in MODES.read_text()


def _addresses_are_free() -> bool:
    """Whether room may be taken that is not used yet; a refusal would move this thread's heap elsewhere for good."""
    import resource  # not on Windows

    limits = (resource.getrlimit(of)[0] for of in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    counted = OVERCOMMIT.is_file() and OVERCOMMIT.read_text().strip() == "2"
    return all(limit == resource.RLIM_INFINITY for limit in limits) and not counted


def _ask_for_huge_pages(libc: Any, room: int) -> None:
    """Have the heap's next `room` bytes on huge pages: grown by them at once, marked, and freed to be taken again."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(room)
    if start is None:
        return
    first = -(-start // HUGE) * HUGE
    libc.madvise(first, (start + room - first) // HUGE * HUGE, MADV_HUGEPAGE)
    libc.free(start)
