"""Train one subnet alone: what a shared set of weights owes to the others, it gets back."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from supernet.artefacts import read_json, write_json
from supernet.calibration.batchnorm import recalibrate
from supernet.config import SubnetConfig
from supernet.elastic.supernet import SuperNet
from supernet.interfaces import Task
from supernet.run import weights_digest
from supernet.space import Indices
from supernet.training.fit import train
from supernet.training.losses import Plain
from supernet.training.module import Schedule

WORK = "work"
SETTINGS = "finetune.json"


class Only:
    """The sampler that asks for one row, always.

    Args:
        row: [d] canonical.
    """

    feedback: Literal["none", "train_loss", "select_loss"] = "none"
    every = 1

    def __init__(self, row: Indices) -> None:
        self.row = row

    def ask(self, n: int, rng: np.random.Generator) -> Indices:
        """[n, d] the row, n times; nothing is drawn."""
        return np.tile(self.row, (n, 1))

    def tell(self, indices: Indices, scores: NDArray[np.float64], step: int, total_steps: int) -> None:
        """Nothing is learned."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is restored."""


def finetune(
    net: SuperNet,
    config: SubnetConfig | Sequence[int] | Indices,
    task: Task,
    *,
    out: Path | str,
    epochs: int = 5,
    schedule: Schedule | None = None,
    trainer: Mapping[str, Any] | None = None,
    compile: str = "off",
    seed: int = 0,
) -> nn.Module:
    """The subnet as a module of its own, after it was trained alone; `net` stays as it is.

    A copy of the supernet runs this subnet in every step, with the task's loss, learned scales, and BatchNorm as in any
    training: it starts from statistics of the recalibration images and averages on. What the subnet does not use has no
    gradient and does not move, so this is the training of `net.materialise(config)`. Killed, it goes on after the last
    finished epoch when it is called again alike.

    Args:
        net: calibrated or trained.
        config: the subnet.
        task: data and loss.
        out: folder of metrics.csv and, until the end, of the checkpoint.
        epochs: passes over the training part; 0 gives the subnet as it is, with statistics of its own.
        schedule: learning rates; None: those of `Schedule`, the peak a tenth.
        trainer: options of Lightning's Trainer.
        compile: as `SuperNet.compile`; one subnet is one graph.
        seed: of the data order.

    Raises:
        ValueError: epochs < 0, options that are ours and not the Trainer's, or a loss that is not finite.
    """
    if epochs < 0:
        raise ValueError(f"epochs is 0 (as it is) or more, got {epochs}")
    out, row = Path(out), net.row(config)
    schedule = schedule or Schedule(lr=Schedule.lr / 10)
    tuned, work = copy.deepcopy(net), Path(out) / WORK
    with tuned.as_subnet(row):
        recalibrate(tuned, task.recalibrate())
    if epochs == 0:
        return tuned.materialise(row).eval()
    settings = {"row": row.tolist(), "epochs": epochs, "seed": seed, "schedule": asdict(schedule)}
    settings["weights"] = weights_digest(net)
    if not (work / SETTINGS).is_file() or read_json(work / SETTINGS) != settings:
        shutil.rmtree(work, ignore_errors=True)
        write_json(work / SETTINGS, settings)
    tuned.compile(compile)
    train(
        tuned,
        task,
        out=work,
        epochs=epochs,
        sampler=Only(row),
        losses=Plain(),
        subnets=1,
        schedule=schedule,
        validation=(),
        trainer=trainer,
        seed=seed,
        resume=True,
    )
    (work / "metrics.csv").replace(out / "metrics.csv")
    shutil.rmtree(work)
    return tuned.materialise(row).eval()
