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
    from supernet.export.subnets import chosen
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
            subnet, about = picked(run, record, cfg.finetuned)
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


def renamed(pairs: list[str]) -> dict[str, str | None]:
    """The setting `names`: `theirs:ours` for each, `theirs:` for what is to be left out."""
    wrong = [pair for pair in pairs if pair.count(":") != 1]
    if wrong:
        raise ValueError(f"names are written theirs:ours, or theirs: to leave one out; got {wrong[0]!r}")
    return {theirs: ours or None for theirs, ours in (pair.split(":") for pair in pairs)}


def picked(run: Run, record: Record, finetuned: str | bool) -> tuple[nn.Module, dict[str, Any]]:
    """The subnet to export and what its card says of it.

    Args:
        run: the run.
        record: of the subnet.
        finetuned: True: the fine-tuned weights; False: those of the supernet; "auto": the fine-tuned where there are.

    Raises:
        ValueError: another word, or True where there are no fine-tuned weights of the present supernet.
    """
    from supernet.export.subnets import TUNED, materialised, tuned, tuned_record

    if finetuned not in (True, False, "auto"):
        raise ValueError(f"finetuned is auto, true or false, got {finetuned!r}")
    about = described(run, record)
    identity = str(about["id"])
    known, subnet = (tuned_record(run, identity), tuned(run, identity)) if finetuned else (None, None)
    if known is not None and subnet is not None:
        about["name"] = f"{about['name']}, fine-tuned"
        about |= {"fine-tuned epochs": known["epochs"], "accuracy on select": known["after"]}
        print(f"{about['name']} for {known['epochs']} epochs: its own weights; finetuned=false exports the supernet's")
        return subnet, about
    if finetuned is True:
        raise ValueError(
            f"{run.path / TUNED / identity} holds no fine-tuned weights of this run's supernet; "
            f"make them with `elastibit finetune run={run.path} subnet={identity}`"
        )
    if finetuned and (run.path / TUNED / identity).is_dir():
        print(f"{about['name']}: its fine-tuned weights are of another training of this run, and are left aside")
    return materialised(run, record), about


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
