"""Door `finetune`: subnets of a search, each trained alone, and what that was worth on select."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supernet.desk import desk

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from supernet.run import Run

Record = Mapping[str, Any]


def main(cfg: DictConfig) -> None:
    """Fine-tune as `cfg` (conf/finetune.yaml) says, each subnet into `finetuned/<id>/`; nothing twice."""
    import dataclasses

    import torch
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from supernet.config import build
    from supernet.export.subnets import chosen
    from supernet.run import load

    out = Path(HydraConfig.get().runtime.output_dir)
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    if cfg.threads:
        torch.set_num_threads(int(cfg.threads))
    if int(cfg.epochs) < 1:
        raise ValueError(f"epochs is 1 or more, got {cfg.epochs}")
    run = load(cfg.run, trusted=tuple(cfg.trust))
    wanted = chosen(run, str(cfg.subnet))
    schedule = build(settings["schedule"], trusted=tuple(cfg.trust))
    asked = {key: settings[key] for key in ("epochs", "seed", "select_images")} | {
        "schedule": dataclasses.asdict(schedule)
    }
    into = dataclasses.replace(run, path=out)
    show([tuned(run, into, record, asked, schedule, settings) for record in wanted])
    print(f"fine-tuned: {out / 'finetuned'}")


def tuned(run: Run, into: Run, record: Record, asked: Record, schedule: Any, settings: Mapping[Any, Any]) -> Record:
    """The record of one subnet after fine-tuning, which happens unless it was done alike before.

    Args:
        run, into: the run to read from, and to write into.
        record: of the subnet.
        asked: what the result depends on besides the weights.
        schedule: learning rates.
        settings: of the door.
    """
    from predictors.measuring import outcomes
    from supernet.artefacts import provenance
    from supernet.export.subnets import TUNED, keep_tuned, materialised, tuned_record
    from supernet.training.finetune import finetune

    assert run.task is not None  # a run without one is refused by load
    config = run.net.space.config(record["indices"])
    known = tuned_record(into, config.id)
    if known is not None and all(known.get(key) == value for key, value in asked.items()):
        return known
    images = list(run.task.select(asked["select_images"]))
    before = float(outcomes(materialised(run, record), images).mean())
    subnet = finetune(
        run.net,
        config,
        run.task,
        out=into.path / TUNED / config.id,
        epochs=int(asked["epochs"]),
        schedule=schedule,
        trainer=settings["trainer"],
        compile=str(settings["compile"]),
        seed=int(asked["seed"]),
    )
    label = record.get("label") or ", ".join(record.get("labels", [])) or "file"
    figures = {
        "before": before,
        "after": float(outcomes(subnet, images).mean()),
        "images": sum(len(y) for _, y in images),
    }
    named = {"label": label, "indices": list(config.row)}
    made = named | dict(asked) | figures | {"provenance": provenance(int(asked["seed"]))}
    keep_tuned(into, subnet, made)
    return {"id": config.id} | made


def show(records: list[Record]) -> None:
    """Print a row for each subnet."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="accuracy on select", title_justify="left")
    for heading in ("budget", "id", "epochs", "before", "after"):
        table.add_column(heading, justify="left" if heading in ("budget", "id") else "right", no_wrap=True)
    for r in records:
        table.add_row(r["label"], r["id"], str(r["epochs"]), f"{r['before']:.2%}", f"{r['after']:.2%}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(desk("finetune", main))
