"""A measured sensitivity on disk: it takes images and a while, and stays true as long as the weights do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from predictors.measuring import weights_digest
from supernet.artefacts import read_json, write_json
from supernet.config import build
from supernet.cost import Factors
from supernet.run import Run

FILE = "sensitivity.json"


def sensitivity_of(
    run: Run, node: Mapping[str, Any], recalibrate_images: int | None, *, out: Path, trusted: Sequence[str] = ()
) -> Factors:
    """The sensitivity of a run by one method: what the run or `out` has kept, else measured, and kept in `out`.

    Args:
        run: whose supernet; without a task nothing can be measured, and the predictor's own is the last resort.
        node: the method, as a YAML of conf/sensitivity says it.
        recalibrate_images: images that it may see; None: all of the part.
        out: folder that keeps it, beside those of other methods.
        trusted: targets of your own.

    Raises:
        FileNotFoundError: it is nowhere, and nothing can be measured.
        ValueError: a file is broken.
    """
    make = build(node, trusted=trusted)
    origin = {"fingerprint": run.net.fingerprint, "weights": weights_digest(run.net)}
    settings = described(node, recalibrate_images)
    for folder in (run.path, out):
        for kept in _tables(folder / FILE, origin):
            if kept["settings"] == settings:
                return _factors(kept["terms"])
    if run.task is not None:
        found: Factors = make(run.net, run.task.recalibrate(recalibrate_images))
        record = {"settings": settings, "terms": plain(found)}
        write_json(out / FILE, origin | {"sensitivities": [*_tables(out / FILE, origin), record]})
        return found
    file = run.path / "predictor.json"
    predictor: dict[str, Any] = read_json(file) if file.is_file() else {}
    if predictor.get("sensitivity") and predictor["report"].get("weights") == origin["weights"]:
        return _factors(predictor["sensitivity"])
    raise FileNotFoundError(
        f"{run.path} has no sensitivity of its weights, and its data is not here to measure one; "
        "run `elastibit predict` or `elastibit search` once where the data is"
    )


def described(node: Mapping[str, Any], recalibrate_images: int | None) -> dict[str, Any]:
    """The settings of a sensitivity for the record: its class by name, its options, and the images that it may see."""
    options = {str(key): value for key, value in node.items() if key != "_target_"}
    return {"kind": str(node["_target_"]).rpartition(".")[2]} | options | {"recalibrate_images": recalibrate_images}


def plain(factors: Factors) -> list[dict[str, Any]]:
    """Factors as JSON holds them."""
    return [{"dimensions": list(dims), "table": table.tolist()} for dims, table in factors.terms]


def _factors(terms: Iterable[Mapping[str, Any]]) -> Factors:
    return Factors(tuple((tuple(t["dimensions"]), np.array(t["table"], dtype=float)) for t in terms))


def _tables(file: Path, origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a file keeps of one supernet; of another one it keeps nothing."""
    record = read_json(file) if file.is_file() else {}
    same = isinstance(record, dict) and all(record.get(key) == value for key, value in origin.items())
    return list(record["sensitivities"]) if same else []
