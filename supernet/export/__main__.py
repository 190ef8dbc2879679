"""Door `export`: the subnets of a search, each written as a file, proved and described."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supernet.desk import desk

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import nn

    from supernet.run import Run

Record = Mapping[str, Any]


def main(cfg: DictConfig) -> None:
    """Export as `cfg` (conf/export.yaml) says, each subnet into `export/<id>/`; several profiles into folders in it.

    Raises:
        VerificationError: some file does not compute what its subnet does; the others are written all the same.
    """
    import torch
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from supernet.artefacts import VerificationError, progress
    from supernet.config import build
    from supernet.export.bit_maps import export_bits, write_maps
    from supernet.export.bundle import export
    from supernet.run import load

    out = Path(HydraConfig.get().runtime.output_dir)
    if cfg.threads:
        torch.set_num_threads(int(cfg.threads))
    profile = OmegaConf.to_container(cfg.profile, resolve=True)
    run = load(cfg.run, trusted=tuple(cfg.trust))
    assert run.task is not None  # a run without one is refused by load
    exporter = build(profile, trusted=tuple(cfg.trust))
    forms = [str(form) for form in cfg.bits]
    wanted = chosen(run, str(cfg.subnet), **reading(cfg))
    configs = {config.id: config for config in (run.net.space.config(record["indices"]) for record in wanted)}
    for form, config in itertools.product(forms, configs.values()):
        export_bits(run.net, config, form, loose=bool(cfg.loose))  # refused before anything is written
    cards: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    failures: list[str] = []
    with progress("export", len(wanted)) as bar:
        for record in wanted:
            subnet, about = materialised(run, record), described(run, record)
            folder, batches = out / "export" / str(about["id"]), run.task.test(cfg.images)
            try:
                made = export(subnet, run.net.example, folder, exporter, batches, meta=about, seed=int(cfg.seed))
                cards += made["cards"].values() if "cards" in made else [made]
                skipped |= {f"{about['name']}, {name}": why for name, why in made.get("skipped", {}).items()}
                write_maps(run.net, configs[str(about["id"])], subnet, folder / "bits", forms, bool(cfg.loose))
            except VerificationError as error:
                failures.append(f"{about['name']}: {error}")
            bar.advance(note=str(about["name"]))
    show(cards)
    for what, why in skipped.items():
        print(f"left out: {what}: {why}")
    if failures:
        raise VerificationError("\n".join(failures))
    print(f"exported: {out / 'export'}")


def reading(cfg: DictConfig) -> dict[str, Any]:
    """How a bit map is to be read, as `supernet.export.bit_maps.import_bits` takes it."""
    from supernet.config import build

    names = renamed([str(pair) for pair in cfg.names])
    form = {"form": build(cfg.assignment, trusted=tuple(cfg.trust))} if cfg.get("assignment") else {}
    return {"default": cfg.default, "loose": bool(cfg.loose), "names": names} | form


def chosen(run: Run, name: str, **reading: Any) -> list[Record]:
    """The records of the subnets that `name` names, each once.

    Args:
        run: the run.
        name: `all` of front.json, the label of a budget there, an id, a JSON file with `indices`, or a bit map.
        reading: how a bit map is to be read: see `supernet.export.bit_maps.import_bits`.

    Raises:
        FileNotFoundError: nothing was searched yet.
        ValueError: no such subnet, a record of another space, or a bit map that does not fit it.
    """
    from supernet.artefacts import read_json
    from supernet.export.bit_maps import import_bits

    path, front = Path(name), run.path / "front.json"
    records: list[Record]
    if path.suffix and path.is_file():
        found = read_json(path)
        if isinstance(found, dict) and {"fingerprint", "indices"} & set(found):
            records = [{"file": path} | found]
        else:
            config = import_bits(run.net, found, **reading)
            records = [{"label": path.stem, "id": config.id, "indices": list(config.row)}]
    elif not front.is_file():
        raise FileNotFoundError(
            f"no front at {front}; make one with `elastibit search run={run.path} budget.bitops=w4a4`"
        )
    else:
        found = read_json(front)
        space = {"fingerprint": found.get("fingerprint")}
        every = [space | record for record in found["subnets"]]
        records = [record for record in every if name in ("all", str(record["label"]), record["id"])]
        if not records:
            known = ", ".join(dict.fromkeys(f"{record['label']} ({record['id']})" for record in every))
            raise ValueError(f"no subnet {name!r}; subnet=all, a file, or one of {known}")
    for record in records:
        if record.get("fingerprint", run.net.fingerprint) != run.net.fingerprint or "indices" not in record:
            raise ValueError(
                f"{record.get('file', front)} is of space {record.get('fingerprint')}, this run of "
                f"{run.net.fingerprint}; search again in this run"
            )
    return list({tuple(record["indices"]): record for record in reversed(records)}.values())[::-1]


def renamed(pairs: list[str]) -> dict[str, str | None]:
    """The setting `names`: `theirs:ours` for each, `theirs:` for what is to be left out."""
    wrong = [pair for pair in pairs if pair.count(":") != 1]
    if wrong:
        raise ValueError(f"names are written theirs:ours, or theirs: to leave one out; got {wrong[0]!r}")
    return {theirs: ours or None for theirs, ours in (pair.split(":") for pair in pairs)}


def materialised(run: Run, record: Record) -> nn.Module:
    """The subnet with the BatchNorm statistics stored beside its record, else with those of the recalibration images.

    Raises:
        ValueError: the stored statistics are of another subnet.
    """
    from supernet.artefacts import load_tensors
    from supernet.calibration.batchnorm import norms, recalibrate

    config = run.net.space.config(record["indices"])
    subnet = run.net.materialise(config).eval()
    beside = Path(record["file"]) if "file" in record else run.path / "subnets" / config.id
    path = beside.with_name(f"{beside.stem}.safetensors")
    if not path.is_file():
        assert run.task is not None
        recalibrate(subnet, run.task.recalibrate())
        return subnet
    tensors, origin = load_tensors(path)
    paths = {id(module): name for name, module in subnet.named_modules()}
    needed = {f"{paths[id(norm)]}.{name}" for norm in norms(subnet) for name, _ in norm.named_buffers(recurse=False)}
    if origin.get("fingerprint") != run.net.fingerprint or set(tensors) != needed:
        raise ValueError(
            f"{path} does not hold the BatchNorm statistics of subnet {config.id}; search again in this run"
        )
    subnet.load_state_dict(tensors, strict=False)
    return subnet


def described(run: Run, record: Record) -> dict[str, Any]:
    """What the card says of model, data and subnet."""
    from supernet.run import digest

    assert run.task is not None
    config = run.net.space.config(record["indices"])
    backbone, data = run.config.get("backbone", {}), run.task.describe()
    label = record.get("label") or ", ".join(record.get("labels", [])) or "file"
    model = str(backbone.get("_target_", "")).rpartition(".")[2]
    return {
        "name": f"{data['name']} {label} ({config.id})",
        "id": config.id,
        "budget": label,
        "model": f"{model} {backbone.get('name') or backbone.get('depth') or backbone.get('factory') or ''}".strip(),
        "trained epochs": run.trained,
        "data": data["name"],
        "accuracy on select": record.get("measured"),
        "space": run.net.fingerprint,
        "supernet sha256": digest(run.path),
        "indices": list(config.row),
        "backbone": backbone,
        "task": data,
        "searched": {key: record[key] for key in ("budget", "predicted", "costs") if key in record},
    }


def show(cards: list[dict[str, Any]]) -> None:
    """Print a row for each file."""
    from rich.console import Console
    from rich.table import Table

    from supernet.config import si

    table = Table(title="exported, measured on test", title_justify="left")
    for heading in ("budget", "id", "profile", "subnet", "file", "same label", "size", "float", "ms", "float"):
        table.add_column(heading, justify="left" if heading in ("budget", "id", "profile") else "right", no_wrap=True)
    for card in cards:
        proof, time = card["verification"], card["measured"].get("latency") or {}
        accuracy = [f"{proof['accuracy'][who]:.2%}" for who in ("subnet", "file")]
        sizes = [si(proof["bytes"][which], "B", 3) for which in ("file", "float")]
        times = [f"{time[which]:.3g}" if which in time else "-" for which in ("file_ms", "float_ms")]
        about = [card["about"]["budget"], card["about"]["id"], card["profile"]]
        table.add_row(*about, *accuracy, f"{proof['agreement']:.2%}", *sizes, *times)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(desk("export", main))
