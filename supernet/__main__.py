"""Door `train`: data, model, supernet, calibration, training, run directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supernet.desk import desk

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from supernet.elastic.supernet import SuperNet
    from supernet.interfaces import Task


def main(cfg: DictConfig) -> None:
    """Train as `cfg` (conf/train.yaml) says and write the run directory."""
    import torch
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from supernet.config import build
    from supernet.elastic.supernet import SuperNet
    from supernet.run import rebuild
    from supernet.training.fit import train

    out = Path(HydraConfig.get().runtime.output_dir)
    composed = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(composed, dict)
    settings = {str(key): value for key, value in composed.items()}
    if cfg.resume:
        settings = _stored(out, list(HydraConfig.get().overrides.task))
    elif (out / "supernet.safetensors").exists() and not cfg.overwrite:
        raise ValueError(
            f"{out.name} already holds a supernet; "
            "give resume=true to go on, overwrite=true to replace it, or another run="
        )
    if settings["threads"]:
        torch.set_num_threads(int(settings["threads"]))
    torch.manual_seed(int(settings["seed"]))
    trusted = tuple(cfg.trust)
    make = rebuild if cfg.resume else build  # stored settings are not the user's own words
    task = make(settings["task"], trusted=trusted)
    model = make(settings["backbone"], trusted=trusted, n_classes=task.n_classes, in_channels=task.in_channels)
    net = SuperNet(model, task.example(), **make(settings["space"], trusted=trusted))
    _prepare(net, task, settings)
    train(
        net,
        task,
        out=out,
        epochs=int(settings["epochs"]),
        sampler=make(settings["sampler"], trusted=trusted, space=net.space, costs=net.costs),
        losses=make(settings["loss"], trusted=trusted),
        subnets=int(settings["subnets"]),
        schedule=make(settings["schedule"], trusted=trusted),
        validation=settings["validation"],
        validation_images=int(settings["validation_images"]),
        logger=make(settings["logger"], trusted=trusted, out=out) if settings["logger"] else None,
        trainer=settings["trainer"],
        seed=int(settings["seed"]),
        resume=bool(cfg.resume),
        config=settings,
    )
    print(f"trained: {out}")


def _prepare(net: SuperNet, task: Task, settings: dict[str, Any]) -> None:
    """Start scales and compilation; `auto` becomes the mode that pays, which the run keeps when it is resumed."""
    import numpy as np

    from supernet.elastic.compiling import choose

    net.calibrate(task.recalibrate(int(settings["calibration_images"])))
    if settings["compile"] == "auto":
        steps, subnets = int(settings["epochs"]) * task.steps_per_epoch(), int(settings["subnets"])
        images = len(next(iter(task.train(np.random.default_rng(0))))[0]) if steps else 0
        choice = choose(net, steps * subnets * images)
        settings["compile"] = choice.mode
        if steps:
            print(f"{choice.why} ({steps} steps of {subnets} subnets)")
    net.compile(str(settings["compile"]))


def _stored(out: Path, overrides: list[str]) -> dict[str, Any]:
    """The settings of the run that is resumed."""
    from omegaconf import OmegaConf

    others = [o for o in overrides if o.split("=")[0].lstrip("+") not in ("run", "resume", "trust")]
    if others:
        raise ValueError(
            "a resumed run keeps the settings that it was started with; "
            f"leave out {', '.join(others)}, or start another run="
        )
    if not (out / "config.yaml").exists():
        raise FileNotFoundError(
            f"{out.name} has nothing to resume: config.yaml is missing; start it without resume=true"
        )
    stored = OmegaConf.to_container(OmegaConf.load(out / "config.yaml"), resolve=True)
    assert isinstance(stored, dict)
    return {str(key): value for key, value in stored.items()}


if __name__ == "__main__":
    sys.exit(desk("train", main))
