"""Winners and their controls on test: read once, by the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from predictors.measuring import tested
from search.verdict import CONFIDENCE, RESAMPLES, difference, on_test
from supernet.artefacts import progress, provenance, read_json, write_json
from supernet.run import Run, digest

Record = Mapping[str, Any]
FILE = "test.json"


def key_of(front: Record, weights: str, images: int | None) -> str:
    """What a judgement is about: the subnets of a front.json and what they were measured with, in 16 digits.

    Args:
        front: front.json.
        weights: SHA-256 of the run's supernet.safetensors.
        images: of test; None: all.
    """
    competing = [[s["label"], s["id"], {name: c["id"] for name, c in s["controls"].items()}] for s in front["subnets"]]
    said = [competing, front.get("settings", {}).get("recalibrate_images"), weights, images, RESAMPLES, CONFIDENCE]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def judge(run: Run, front: Record, file: Path, *, images: int | None = None, seed: int = 0) -> Record:
    """Measure the winners of a front.json and their controls on test, and compare them image by image.

    Each has BatchNorm statistics of its own, as when it was measured on select. What `file` says already of the same
    subnets and weights is not measured again.

    Args:
        run: with its task.
        front: front.json.
        file: where the judgement is kept (test.json).
        images: of test; None: all of the part.
        seed: of the bootstrap.

    Returns:
        The content of `file`: for each budget accuracy on test, the differences to the controls with their intervals,
        which subnet to use, and the verdict in words.

    Raises:
        ValueError: the run has no task.
    """
    key = key_of(front, digest(run.path), images)
    known: Record = read_json(file) if file.is_file() else {}
    if known.get("key") == key:
        return known
    if run.task is None:
        raise ValueError(f"{run.path} has no test images here; judge it where its data is, or set test=false")
    competing = {r["id"]: r["indices"] for s in front["subnets"] for r in (s, *s["controls"].values())}
    recalibration = list(run.task.recalibrate(front.get("settings", {}).get("recalibrate_images")))
    batches = list(run.task.test(images))
    right = {}
    with progress("measuring on test", len(competing)) as bar:
        for name, row in competing.items():
            right[name] = tested(run.net, row, recalibration, batches)
            bar.advance(note=f"{right[name].mean():.1%}")
    subnets = [_judged(s, right, np.random.default_rng([seed, b])) for b, s in enumerate(front["subnets"])]
    record = {
        "fingerprint": run.net.fingerprint,
        "key": key,
        "images": sum(len(labels) for _, labels in batches),
        "resamples": RESAMPLES,
        "confidence": CONFIDENCE,
        "subnets": subnets,
        "provenance": provenance(seed),
    }
    write_json(file, record)
    return record


def _judged(found: Record, right: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """One budget: the winner, its controls, and which of them to use."""
    identity, names = found["id"], {name: control["id"] for name, control in found["controls"].items()}
    gaps = {name: difference(right[identity], right[other], rng) for name, other in names.items() if other != identity}
    use, words = on_test(identity, names, gaps)
    controls = {
        name: {
            "id": other,
            "accuracy": float(right[other].mean()),
            "difference": asdict(gaps[name]) if name in gaps else {"mean": 0.0, "low": 0.0, "high": 0.0},
        }
        for name, other in names.items()
    }
    own = {"label": found["label"], "id": identity, "accuracy": float(right[identity].mean())}
    return own | {"controls": controls, "use": use or "winner", "verdict": words}
