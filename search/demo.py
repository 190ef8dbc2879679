"""Door `demo`: all five doors after one another on the embedded digits, in one process."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supernet.desk import desk

if TYPE_CHECKING:
    from omegaconf import DictConfig

MARK = "demo.json"
"""A folder with this file was made by the demo, and only such a one is replaced by it."""


def main(cfg: DictConfig) -> None:
    """Go through all doors as `cfg` (conf/demo.yaml) says, and print what came of it."""
    from hydra.core.hydra_config import HydraConfig

    from supernet.artefacts import command, provenance, write_json

    out = Path(HydraConfig.get().runtime.output_dir)
    start = time.monotonic()
    _clear(out)
    write_json(out / MARK, {"provenance": provenance(int(cfg.seed))})
    common = [f"run={_quoted(str(cfg.run))}", f"seed={cfg.seed}", *([f"threads={cfg.threads}"] if cfg.threads else [])]
    for step, (verb, door) in enumerate(_doors().items(), 1):
        words = [*common, *map(str, cfg.get(verb) or [])]
        print(f"\n[{step}/5] {command(['elastibit', verb, *words])}", flush=True)
        _through(verb, door, words, out)
    _show(out)
    print(f"\n{time.monotonic() - start:.0f} s in all; open the report: {out / 'report.html'}")


def _clear(out: Path) -> None:
    """Empty the folder of an earlier demo.

    Raises:
        ValueError: somebody else's files are in it.
    """
    if any(out.iterdir()) and not (out / MARK).exists():
        raise ValueError(f"{out.name} holds files that no demo has made; give another folder with run=...")
    for entry in out.iterdir():
        if entry.name == MARK:
            continue  # the last to be replaced: a demo that was stopped here is still known as one
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _doors() -> dict[str, Callable[[DictConfig], Any]]:
    from predictors.__main__ import main as predict
    from search.__main__ import main as search
    from search.report import main as report
    from supernet.__main__ import main as train
    from supernet.export.__main__ import main as export

    return {"train": train, "predict": predict, "search": search, "export": export, "report": report}


def _through(verb: str, door: Callable[[DictConfig], Any], words: Sequence[str], out: Path) -> None:
    """Open one door as the command line would: its own configuration, its files in `out`."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict, read_write

    cfg = compose(verb, list(words), return_hydra_config=True)
    with read_write(cfg), open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(out)
        HydraConfig.instance().set_config(cfg)
        del cfg["hydra"]
    door(cfg)


def _quoted(value: str) -> str:
    """A value that Hydra's grammar takes as it is, whatever characters are in it."""
    return value if re.fullmatch(r"[\w./~-]+", value) else "'" + value.replace("'", "\\'") + "'"


def _show(out: Path) -> None:
    """Print what came out for each budget: chosen on select, and then, exported, on test."""
    from rich.console import Console
    from rich.table import Table

    from supernet.artefacts import read_json
    from supernet.config import si

    headings = ("budget", "select", "uniform bits", "test, exported", "file", "of float", "time", "of float")
    table = Table(*headings, title="\naccuracy, bytes and time of what was found", title_justify="left")
    for found in read_json(out / "front.json")["subnets"]:
        card = read_json(out / "export" / found["id"] / "card.json")
        proof, speed = card["verification"], card["measured"]["latency"]
        size, whole = proof["bytes"]["file"], proof["bytes"]["float"]
        uniform = found["controls"].get("uniform", {}).get("measured")
        table.add_row(
            found["label"],
            f"{found['measured']:.1%}",
            "-" if uniform is None else f"{uniform:.1%}",
            f"{proof['accuracy']['file']:.1%}",
            si(size, "B"),
            f"{size / whole:.0%}",
            f"{speed['file_ms']:.3g} ms",
            f"{speed['file_ms'] / speed['float_ms']:.0%}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(desk("demo", main))
