"""One tool with one draw of images, in the tool's own environment.

    python -m benchmarks.assigning.worker TOOL FOLDER SEED

reads what the driver has written into FOLDER (see problem.py, and `limits.json`) and writes FOLDER/TOOL-SEED.json.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.assigning import problem
from benchmarks.timing.peers import PEERS, SEARCHERS

TOOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "modelopt-gradient": ("modelopt", {"method": "gradient"}),
    "modelopt-kl": ("modelopt", {"method": "kl_div"}),
    "mct": ("mct", {}),
    "aimet": ("aimet", {}),
}
"""Name -> (environment and module, options)."""


def main(tool: str, folder: Path, seed: int) -> None:
    """Run the tool and write its sweep."""
    peer, options = TOOLS[tool]
    torch.manual_seed(seed)
    limits = json.loads((folder / "limits.json").read_text())
    module = importlib.import_module(f"benchmarks.assigning.{peer}")
    unfinished, out = folder / f"{tool}-{seed}.part", folder / f"{tool}-{seed}.json"
    known: dict[str, Any] = json.loads(unfinished.read_text()) if unfinished.exists() else {"sweep": [], "seconds": 0.0}
    sweep, before, start = known["sweep"], known["seconds"], time.monotonic()
    net, batches = problem.network(folder), problem.batches(folder, seed)
    for entry in module.assign(net, batches, limits=limits, known=list(sweep), **options):
        sweep.append(entry)
        _write(unfinished, {"sweep": sweep, "seconds": before + time.monotonic() - start})
    package = (SEARCHERS | PEERS)[peer][0].partition("==")[0]
    versions = {name: importlib.metadata.version(name) for name in (package, "torch")}
    found = {"tool": tool, "seed": seed, "options": options, "versions": versions, "sweep": sweep}
    found |= {"images": problem.IMAGES, "measured": {"seconds": round(before + time.monotonic() - start, 1)}}
    _write(out, found)
    unfinished.unlink(missing_ok=True)


def _write(path: Path, content: dict[str, Any]) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content))
    draft.replace(path)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
