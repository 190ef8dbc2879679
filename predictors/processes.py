"""The engine of several processes on this machine; nothing else needs to be installed."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from predictors.crew import Ask, Bench, Death, Measured, checked, deal, processors, sending, unopened
from supernet.config import SubnetConfig
from supernet.elastic.supernet import SuperNet
from supernet.interfaces import Batch

GRACE = 1.0
"""Seconds that processes have to leave in order, with what they have started themselves, before they are killed."""


class InProcesses:
    """An Engine (`supernet.interfaces`) of processes, each with a copy of the supernet and of the images.

    They are started at the first call and stay until the engine is gone. With the same `threads` as this process they
    find the same outcomes, bit for bit. Scripts need `if __name__ == "__main__":`, since the processes import them.

    Args:
        workers: processes; None: one for each `threads` processors that this process may use.
        threads: of torch, in each.
        retries: how often a subnet is tried again after its process died.

    Raises:
        ValueError: workers or threads below 1, retries below 0.
    """

    def __init__(self, workers: int | None = None, threads: int = 1, retries: int = 2) -> None:
        checked(workers, threads, retries)
        self.workers, self.threads, self.retries = workers, threads, retries
        self._crew = _Processes()
        weakref.finalize(self, self._crew.close)

    def __call__(
        self, net: SuperNet, configs: Sequence[SubnetConfig], recalibration: Sequence[Tensor], batches: Sequence[Batch]
    ) -> Iterator[tuple[int, NDArray[np.bool_], float]]:
        """For each subnet its position, [images] outcomes and the seconds that it took, as they come in.

        Raises:
            ChildProcessError: a subnet ended more than `retries` processes.
        """
        bench = Bench(net, list(recalibration), list(batches), self.threads)
        yield from deal(self._crew, bench, configs, self.workers, self.retries)


class _Processes:
    """A Crew (`predictors.crew`). The bench travels by a file: a pipe would hold up the start of the next process."""

    def __init__(self) -> None:
        self.numbers = count()
        self.links: dict[int, Connection] = {}
        self.processes: dict[int, multiprocessing.process.BaseProcess] = {}
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self, bench: Bench, workers: int | None, asks: int) -> list[int]:
        self.folder = self.folder or tempfile.TemporaryDirectory(prefix="elastibit-")
        self.file = Path(self.folder.name) / "bench.pickle"
        with sending(), self.file.open("wb") as file:
            pickle.dump(bench, file)
        n = min(asks, workers or max(1, processors() // bench.threads))
        stayed = list(self.links)[:n]
        for worker in stayed:
            self._send(worker, str(self.file))
        return [*stayed, *(self.hire() for _ in range(n - len(stayed)))]

    def hire(self) -> int:
        context, worker = multiprocessing.get_context("spawn"), next(self.numbers)
        resource_tracker.ensure_running()  # the first process would start it, which unblocks what is blocked here
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is this process's affair
        try:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.links[worker], self.processes[worker] = ours, process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._send(worker, str(self.file))
        return worker

    def give(self, worker: int, ask: Ask) -> None:
        self._send(worker, ask)

    def report(self) -> tuple[int, Measured | Exception | Death | None]:
        sentinels = {process.sentinel: worker for worker, process in self.processes.items()}
        by_link = {id(link): worker for worker, link in self.links.items()}
        ready = wait([*self.links.values(), *sentinels])
        worker = next(sentinels[r] if isinstance(r, int) else by_link[id(r)] for r in ready)
        try:
            if self.links[worker].poll():
                return worker, self.links[worker].recv()
        except (EOFError, OSError):
            pass
        self.processes[worker].join()
        code = self.processes[worker].exitcode or 0
        self.dismiss(worker)
        return worker, Death(
            f"killed by {signal.Signals(-code).name}" if code < 0 else f"it left with exit code {code}"
        )

    def dismiss(self, worker: int) -> None:
        process = self.processes.pop(worker)
        process.kill()
        process.join()
        self.links.pop(worker).close()

    def close(self) -> None:
        for link in self.links.values():
            link.close()  # who waits for a subnet leaves by itself
        end = time.monotonic() + GRACE
        for process in self.processes.values():
            process.join(max(0.0, end - time.monotonic()))
        for worker in list(self.processes):
            self.dismiss(worker)
        if self.folder:
            self.folder.cleanup()
            self.folder = None

    def _send(self, worker: int, message: str | Ask) -> None:
        with contextlib.suppress(OSError):  # a dead one is found out by `report`
            self.links[worker].send(message)


def _work(link: Connection) -> None:
    """A worker's life: a file's name is a bench to open, else a subnet to measure; it ends with its link."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            message = link.recv()
            if isinstance(message, Ask):
                link.send(bench(message))
            else:
                try:
                    bench: Bench = pickle.loads(Path(message).read_bytes())
                    bench.open()
                    link.send(None)
                except Exception as error:
                    link.send(unopened(f"{type(error).__name__}: {error}"))
