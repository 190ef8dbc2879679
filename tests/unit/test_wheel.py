"""The wheel holds everything, and works from a folder that has a `conf/` and a `search.py` of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import elastibit

pytestmark = pytest.mark.slow

ROOT = Path(elastibit.__file__).resolve().parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout, and without fetching anything."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "elastibit.py"):
        shutil.copy(ROOT / name, source)
    for name in ("supernet", "search", "predictors", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    line = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(source)]
    subprocess.run([sys.executable, "-m", *line], check=True, capture_output=True)
    return next(out.glob("elastibit-*.whl"))


def test_wheel_holds_every_module_and_every_yaml(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {"elastibit.py"}
    for name in ("supernet", "search", "predictors", "conf"):
        files = (path for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".yaml"))
        wanted |= {path.relative_to(ROOT).as_posix() for path in files}
    assert held == wanted


@pytest.mark.parametrize("door", ["elastibit", "-m supernet"])
def test_installed_wheel_works_beside_folders_of_the_same_names(wheel: Path, tmp_path: Path, door: str) -> None:
    site, here = tmp_path / "site", tmp_path / "here"
    line = ["pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", *line], check=True, capture_output=True)
    (here / "conf").mkdir(parents=True)
    (here / "conf" / "train.yaml").write_text("wrong: true\n")
    (here / "search.py").write_text("raise RuntimeError('wrong search')\n")
    words = [str(site / "bin" / "elastibit"), "train"] if door == "elastibit" else door.split()
    done = subprocess.run(
        [sys.executable, *words, "--cfg", "job", "task=digits"],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "supernet.tasks" in done.stdout
    assert "wrong" not in done.stdout
