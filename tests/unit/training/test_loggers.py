"""Loggers that need no login and say what is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from supernet.training.loggers import tensorboard_logger, wandb_logger


def test_wandb_stays_on_disk_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb_logger(tmp_path)._offline  # type: ignore[attr-defined]
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert not wandb_logger(tmp_path)._offline  # type: ignore[attr-defined]
    assert wandb_logger(tmp_path, offline=True)._offline  # type: ignore[attr-defined]


def test_other_words_for_offline_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="true, false or auto, got 'maybe'"):
        wandb_logger(tmp_path, offline="maybe")


def test_tensorboard_writes_into_the_run(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    assert Path(tensorboard_logger(tmp_path).log_dir) == tmp_path / "tensorboard"  # type: ignore[arg-type]


def test_tensorboard_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package tensorboard; install elastibit\[tensorboard\]"):
        tensorboard_logger(tmp_path)
