"""Subnets dealt out to workers, one at a time each, so that a worker's death says which subnet it had.

A subnet whose worker died is tried again, behind all others; none is lost, none is measured twice. What the workers are
(processes of this machine, actors of a Ray cluster) is the crew's affair.
"""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from predictors.measuring import tested, unmeasured
from supernet.config import SubnetConfig
from supernet.elastic.supernet import SuperNet
from supernet.interfaces import Batch
from supernet.memory import keep_freed

Measured = tuple[NDArray[np.bool_], float]


@dataclass(frozen=True)
class Death:
    """A worker is no more; `reason` ends a sentence."""

    reason: str


@dataclass(frozen=True)
class Ask:
    """One subnet, as it travels: a SubnetConfig would take all dimensions of its space along."""

    id: str
    row: tuple[int, ...]


class Crew(Protocol):
    """Workers elsewhere, by numbers that are not used twice."""

    def start(self, bench: Bench, workers: int | None, asks: int) -> list[int]:
        """Have workers for that many subnets, `workers` of them at most (None: as many as there is room for), each
        with a copy of `bench`. Each reports when it is ready."""
        ...

    def hire(self) -> int:
        """One more of them."""
        ...

    def give(self, worker: int, ask: Ask) -> None:
        """A subnet for a worker that has none."""
        ...

    def report(self) -> tuple[int, Measured | Exception | Death | None]:
        """Wait until a worker has something to say: what it measured, what went wrong, or that it is ready (None)."""
        ...

    def dismiss(self, worker: int) -> None:
        """End one worker, whatever it is doing."""
        ...

    def close(self) -> None:
        """End all workers and what was started for them; `start` begins anew."""
        ...


class Bench:
    """What a worker measures on: a supernet of its own and the images.

    Args:
        net: copied; how it is compiled is remembered here, since copies are not compiled.
        recalibration: input batches for BatchNorm.
        batches: images and labels to judge on.
        threads: of torch.

    Raises:
        ValueError: the supernet is not on the CPU.
    """

    def __init__(self, net: SuperNet, recalibration: Sequence[Tensor], batches: Sequence[Batch], threads: int) -> None:
        device = next(net.parameters()).device
        if device.type != "cpu":
            raise ValueError(
                f"workers measure on the CPU, the supernet is on {device}; net.cpu() first, or engine=local"
            )
        self.net, self.threads, self.compiled, self.passes = net, threads, net.compiled, net.passes
        self.recalibration, self.batches = recalibration, batches

    def open(self) -> None:
        """In the worker: threads, and the network compiled as the first one is."""
        keep_freed()
        torch.set_num_threads(self.threads)
        self.net.compile(self.compiled, self.passes)

    def __call__(self, ask: Ask) -> Measured | Exception:
        """Outcomes and seconds of one subnet; an error comes back as a value, with its traceback as a note."""
        start = time.monotonic()
        try:
            return tested(self.net, ask.row, self.recalibration, self.batches), time.monotonic() - start
        except Exception as error:
            known = unmeasured(ask.id, error)
            known.add_note("".join(traceback.format_exception(error)))
            return known


def deal(
    crew: Crew, bench: Bench, configs: Iterable[SubnetConfig], workers: int | None, retries: int
) -> Iterator[tuple[int, NDArray[np.bool_], float]]:
    """For each subnet its position, [images] outcomes and the seconds that it took, as they come in.

    Workers stay for the next call, unless this one fails or is left before its end.

    Args:
        crew: the workers.
        bench: what each of them gets.
        configs: subnets of the bench's supernet.
        workers: how many there are at most; None: as many as there is room for.
        retries: how often a subnet is tried again after its worker died.

    Raises:
        ChildProcessError: a subnet, or the start, ended more workers than that.
        ValueError: whatever the measuring of a subnet raises, in one line with the subnet's id.
    """
    asks = [Ask(config.id, tuple(bench.net.row(config).tolist())) for config in configs]
    queue, deaths, left = deque(range(len(asks))), Counter[int | None](), len(asks)
    try:
        busy: dict[int, int | None] = dict.fromkeys(crew.start(bench, workers, left)) if asks else {}
        while left:
            worker, answer = crew.report()
            if worker not in busy:  # it died with nothing to do
                continue
            at = busy.pop(worker)
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, Death):
                deaths[at] += 1
                if deaths[at] > retries:
                    raise ChildProcessError(_accused(None if at is None else asks[at], deaths[at], answer))
                queue.extend(() if at is None else (at,))
                if queue:
                    busy[crew.hire()] = None
                continue
            if queue:  # before the result is handed on, so that the worker does not wait for its reader
                busy[worker] = queue.popleft()
                crew.give(worker, asks[busy[worker] or 0])
            if answer is None:
                deaths[None] = 0
            else:
                assert at is not None
                left -= 1
                yield at, *answer
        for worker in busy:  # replacements that nobody needs any more
            crew.dismiss(worker)
    except BaseException:
        crew.close()
        raise


def _accused(ask: Ask | None, deaths: int, last: Death) -> str:
    workers = "a worker" if deaths == 1 else f"{deaths} workers"
    if ask is None:
        return (
            f"{workers} ended before the first subnet: {last.reason}; a script that measures on processes needs "
            '`if __name__ == "__main__":`, a cluster needs elastibit on every node'
        )
    return (
        f"subnet {ask.id} ended {workers}: {last.reason}; with fewer workers each has more memory, engine=local shows "
        "what happens in this process; what was measured is kept"
    )


@contextmanager
def sending() -> Iterator[None]:
    """Around what serialises a bench: an error there is about the user's model, in one line."""
    try:
        yield
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the supernet cannot be sent to workers ({str(error).strip().splitlines()[0]}); define its classes at the "
            "top of a module, or take engine=local"
        ) from error


def unopened(said: str) -> ChildProcessError:
    """A worker is alive and cannot read what it was sent."""
    return ChildProcessError(
        f"a worker cannot open the supernet: {said}; workers need the same elastibit, and a model's own module"
    )


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checked(workers: int | None, threads: int, retries: int) -> None:
    """Refuse settings out of range."""
    if (workers is not None and workers < 1) or threads < 1 or retries < 0:
        raise ValueError(
            f"workers (or null) and threads are at least 1, retries at least 0, got {workers}, {threads}, {retries}"
        )
