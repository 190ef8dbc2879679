"""The engine of a Ray cluster, on this machine or on many (extra `elastibit[ray]`)."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
import socket
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from predictors.crew import Ask, Bench, Death, Measured, checked, deal, processors, sending, unopened
from supernet.config import SubnetConfig
from supernet.elastic.supernet import SuperNet
from supernet.interfaces import Batch


class OnRay:
    """An Engine (`supernet.interfaces`) of Ray actors: each has a copy of the supernet and reads the same images.

    Without an address the first call starts a cluster on this machine, which ends with the engine; where this process
    is connected to a cluster already, that one is taken and left running. With the same `threads` as this process the
    workers find the same outcomes, bit for bit, on equal processors.

    Args:
        workers: actors; None: one for each `threads` CPUs of the cluster.
        threads: of torch, in each; as many CPUs are asked of Ray.
        address: of a running cluster: `auto`, or host:port of its head; its nodes need elastibit and, where the model
            is the user's own, its module.
        retries: how often a subnet is tried again after its worker died.

    Raises:
        ValueError: Ray is not installed; workers or threads below 1, retries below 0.
    """

    def __init__(
        self, workers: int | None = None, threads: int = 1, address: str | None = None, retries: int = 2
    ) -> None:
        checked(workers, threads, retries)
        self.workers, self.threads, self.retries = workers, threads, retries
        self._crew = _Actors(_ray(), address)
        weakref.finalize(self, self._crew.close)

    def __call__(
        self, net: SuperNet, configs: Sequence[SubnetConfig], recalibration: Sequence[Tensor], batches: Sequence[Batch]
    ) -> Iterator[tuple[int, NDArray[np.bool_], float]]:
        """For each subnet its position, [images] outcomes and the seconds that it took, as they come in.

        Raises:
            ConnectionError: no cluster at the address, or it has gone.
            ChildProcessError: a subnet ended more than `retries` workers.
            ValueError: no node has as many CPUs as a worker has threads.
        """
        bench = _Bench(net, list(recalibration), list(batches), self.threads)
        yield from deal(self._crew, bench, configs, self.workers, self.retries)


class _Actors:
    """A Crew (`predictors.crew`). Net and images lie once in the object store."""

    def __init__(self, ray: Any, address: str | None) -> None:
        self.ray, self.address, self.ours = ray, address, False
        self.numbers = count()
        self.actors: dict[int, Any] = {}
        self.waiting: dict[Any, int] = {}

    def start(self, bench: Any, workers: int | None, asks: int) -> list[int]:
        if not self.ray.is_initialized():
            self.actors, self.waiting = {}, {}
            self._connect(bench.threads, workers)
        cpus = [node["Resources"].get("CPU", 0) for node in self.ray.nodes() if node["Alive"]]
        if max(cpus, default=0) < bench.threads:
            raise ValueError(
                f"a worker takes threads={bench.threads} CPUs, the largest node of the cluster has "
                f"{max(cpus, default=0):g}; engine.threads=1 is usual"
            )
        room = sum(int(n // bench.threads) for n in cpus)
        with sending():
            self.goods = [self.ray.put(part) for part in bench.part()]
        options = {"num_cpus": bench.threads, "max_restarts": 0, "max_task_retries": 0}
        self.kind = self.ray.remote(**options)(_worker())
        n = min(asks, workers or room)
        stayed = list(self.actors)[:n]
        for worker in stayed:
            self._open(worker)
        return [*stayed, *(self.hire() for _ in range(n - len(stayed)))]

    def hire(self) -> int:
        worker = next(self.numbers)
        # Workers of our own cluster find the modules that this process finds, in the same order.
        path = sys.path if self.ours and self.address is None else None
        self.actors[worker] = self.kind.remote(path)
        self._open(worker)
        return worker

    def give(self, worker: int, ask: Ask) -> None:
        self.waiting[self.actors[worker].measure.remote(ask)] = worker

    def report(self) -> tuple[int, Measured | Exception | Death | None]:
        errors = self.ray.exceptions
        (ref,), _ = self.ray.wait(list(self.waiting), num_returns=1)
        worker = self.waiting.pop(ref)
        try:
            return worker, self.ray.get(ref)
        except (errors.RayActorError, errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
            self.dismiss(worker)
            return worker, Death(_line(error))
        except errors.RayTaskError as error:
            return worker, unopened(_line(error))
        except errors.RayError as error:
            return worker, ConnectionError(f"the Ray cluster failed ({_line(error)}); what was measured is kept")

    def dismiss(self, worker: int) -> None:
        self.waiting = {ref: other for ref, other in self.waiting.items() if other != worker}
        self.ray.kill(self.actors.pop(worker))

    def close(self) -> None:
        actors, self.actors, self.waiting, self.goods = list(self.actors.values()), {}, {}, []
        if self.ray.is_initialized():
            with contextlib.suppress(self.ray.exceptions.RayError):  # what has gone by itself
                for actor in actors:
                    self.ray.kill(actor)
            if self.ours:
                self.ray.shutdown()
        self.ours = False

    def _open(self, worker: int) -> None:
        self.waiting[self.actors[worker].open.remote(*self.goods)] = worker

    def _connect(self, threads: int, workers: int | None) -> None:
        settings: dict[str, Any] = {"address": self.address}
        if self.address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports home unless told otherwise
            cpus = workers * threads if workers else max(threads, processors())
            settings = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        try:
            _knock(self.address)
            self.ray.init(**settings, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, self.ray.exceptions.RayError) as error:
            raise ConnectionError(
                f"no Ray cluster at {self.address or 'this machine'}: {_line(error)}; start one with "
                "`ray start --head`, or leave engine.address=null for one of this run's own"
            ) from error
        except BaseException:
            self.ray.shutdown()
            raise
        self.ours = True


def _worker() -> Any:
    """The class of the actors. It is made here so that it travels by value and imports nothing of ours by itself: its
    first act is to set the path of imports."""

    class Worker:
        def __init__(self, path: list[str] | None) -> None:
            sys.path[:] = path or sys.path

        def open(self, bench: _Bench, *images: list[Any]) -> None:
            self.bench = bench
            bench.fill(*images)
            bench.open()

        def measure(self, ask: Ask) -> Measured | Exception:
            return self.bench(ask)

    return Worker


class _Bench(Bench):
    """A bench whose images travel beside it, as arrays that the workers of one node read in place."""

    def part(self) -> tuple[Bench, list[Any], list[Any]]:
        """The bench without images, and the images."""
        bench = copy.copy(self)
        bench.recalibration, bench.batches = [], []
        images = [_array(x) for x in self.recalibration]
        return bench, images, [(_array(x), _array(y)) for x, y in self.batches]

    def fill(self, recalibration: list[Any], batches: list[Any]) -> None:
        """The images back."""
        self.recalibration = [_tensor(x) for x in recalibration]
        self.batches = [(_tensor(x), _tensor(y)) for x, y in batches]


def _array(x: Tensor) -> Any:
    """As NumPy; but strides that it would not keep stay with torch, since other strides run other kernels."""
    return x.numpy() if x.is_contiguous() else x


def _tensor(x: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # and nobody writes to it
        return x if isinstance(x, Tensor) else torch.from_numpy(x)


def _knock(address: str | None) -> None:
    """OSError where nobody listens at host:port; Ray itself goes on trying for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host:
        if not port.isdecimal():
            raise ValueError(f"the address of a Ray cluster is auto or host:port, got {address!r}")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _line(error: BaseException) -> str:
    """The line of Ray's many that says what happened: the first, or the last of a traceback."""
    lines = [re.sub(r"\x1b\[\d*m", "", line).strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line] or [type(error).__name__]
    line = lines[-1] if re.match(r"[\w.]+(Error|Exception)\b", lines[-1]) else lines[0]
    return line.rstrip(".")


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError(
            "engine=ray needs Ray, which is not installed; `pip install elastibit[ray]`, or take engine=processes"
        ) from error
    return ray
