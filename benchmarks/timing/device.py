"""What a device can do, and what a training step asks of it: seconds, ceilings, bytes, operations, kernels."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.timing.peak import resident, step_peak

if TYPE_CHECKING:
    from benchmarks.timing.autocast import Setting, Side

PROFILED = 15
"""Entries of a profile that are kept."""


def synchronize(device: str) -> None:
    """Wait for all that the device was told to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Seconds of one call among `repeats` in a row, between two waits."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def ceilings(setting: Setting, device: str) -> dict[str, float]:
    """TFLOP/s of a large bf16 product and GB/s of a large copy, each the best of five."""
    n = setting.product
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(setting.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = []
    for run in (lambda: torch.mm(a, b), lambda: target.copy_(source)):
        seconds_of(run, device, 3)  # warm-up
        best.append(min(seconds_of(run, device, 10) for _ in range(5)))
    return {"tflops": 2 * n**3 / best[0] / 1e12, "gbytes": 2 * setting.copied / best[1] / 1e9}


def peak(one: Side, device: str) -> int:
    """Most bytes of a step: what it allocates, and what lives through it."""
    one.step()
    one.clear()
    held = resident([*one.module.parameters(), *one.module.buffers(), *one.batch], one.optimizers)
    if torch.device(device).type != "cuda":
        return held + step_peak(one.step)
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one.step()
    synchronize(device)
    return held + torch.cuda.max_memory_allocated() - before


def operations(one: Side) -> int:
    """Floating-point operations of a forward and backward pass of the eager float network, 2 for each multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        one.train(1)
    one.clear()
    return counter.get_total_flops()


@contextlib.contextmanager
def counting_bytes() -> Iterator[Callable[[], int]]:
    """Inside, inductor counts the bytes that the kernels it makes read and write; gives the count so far."""
    from torch._inductor import compile_fx, metrics

    log = getattr(compile_fx, "inductor_metrics_log", logging.getLogger("inductor_metrics"))
    before = log.level, log.propagate
    log.setLevel(logging.INFO)  # some versions of torch count only if somebody listens; nobody needs to read it
    log.propagate = False
    start = metrics.num_bytes_accessed
    try:
        yield lambda: metrics.num_bytes_accessed - start
    finally:
        log.setLevel(before[0])
        log.propagate = before[1]


def kernels(one: Side, device: str) -> list[dict[str, Any]]:
    """The entries that one step spends most of its time in, on the device where there is one."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_device = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=activities) as recorded:
        one.step()
        synchronize(device)
    kind, of = (DeviceType.CUDA, "self_device_time_total") if on_device else (DeviceType.CPU, "self_cpu_time_total")
    events = [e for e in recorded.key_averages() if e.device_type == kind]  # an operator would repeat its kernels' time
    longest = sorted(events, key=lambda e: -getattr(e, of))[:PROFILED]
    return [{"name": e.key[:100], "calls": e.count, "ms": getattr(e, of) / 1e3} for e in longest]


def new_graphs(one: Side, count: int) -> int:
    """Graphs that `count` random configurations make; the first one ends it, as an error on recompiling."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, RecompileError
    from torch._dynamo.utils import counters

    before = counters["stats"].get("unique_graphs", 0)
    refused = 0
    with torch._dynamo.config.patch(error_on_recompile=True, fail_on_recompile_limit_hit=True):
        try:
            for _ in range(count):
                one.step()
        except (RecompileError, FailOnRecompileLimitHit):
            refused = 1  # it was not made, and would have been
    return int(counters["stats"].get("unique_graphs", 0) - before + refused)
