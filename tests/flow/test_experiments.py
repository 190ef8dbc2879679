"""Every experiment composes, and those whose data is at hand take one training batch."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def composed(name: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = OmegaConf.to_container(compose("train", [f"experiment={name}"]), resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


@pytest.mark.parametrize("name", NAMES)
def test_it_composes_and_its_settings_hold(name: str) -> None:
    """What the experiment's file says is what comes out, whatever the groups it chooses say."""
    settings = composed(name)
    own = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / f"{name}.yaml"))
    assert isinstance(own, dict)

    def held(wanted: Any, found: Any, where: str) -> None:
        if isinstance(wanted, dict):
            for key, value in wanted.items():
                held(value, found[key], f"{where}.{key}")
        else:
            assert found == wanted, where

    held({key: value for key, value in own.items() if key != "defaults"}, settings, name)


@pytest.mark.parametrize("name", [n for n in NAMES if composed(n)["task"]["name"] == "digits"])
def test_it_takes_one_batch(name: str, tmp_path: Path, call: Callable[..., Any]) -> None:
    run = tmp_path / name
    words = [f"experiment={name}", "epochs=1", "+trainer.limit_train_batches=1", "validation_images=64", "threads=1"]
    answer = call("train", *words, "calibration_images=64", f"run={run}")
    assert answer.code == 0, answer.err
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert rows and (run / "supernet.safetensors").is_file()
