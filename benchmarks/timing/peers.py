"""The peers' own environments: a virtual environment each, made with venv and pip as they are set up on the machine.

They are never among our dependencies (their pins collide), and nothing of ours is installed beside them.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.timing.protocol import WorkerError

SAME = ("torch", "torchvision", "timm")
"""Installed beside each peer in the versions that this process has, so that all sides run the same kernels."""

PEERS = {
    "modelopt": ("nvidia-modelopt==0.47.0", "requests"),  # imports requests without declaring it
    "nncf": ("nncf==3.4.0",),
    "brevitas": ("brevitas==0.13.4",),
}
"""Peers whose training steps are timed."""

SEARCHERS = {
    "mct": ("model-compression-toolkit==2.6.1",),
    "aimet": ("aimet-torch==2.42.0",),
}
"""Further peers whose bit assignments are compared; so are ModelOpt's."""


def requirements(peer: str) -> list[str]:
    """What pip installs for a peer; a local part of a version (+cpu) is left to the machine's own set-up."""
    same = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in SAME]
    return [*same, *(SEARCHERS | PEERS)[peer]]


def python_of(peer: str, work: Path) -> Path:
    """The interpreter of a peer's environment `work`/<peer>, which is made where it is missing or another one.

    Raises:
        WorkerError: the environment cannot be made; says why in one line.
    """
    folder = (work / peer).absolute()
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(requirements(peer)) + "\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    log = work / "logs" / f"{peer}.install.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *requirements(peer)]
    with log.open("w") as file:
        for command in ([sys.executable, "-m", "venv", str(folder)], pip):
            if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode:
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing was said"]
                raise WorkerError(f"the environment cannot be made: {last[0][:200]}; see {log.name}")
    stamp.write_text(wanted)
    return python


def variables(python: Path, base: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of a peer's worker: its own programs first (ninja builds NNCF's kernels, into the folder of
    the environment), and no limit on the time that NNCF waits for this build."""
    own = {
        "PATH": f"{python.parent}{os.pathsep}{base.get('PATH', '')}",
        "TORCH_EXTENSIONS_DIR": str(python.parent.parent / "extensions"),
        "NNCF_EXTENSION_LOAD_TIMEOUT": "0",
    }
    return dict(base) | own
