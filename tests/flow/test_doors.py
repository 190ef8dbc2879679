"""The doors from outside: each one as a process of its own, in a folder that is not the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Small = dict[str, list[str]]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A working directory with files that bear the names of our packages."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "search.yaml").write_text("wrong: true\n")
    (tmp_path / "search.py").write_text("raise RuntimeError('the wrong search')\n")
    return tmp_path


def process(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=250, check=False)


def console() -> str:
    script = Path(sys.executable).with_name("elastibit")
    if not script.is_file():
        pytest.skip("the console script is not installed beside this Python")
    return str(script)


class TestProcesses:
    def test_train(self, outside: Path, small: Small) -> None:
        done = process(outside, console(), "train", *small["train"], "epochs=0", "run=mine")
        assert (done.returncode, done.stdout) == (0, f"trained: {outside / 'mine'}\n"), done.stderr
        command = json.loads((outside / "mine" / "space.json").read_text())["provenance"]["measured"]["command"]
        assert command.startswith("elastibit train") and command.endswith("run=mine")

    def test_predict(self, outside: Path, run: Path, small: Small) -> None:
        shutil.move(run, outside / "mine")
        words = [*small["predict"], "n=10", "select_images=64", "recalibrate_images=64"]
        done = process(outside, sys.executable, "-m", "predictors", "run=mine", *words)
        assert done.returncode == 0, done.stderr
        assert "held-out pairs" in done.stdout and (outside / "mine" / "predictor.safetensors").is_file()

    def test_search(self, outside: Path, run: Path, small: Small) -> None:
        shutil.move(run, outside / "mine")
        words = ["run=mine", "budget.bitops=w4a4", *small["search"], "candidates=1", "generations=1"]
        done = process(outside, console(), "search", *words)
        assert done.returncode == 0, done.stderr
        assert "w4a4" in done.stdout and (outside / "mine" / "front.json").is_file()

    def test_export(self, outside: Path, flow: Any) -> None:
        shutil.copytree(flow[0], outside / "mine")
        shutil.rmtree(outside / "mine" / "export")
        done = process(outside, sys.executable, "-m", "supernet.export", "run=mine", "subnet=w4a4")
        assert done.returncode == 0, done.stderr
        assert len(list((outside / "mine" / "export").glob("*/model.onnx"))) == 1

    def test_report(self, outside: Path, run: Path) -> None:
        shutil.move(run, outside / "mine")
        done = process(outside, console(), "report", "run=mine")
        assert (done.returncode, done.stdout) == (0, f"report: {outside / 'mine' / 'report.html'}\n"), done.stderr
        assert "elastibit search run=mine" in (outside / "mine" / "report.html").read_text()

    def test_demo_spares_what_it_has_not_made(self, outside: Path) -> None:
        done = process(outside, console(), "demo", "run=conf")
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert "files that no demo has made" in done.stderr and done.stderr.count("\n") == 1
        assert [p.name for p in (outside / "conf").iterdir()] == ["search.yaml"]
