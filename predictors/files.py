"""A predictor on disk: predictor.safetensors (what it learned) and predictor.json (kind, options, report)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from supernet.artefacts import load_tensors, read_json, save_tensors, write_json
from supernet.config import locate, registered
from supernet.cost import Costs, Factors
from supernet.interfaces import Predictor
from supernet.space import SearchSpace


class Storable(Predictor, Protocol):
    """A predictor that is its options, its tensors and its sensitivity.

    Attributes:
        space: what it predicts.
        options: keyword arguments it was made with, besides space, costs, sensitivity and rng; plain values.
        tensors: everything it has learned.
        sensitivity: its additive part, or None.
        encoding: digest of how rows become inputs; "" where they do not.
    """

    space: SearchSpace
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    sensitivity: Factors | None
    encoding: str


def save_predictor(predictor: Storable, folder: Path | str, report: Mapping[str, Any] | None = None) -> None:
    """Write predictor.safetensors and predictor.json into `folder`.

    Args:
        predictor: fitted.
        folder: usually the run directory.
        report: how good it is (`predictors.judging.report`), for the record.
    """
    terms = predictor.sensitivity.terms if predictor.sensitivity is not None else None
    fingerprint = predictor.space.fingerprint
    record = {
        "kind": type(predictor).__name__,
        "fingerprint": fingerprint,
        "encoding": predictor.encoding,
        "options": predictor.options,
        "sensitivity": None if terms is None else [{"dimensions": list(d), "table": t.tolist()} for d, t in terms],
        "report": dict(report or {}),
    }
    save_tensors(Path(folder) / "predictor.safetensors", predictor.tensors, {"fingerprint": fingerprint})
    write_json(Path(folder) / "predictor.json", record)


def load_predictor(folder: Path | str, space: SearchSpace, costs: Costs | None = None) -> Storable:
    """What `save_predictor` wrote; the class is found by its name among those of conf/predictor.

    Raises:
        FileNotFoundError: no predictor in this folder.
        ValueError: of another space (names both fingerprints), broken, of a class that is not registered, or of one
            that has other options or encodes rows otherwise by now.
    """
    path = Path(folder) / "predictor.json"
    if not path.is_file():
        raise FileNotFoundError(f"no predictor at {path}; make one with `elastibit predict run=...`")
    record = read_json(path)
    tensors, metadata = load_tensors(path.with_suffix(".safetensors"))
    for found in (record.get("fingerprint"), metadata.get("fingerprint")):
        if found != space.fingerprint:
            raise ValueError(
                f"{path} is of space {found}, this run of {space.fingerprint}; run `elastibit predict` in this run"
            )
    names = [t for t in registered() if t.startswith("predictors.") and t.endswith(f".{record['kind']}")]
    if not names:
        raise ValueError(
            f"predictor {record['kind']!r} is not registered; add conf/predictor/<name>.yaml that names its class"
        )
    terms = record["sensitivity"]
    sensitivity = terms and Factors(tuple((tuple(t["dimensions"]), np.array(t["table"], dtype=float)) for t in terms))
    changed = f"{path} was made by another version of {record['kind']}; run `elastibit predict` again, pairs are kept"
    try:
        made: Storable = locate(names[0])(space=space, costs=costs, sensitivity=sensitivity, **record["options"])
    except TypeError as error:  # an option that it no longer has
        raise ValueError(changed) from error
    if record.get("encoding", "") != made.encoding:
        raise ValueError(changed)
    made.tensors = tensors
    return made
