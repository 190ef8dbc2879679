"""Loggers beside the CSV file that every run writes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger


def wandb_logger(out: Path | str, project: str = "elastibit", offline: bool | str = "auto") -> Logger:
    """Weights & Biases; `offline="auto"` stays on disk where WANDB_API_KEY is not set, so that no run waits for a
    login.

    Args:
        out: run directory; files go to its folder wandb/.
        project: project's name.
        offline: True, False or "auto".
    """
    if offline not in (True, False, "auto"):
        raise ValueError(f"logger.offline is true, false or auto, got {offline!r}")
    stays = "WANDB_API_KEY" not in os.environ if offline == "auto" else bool(offline)
    return WandbLogger(project=project, save_dir=str(out), offline=stays)


def tensorboard_logger(out: Path | str) -> Logger:
    """TensorBoard event files in the run directory's folder tensorboard/.

    Raises:
        ValueError: the package tensorboard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "logger=tensorboard needs the package tensorboard; install elastibit[tensorboard] or use logger=csv"
        )
    return TensorBoardLogger(str(out), name="tensorboard", version="")
