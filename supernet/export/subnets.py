"""The subnets of a run by name, and each as a module with the values that belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from supernet.artefacts import load_tensors, read_json, save_tensors, write_json
from supernet.calibration.batchnorm import norms, recalibrate
from supernet.export.bit_maps import import_bits
from supernet.run import Run, weights_digest

Record = Mapping[str, Any]
TUNED, WEIGHTS, RECORD = "finetuned", "weights.safetensors", "finetuned.json"


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


def materialised(run: Run, record: Record) -> nn.Module:
    """The subnet with the BatchNorm statistics stored beside its record, else with those of the recalibration images.

    Raises:
        ValueError: the stored statistics are of another subnet.
    """
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


def keep_tuned(run: Run, subnet: nn.Module, record: Record) -> Path:
    """Write a fine-tuned subnet into `finetuned/<id>/` of a run: its weights, and a record of what was done, last.

    Args:
        run: the run.
        subnet: what `finetune` returned.
        record: `indices`, `epochs`, and whatever is worth knowing.
    """
    config = run.net.space.config(record["indices"])
    folder, origin = run.path / TUNED / config.id, _origin(run, config.id)
    (folder / RECORD).unlink(missing_ok=True)  # it speaks of the weights beside it
    save_tensors(folder / WEIGHTS, dict(subnet.state_dict()), origin)
    write_json(folder / RECORD, origin | dict(record))
    return folder


def tuned_record(run: Run, identity: str) -> Record | None:
    """What is known of a fine-tuned subnet; None where there is none of the run's present weights."""
    file = run.path / TUNED / identity / RECORD
    record: Record = read_json(file) if file.is_file() else {}
    return record if all(record.get(key) == value for key, value in _origin(run, identity).items()) else None


def tuned(run: Run, identity: str) -> nn.Module | None:
    """A fine-tuned subnet; None where there is none of the run's present weights.

    Raises:
        ValueError: the file is broken or of another subnet.
    """
    record = tuned_record(run, identity)
    if record is None:
        return None
    path = run.path / TUNED / identity / WEIGHTS
    tensors, origin = load_tensors(path)
    subnet = run.net.materialise(record["indices"]).eval()
    if origin != _origin(run, identity) or tensors.keys() != subnet.state_dict().keys():
        raise ValueError(f"{path} does not hold the fine-tuned subnet {identity}; run `elastibit finetune` again")
    subnet.load_state_dict(tensors)
    return subnet


def _origin(run: Run, identity: str) -> dict[str, Any]:
    return {"fingerprint": run.net.fingerprint, "id": identity, "weights": weights_digest(run.net)}
