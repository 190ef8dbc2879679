"""Subnets measured: accuracy with BatchNorm statistics of their own, each once, kept as soon as it is known."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from supernet.artefacts import append_jsonl, read_jsonl
from supernet.calibration.batchnorm import recalibrated
from supernet.config import SubnetConfig
from supernet.elastic.supernet import SuperNet
from supernet.interfaces import Batch, Engine, Task
from supernet.run import weights_digest as weights_digest
from supernet.space import Indices


@torch.no_grad()
def outcomes(net: nn.Module, batches: Iterable[Batch]) -> NDArray[np.bool_]:
    """[images] whether a module, or the active subnet of a supernet, classifies each image right, in order."""
    device, was = next(net.parameters()).device, net.training
    try:
        net.eval()
        right = [(net(x.to(device)).argmax(1).cpu() == y.cpu()).numpy() for x, y in batches]
    finally:
        net.train(was)
    if not right:
        raise ValueError("accuracy needs at least one batch of images; raise the number of select images above 0")
    return np.concatenate(right)


def tested(
    net: SuperNet,
    config: SubnetConfig | Sequence[int] | Indices,
    recalibration: Iterable[Float[Tensor, "n ..."]],
    batches: Iterable[Batch],
) -> NDArray[np.bool_]:
    """[images] outcomes of one subnet with BatchNorm statistics of its own; the supernet is left as it was."""
    device = next(net.parameters()).device
    with net.as_subnet(config), recalibrated(net, (x.to(device) for x in recalibration)):
        return outcomes(net, batches)


def measure(
    net: SuperNet,
    config: SubnetConfig | Sequence[int] | Indices,
    recalibration: Iterable[Float[Tensor, "n ..."]],
    batches: Iterable[Batch],
) -> float:
    """Accuracy 0..1 of one subnet after its BatchNorm statistics were recalibrated; the supernet is left as it was.

    Args:
        net: the supernet.
        config: the subnet.
        recalibration: input batches for BatchNorm.
        batches: images and labels to judge on.
    """
    return float(tested(net, config, recalibration, batches).mean())


def unmeasured(name: str, error: Exception) -> Exception:
    """What stopped a measurement, as a built-in error of its kind, in one line that names the subnet."""
    kind = next((k for k in (ValueError, TypeError, OSError) if isinstance(error, k)), RuntimeError)
    said = str(error) if kind is not RuntimeError else f"{type(error).__name__}: {error}"
    return kind(f"subnet {name} could not be measured: {' '.join(said.split())}")


class InProcess:
    """The engine that measures one subnet after the other in this process."""

    def __call__(
        self, net: SuperNet, configs: Sequence[SubnetConfig], recalibration: Sequence[Tensor], batches: Sequence[Batch]
    ) -> Iterator[tuple[int, NDArray[np.bool_], float]]:
        """For each subnet its position, [images] outcomes and the seconds that it took."""
        for position, config in enumerate(configs):
            start = time.monotonic()
            try:
                right = tested(net, config, recalibration, batches)
            except Exception as error:
                raise unmeasured(config.id, error) from error
            yield position, right, time.monotonic() - start


class Measurer:
    """What is known of the subnets of one supernet on fixed images; what is not known yet is measured when asked for.

    Args:
        net: the supernet.
        task: gives the recalibration and the select images.
        recalibrate_images, select_images: images used of each part; None: all.
        out: a file that holds what is known, one record for each line; None keeps it in memory only. Several
            measurers may share a file one after the other, not at the same time.
        reuse: further files of records; those of this space, these weights and these numbers of images are known too.
        engine: how subnets are measured; None: in this process.

    Attributes:
        origin: what a record of this measurer says of space, weights and images.
        records: subnet id -> record.

    Raises:
        ValueError: a file with records of another space, of other weights or of other numbers of images.
    """

    def __init__(
        self,
        net: SuperNet,
        task: Task,
        *,
        recalibrate_images: int | None = None,
        select_images: int | None = None,
        out: Path | str | None = None,
        reuse: Iterable[Path | str] = (),
        engine: Engine | None = None,
    ) -> None:
        self.net, self.out, self.engine = net, out, engine or InProcess()
        self.recalibration = list(task.recalibrate(recalibrate_images))
        self.batches = list(task.select(select_images))
        self.origin = {
            "fingerprint": net.fingerprint,
            "weights": weights_digest(net),
            "images": {
                "recalibrate": sum(map(len, self.recalibration)),
                "select": sum(len(y) for _, y in self.batches),
            },
        }
        known = read_jsonl(out) if out and Path(out).exists() else []
        check(known, self.origin, out or "the pairs")
        self.records: dict[str, dict[str, Any]] = agreeing(reuse, self.origin) | {str(r["id"]): r for r in known}

    def __call__(self, configs: Iterable[SubnetConfig]) -> Iterator[dict[str, Any]]:
        """The record of each subnet: first of those that are known, then of the others as soon as each is measured."""
        wanted = {config.id: config for config in configs}
        yield from [self.records[name] for name in wanted if name in self.records]
        missing = [config for name, config in wanted.items() if name not in self.records]
        if not missing:
            return
        for at, right, seconds in self.engine(self.net, missing, self.recalibration, self.batches):
            record = self._record(missing[at], right, seconds)
            self.records[record["id"]] = record
            if self.out:
                append_jsonl(self.out, record)
            yield record

    def _record(self, config: SubnetConfig, right: NDArray[np.bool_], seconds: float) -> dict[str, Any]:
        return {
            "id": config.id,
            **self.origin,
            "row": list(config.row),
            "score": float(right.mean()),
            "halves": [float(right[::2].mean()), float(right[1::2].mean()) if len(right) > 1 else float(right[0])],
            "costs": self.net.costs.of(config),
            "measured": {"seconds": round(seconds, 4)},
        }


def agreeing(paths: Iterable[Path | str], origin: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Records by subnet id that some files hold of one origin; records of others, and files that are not there, are
    passed over.

    Where `origin` does not say how many images, the records are those that were measured on the most of select.
    """
    found = [record for path in paths if Path(path).is_file() for record in read_jsonl(path)]
    found = [r for r in found if {"id", "row", "score", "images"} <= r.keys()]
    found = [r for r in found if all(r.get(key) == value for key, value in origin.items())]
    most = max((r["images"]["select"] for r in found), default=0)
    return {str(r["id"]): r for r in found if r["images"]["select"] == most}


def check(records: Iterable[Mapping[str, Any]], origin: Mapping[str, Any], path: Path | str) -> None:
    """Refuse records that were measured on something else."""
    meanings = {"fingerprint": "space", "weights": "weights", "images": "images"}
    for number, record in enumerate(records, 1):
        missing = [key for key in ("id", "row", "score", "halves", "costs", *origin) if key not in record]
        if missing:
            raise ValueError(
                f"{path}: line {number} has no {', '.join(missing)}; delete that line, the others are kept"
            )
        for key, value in origin.items():
            if record[key] != value:
                raise ValueError(
                    f"{path} was measured on {meanings[key]} {record[key]}, this run has {value}; "
                    "write to another file, or delete that one"
                )
