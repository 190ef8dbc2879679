"""Train a supernet: Trainer, logger, checkpoints, progress and the validation of a few uniform subnets."""

from __future__ import annotations

import csv
import logging
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger
from torch import Tensor

from supernet.artefacts import Progress, progress, write_json
from supernet.calibration.batchnorm import recalibrated
from supernet.config import QuantConfig
from supernet.elastic.supernet import SuperNet
from supernet.interfaces import Sampler, Settling, Task
from supernet.run import save
from supernet.samplers.cost_first import CostFirst
from supernet.samplers.sandwich import Sandwich
from supernet.training.losses import GroupProgressive
from supernet.training.module import Epochs, Schedule, SupernetModule

SETTLED = "settled.json"
OURS = {
    "gradient_clip_val": "schedule.clip",
    "gradient_clip_algorithm": "schedule.clip",
    "accumulate_grad_batches": "subnets (gradients of all subnets of a step add up)",
    "max_epochs": "epochs",
    "max_steps": "epochs",
    "logger": "logger",
    "callbacks": "validation",
    "enable_checkpointing": "nothing (it is always on)",
    "enable_progress_bar": "nothing (ours is always on)",
    "enable_model_summary": "`elastibit report`",
    "log_every_n_steps": "nothing (means of 20 steps are logged)",
}


def train(
    net: SuperNet,
    task: Task,
    *,
    out: Path | str,
    epochs: int = 5,
    sampler: Sampler | None = None,
    losses: Any = None,
    subnets: int = 3,
    schedule: Schedule | None = None,
    validation: Sequence[str] = ("w2a2", "w4a4", "w8a8"),
    validation_images: int = 1000,
    logger: Logger | None = None,
    trainer: Mapping[str, Any] | None = None,
    seed: int = 0,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
) -> SuperNet:
    """Train `net` in place and write the run directory `out`.

    Args:
        net: calibrated supernet.
        task: data and loss.
        out: run directory: supernet.safetensors, space.json, config.yaml, metrics.csv, checkpoints/.
        epochs: passes over the training part; 0 writes the run as it is.
        sampler: default: sandwich with a cost-first draw in the middle.
        losses: default: chain distillation from high to low bits (GroupProgressive).
        subnets: subnets for each step, their gradients added up.
        schedule: learning rates.
        validation: uniform subnets measured on select after each epoch; those that the space lacks are left out.
        validation_images: images of recalibrate and of select used for that.
        logger: a Lightning logger beside the CSV one, which is always written.
        trainer: options for Lightning's Trainer (accelerator, devices, strategy, precision, ...).
        seed: of data order and subnets.
        resume: continue from the last finished epoch.
        config: the resolved configuration to store, where there is one.

    Raises:
        ValueError: options that are ours and not the Trainer's, a loss that is not finite, a broken checkpoint.
    """
    if epochs < 0:
        raise ValueError(f"epochs is 0 (no training) or more, got {epochs}")
    options, watcher = _options(trainer or {}), Validation(_offered(net, validation), validation_images)
    out, last = Path(out), Path(out) / "checkpoints" / "last.ckpt"
    checkpoint = _checked(last) if resume else None
    if checkpoint is None:  # a run that goes on keeps its files until it has better ones
        _forget(last, out / SETTLED)
        save(net, out, config=config, seed=seed, trained=0)
    if epochs == 0:
        return net
    module = SupernetModule(
        net,
        task,
        sampler or Sandwich(net.space, net.costs, inner=CostFirst),
        losses or GroupProgressive(),
        subnets=subnets,
        schedule=schedule or Schedule(),
        seed=seed,
        total_steps=epochs * task.steps_per_epoch(),
    )
    keeper = ModelCheckpoint(last.parent, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    with _quiet():
        loggers = [_table(out, checkpoint), *([logger] if logger else [])]
        fitter = pl.Trainer(max_epochs=epochs, logger=loggers, callbacks=[watcher, keeper, Clock()], **options)
        fitter.fit(module, train_dataloaders=Epochs(module), ckpt_path=checkpoint, weights_only=True)
    if fitter.interrupted:
        raise KeyboardInterrupt
    module.average_buffers()
    if fitter.is_global_zero:
        save(net, out, config=config, seed=seed, trained=epochs)
        _write_settled(out, net, module.sampler)
    return net


def _forget(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _write_settled(out: Path, net: SuperNet, sampler: Sampler) -> None:
    if isinstance(sampler, Settling):
        write_json(out / SETTLED, settled(net, sampler))


def settled(net: SuperNet, sampler: Settling) -> dict[str, Any]:
    """The subnet that a sampler has settled on, as `elastibit export run=... subnet=<file>` reads it."""
    row = sampler.settled()
    subnet = net.space.config(row)
    return {
        "fingerprint": net.fingerprint,
        "id": subnet.id,
        "label": "settled",
        "indices": row.tolist(),
        "genes": subnet.plain(),
        "costs": net.costs.of(row),
        "figures": sampler.figures(),
    }


def _options(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer options after the check that none of them is one of ours."""
    for name in trainer:
        if name in OURS:
            raise ValueError(f"trainer.{name} has no effect under manual optimisation; use {OURS[name]} instead")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    options = {"accelerator": "auto", "devices": 1} | quiet | dict(trainer)
    if options.get("strategy") == "ddp":
        from pytorch_lightning.strategies import DDPStrategy

        options["strategy"] = DDPStrategy(broadcast_buffers=False)
    return options


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's adverts, and without its warnings about what is meant here (a metrics file that goes on)."""
    log = logging.getLogger("pytorch_lightning")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
            warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            warnings.filterwarnings("ignore", message="The dirpath has changed from")  # the run was moved
            yield
    finally:
        log.setLevel(before)


def _table(out: Path, checkpoint: str | None) -> CSVLogger:
    """metrics.csv; a resumed run keeps the rows up to its checkpoint, which Lightning's logger would delete."""
    rows: list[dict[str, str]] = []
    if checkpoint is not None and (out / "metrics.csv").exists():
        done = torch.load(checkpoint, map_location="cpu", weights_only=True)["elastibit"]["done"]
        with (out / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= done]
    table = CSVLogger(out, name="", version="")
    for row in rows:
        figures: dict[str, Tensor | float] = {
            k: int(v) if v.isdecimal() else float(v) for k, v in row.items() if v and k != "step"
        }
        table.log_metrics(figures, step=int(row["step"]))
    table.save()
    return table


def _checked(path: Path) -> str | None:
    """The checkpoint's path if it can be read; None where no epoch was finished yet.

    Raises:
        ValueError: it is truncated or holds more than tensors and plain Python.
    """
    if not path.exists():
        return None
    try:
        torch.load(path, map_location="cpu", weights_only=True)["elastibit"]["done"]
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(
            f"{path.name} cannot be read ({reason}); delete it to start again from the first epoch"
        ) from error
    return str(path)


def _offered(net: SuperNet, subnets: Sequence[str]) -> list[str]:
    """Those of some uniform subnets whose bits the space has."""
    bits = {
        kind: {
            c.bits
            for d in net.space.dimensions
            if d.name.endswith(kind)
            for c in d.choices
            if isinstance(c, QuantConfig)
        }
        for kind in ("weight", "input")
    }
    kept = []
    for name in subnets:
        match = re.fullmatch(r"w(\d+)a(\d+)", name)
        if not match:
            raise ValueError(f"validation lists uniform subnets such as w4a4, got {name!r}")
        if int(match[1]) in bits["weight"] and int(match[2]) in bits["input"]:
            kept.append(name)
    return kept


class Validation(Callback):
    """After each epoch: accuracy of a few uniform subnets on select, each with BatchNorm statistics of its own.

    Args:
        subnets: uniform bits, e.g. w4a4.
        images: images of recalibrate and of select.
    """

    def __init__(self, subnets: Sequence[str], images: int) -> None:
        self.subnets, self.images = tuple(subnets), images

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log `select/<bits>`."""
        assert isinstance(pl_module, SupernetModule)
        if not trainer.is_global_zero or not self.subnets:
            return
        net, task, mode = pl_module.net, pl_module.task, pl_module.training
        figures = {}
        for bits in self.subnets:
            with (
                torch.no_grad(),
                net.as_subnet(net.space.uniform(bits)),
                recalibrated(net, (images.to(pl_module.device) for images in task.recalibrate(self.images))),
            ):
                net.eval()
                parts = [(images.to(pl_module.device), labels) for images, labels in task.select(self.images)]
                right = [(net(images).argmax(1).cpu() == labels).float() for images, labels in parts]
                figures[f"select/{bits}"] = float(torch.cat(right).mean())
        pl_module.train(mode)
        for logger in trainer.loggers:
            logger.log_metrics(figures | {"epoch": pl_module.current_epoch}, step=pl_module.done)
            logger.save()


class Clock(Callback):
    """Progress with an ETA over all epochs."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar at the step reached so far."""
        assert isinstance(pl_module, SupernetModule)
        if trainer.is_global_zero:
            self.bar = self.stack.enter_context(progress("train", pl_module.total_steps))
            self.bar.advance(pl_module.done)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """One step further, with the last loss."""
        assert isinstance(pl_module, SupernetModule)
        if self.bar is not None:
            last = f"loss {pl_module.recent[-1]['loss']:.3f}" if pl_module.recent else None
            self.bar.advance(1, note=last)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self.stack.close()
        self.bar = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the message stands on a line of its own."""
        self.stack.close()
        self.bar = None
