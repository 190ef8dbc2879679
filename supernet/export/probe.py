"""Door `probe`: what a target runs, and how fast; tables that a search can use."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supernet.desk import desk

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from onnx import ModelProto

    from supernet.config import QuantConfig
    from supernet.export.latency import Writes
    from supernet.export.legality import Shape
    from supernet.export.table import Table
    from supernet.interfaces import Target

Trial = tuple[str, "Shape", "QuantConfig", "QuantConfig"]
TOGETHER = 8
"""Pieces that take turns; they are written when all of them are done."""


def main(cfg: DictConfig) -> None:
    """Probe as `cfg` (conf/probe.yaml) says; write probe/<target>/ in the run, or in a folder of its own."""
    import numpy as np
    import torch
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from supernet.config import build
    from supernet.export import latency, legality
    from supernet.export.tables import Tables, check
    from supernet.run import load

    out = Path(HydraConfig.get().runtime.output_dir)
    if cfg.threads:
        torch.set_num_threads(int(cfg.threads))
    if cfg.checks < 1:
        raise ValueError(f"checks must be at least 1, got {cfg.checks}: the table is worth what the checks say")
    trusted = tuple(cfg.trust)
    target: Target = build(cfg.target, trusted=trusted)
    profile: Writes = build(cfg.profile, trusted=trusted)
    run = None if OmegaConf.is_missing(cfg, "run") else load(cfg.run, trusted=trusted)
    tables = Tables(out, target, str(cfg.profile.name), fresh=bool(cfg.fresh))
    tried = list(legality.trials(run.net) if run else grid_trials())
    try_all(target, profile, tried, tables.legality)
    show_legality(tables.legality, [key for key, *_ in tried])
    if run:
        anatomy = latency.Anatomy(run.net, profile)
        time_all(target, anatomy.models, anatomy.names, anatomy.memory, tables.latency)
        rng = np.random.default_rng(int(cfg.seed))
        show_check(check(anatomy, target, tables, int(cfg.checks), rng))
    else:
        models = grid_models(profile)
        time_all(target, models, dict.fromkeys(models, "grid"), GRID_MEMORY, tables.latency)
        show_latency(tables.latency, models)
    print(f"probed: {tables.folder}")


GRID_MEMORY = 1 << 20


def grid_trials() -> Iterator[Trial]:
    """Every shape of the standard grid with every integer choice."""
    from supernet.config import PerChannel, PerTensor, QuantConfig
    from supernet.export.legality import GRID, input_trial, weight_trial
    from supernet.formats.integer import Integer

    for shape in GRID:
        for bits in range(2, 9):
            for symmetric in (True, False):
                for granularity in (PerTensor(), PerChannel()):
                    yield weight_trial(shape, QuantConfig(Integer(bits), granularity, symmetric))
                yield input_trial(shape, QuantConfig(Integer(bits), PerTensor(), symmetric))


def grid_models(profile: Writes) -> dict[str, ModelProto]:
    """The pieces of the standard grid on images of 32 pixels, by key: weights of 8, 4, 2 bits, inputs of 8 and 4."""
    import dataclasses

    from supernet.config import PerChannel, QuantConfig
    from supernet.export.legality import GRID, trial
    from supernet.export.pieces import pieces
    from supernet.formats.integer import Integer

    found: dict[str, ModelProto] = {}
    for shape in GRID:
        for bits in (8, 4, 2):
            large = dataclasses.replace(shape, size=(32, 32))
            weight, data = QuantConfig(Integer(bits), PerChannel()), QuantConfig(Integer(max(bits, 4)), symmetric=False)
            deployed, _ = trial(large, weight, data)
            for piece in pieces(deployed, profile.loadable(deployed)):
                found.setdefault(piece.key, piece.model)
    return found


def try_all(target: Target, profile: Writes, tried: list[Trial], table: Table) -> None:
    """Try what the table does not have."""
    from supernet.artefacts import progress
    from supernet.export.legality import verdict

    left = set(table.missing({key: None for key, *_ in tried}))
    with progress("trying choices", len(left)) as bar:
        for key, shape, weight, data in tried:
            if key in left:
                table.add(key, **verdict(target, profile, shape, weight, data))
                bar.advance(note=str(shape))


def time_all(
    target: Target, models: Mapping[str, ModelProto], names: Mapping[str, str], memory: int, table: Table
) -> None:
    """Time the pieces that the table does not have."""
    from supernet.artefacts import progress

    left = table.missing(models)
    with progress("timing pieces", len(left)) as bar:
        for start in range(0, len(left), TOGETHER):
            keys = left[start : start + TOGETHER]
            seconds = target.pieces({key: models[key] for key in keys}, memory)
            overhead = seconds.pop("")
            for key in keys:
                table.add(key, name=names[key], seconds=seconds[key], call=overhead, memory=memory)
            bar.advance(len(keys), note=names[keys[-1]])


# -- what is shown -----------------------------------------------------------------------------------------------------
def show_legality(table: Table, keys: list[str]) -> None:
    """Print, for each shape, how its choices run, and each that does not."""
    by_shape: dict[str, list[dict[str, Any]]] = {}
    for key in dict.fromkeys(keys):
        by_shape.setdefault(key.partition(" | ")[0], []).append(table.records[key])
    rows = []
    for shape, records in by_shape.items():
        whole = sum(r["right"] and r["integer"] for r in records)
        real = sum(r["right"] and not r["integer"] for r in records)
        rows.append([shape, str(whole), str(real), str(len(records) - whole - real)])
    _print("choices that run", ["layer", "in integer kernels", "in float", "not at all"], rows)
    for record in (r for records in by_shape.values() for r in records if not r["right"]):
        print(f"does not run: {record['key']}: {record['why']}")


def show_latency(table: Table, keys: Mapping[str, Any]) -> None:
    """Print the time of each piece."""
    from supernet.config import si

    rows = [[key[:90], si(table.records[key]["seconds"], "s", 3)] for key in keys]
    _print("times of one image", ["piece", "time"], rows)


def show_check(found: Mapping[str, Any]) -> None:
    """Print what the table says of whole subnets beside what was measured."""
    from supernet.config import si

    rows = []
    for row in found["subnets"]:
        off = [f"{100 * (row[which] / row['measured'] - 1):+.1f} %" for which in ("sum", "predicted")]
        rows.append([row["id"], *(si(row[which], "s", 3) for which in ("sum", "predicted", "measured")), *off])
    heads = ["subnet", "sum of pieces", "predicted", "measured whole", "sum off", "predicted off"]
    _print(f"whole subnets; predicted = sum x {found['correction']:.3f}", heads, rows)
    if found["most_off"] > 0.15:
        print(
            f"the largest error is {found['most_off']:.0%}: the machine may be busy; probe again with fresh=true when "
            "it is idle"
        )


def _print(title: str, heads: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table as Shown

    shown = Shown(title=title, title_justify="left")
    for number, head in enumerate(heads):
        shown.add_column(head, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        shown.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(shown)


if __name__ == "__main__":
    sys.exit(desk("probe", main))
