"""Door `search`: budgets, a predictor, one search for all of them, and the winners' files."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supernet.desk import desk

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from search.run import Candidate, Found, Front
    from supernet.cost import Factors
    from supernet.interfaces import Predictor
    from supernet.run import Run

Budgets = list[dict[str, str | float]]
PREDICTORS = ("auto", "run", "additive")


def main(cfg: DictConfig) -> None:
    """Search as `cfg` (conf/search.yaml) says; writes front.json and subnets/."""
    import numpy as np
    import torch
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from search.run import save_front, search
    from supernet.config import build
    from supernet.run import load

    out = Path(HydraConfig.get().runtime.output_dir)
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    if cfg.threads:
        torch.set_num_threads(int(cfg.threads))
    budgets = budgets_of(settings["budget"], settings["budgets"])
    run = load(cfg.run, trusted=tuple(cfg.trust))
    task = run.required_task()
    limits = [run.net.costs.parse(budget) for budget in budgets]
    measure = build(settings["sensitivity"], trusted=tuple(cfg.trust))
    sensitivity = measure(run.net, task.recalibrate(int(cfg.sensitivity_images)))
    front = search(
        run.net,
        predictor_of(run, str(cfg.predictor), sensitivity),
        budgets,
        np.random.default_rng(int(cfg.seed)),
        task=task,
        candidates=int(cfg.candidates),
        generations=int(cfg.generations),
        population=int(cfg.population),
        sensitivity=sensitivity,
        algorithm=build(settings["algorithm"], trusted=tuple(cfg.trust)),
        recalibrate_images=cfg.recalibrate_images,
        select_images=cfg.select_images,
    )
