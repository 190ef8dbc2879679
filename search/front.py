"""What a search found, and the file that holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supernet.artefacts import provenance, read_json, write_json
from supernet.config import SubnetConfig
from supernet.space import Indices, SearchSpace


@dataclass(frozen=True)
class Candidate:
    """A subnet with its figures.

    Attributes:
        config: the subnet.
        predicted: mean and standard deviation of its predicted score.
        measured: accuracy 0..1 on select after BatchNorm recalibration; None where it was not measured.
        costs: every kind of cost, in the kind's unit.
    """

    config: SubnetConfig
    predicted: tuple[float, float]
    measured: float | None
    costs: dict[str, float]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "id": self.config.id,
            "indices": list(self.config.row),
            "genes": self.config.plain(),
            "predicted": {"mean": self.predicted[0], "std": self.predicted[1]},
            "measured": self.measured,
            "costs": self.costs,
        }


@dataclass(frozen=True)
class Found(Candidate):
    """The winner under one budget.

    Attributes:
        label: the budget's name.
        limits: kind -> limit.
        slack: kind -> share of the limit that is not used, 0..1.
        controls: what it has to beat within the same limits: `uniform` (the best uniform bits), `integer_program`
            (the exact optimum of the additive sensitivity), `random_search` (the best measured of as many random
            subnets); left out where there is none.
        interrupted: the search was stopped by hand before its end.
        seconds: time of one image, measured whole; None where no limit asks for it.
        verdict: whether the search paid, in words, as far as select says.
    """

    label: str
    limits: dict[str, float]
    slack: dict[str, float]
    controls: dict[str, Candidate]
    interrupted: bool
    seconds: float | None = None
    verdict: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        controls = {name: control.plain() for name, control in self.controls.items()}
        own = {"label": self.label, "budget": self.limits, "slack": self.slack}
        made = own | super().plain() | {"controls": controls, "verdict": self.verdict, "interrupted": self.interrupted}
        return made if self.seconds is None else made | {"seconds": self.seconds}


class Front(list[Found]):
    """The winners, one for each budget in the order given, and the non-dominated subnets that the search went over.

    Attributes:
        fingerprint: of the space.
        rows: [n, d] non-dominated rows, by falling score.
        scores: [n] their predicted scores.
        costs: kind -> [n], of the kinds that some budget limits.
    """

    def __init__(
        self,
        found: Sequence[Found],
        fingerprint: str,
        rows: Indices,
        scores: NDArray[np.float64],
        costs: dict[str, NDArray[np.float64]],
    ) -> None:
        super().__init__(found)
        self.fingerprint, self.rows, self.scores, self.costs = fingerprint, rows, scores, costs


def save_front(
    path: Path | str, front: Front, *, seed: int | None = None, settings: Mapping[str, Any] | None = None
) -> None:
    """Write front.json: the winners (genes, predicted and measured accuracy, every cost) and the front behind them.

    Args:
        path: the file.
        front: what `search` returned.
        seed: of the search, for the record.
        settings: anything else for the record, e.g. numbers of images.
    """
    points = [
        {
            "indices": row.tolist(),
            "predicted": float(score),
            "costs": {kind: float(v[i]) for kind, v in front.costs.items()},
        }
        for i, (row, score) in enumerate(zip(front.rows, front.scores, strict=True))
    ]
    write_json(
        path,
        {
            "fingerprint": front.fingerprint,
            "interrupted": any(f.interrupted for f in front),
            "subnets": [f.plain() for f in front],
            "front": points,
            "settings": dict(settings or {}),
            "provenance": provenance(seed),
        },
    )


def load_front(path: Path | str, space: SearchSpace) -> Front:
    """What `save_front` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, or of another space (names both fingerprints).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no front at {path}; make one with `elastibit search run=... budget.bitops=w4a4`")
    record = read_json(path)
    if record.get("fingerprint") != space.fingerprint:
        raise ValueError(
            f"{path} is of space {record.get('fingerprint')}, this run of {space.fingerprint}; search again in this run"
        )
    points = record["front"]
    costs = {kind: np.array([p["costs"][kind] for p in points]) for kind in (points[0]["costs"] if points else ())}
    rows = np.array([p["indices"] for p in points], dtype=np.int64).reshape(-1, len(space))
    scores = np.array([p["predicted"] for p in points], dtype=float)
    return Front([_found(space, s) for s in record["subnets"]], space.fingerprint, rows, scores, costs)


def _found(space: SearchSpace, record: Mapping[str, Any]) -> Found:
    controls = {name: Candidate(**_figures(space, control)) for name, control in record["controls"].items()}
    own = {"label": record["label"], "limits": record["budget"], "slack": record["slack"]}
    return Found(
        **_figures(space, record),
        **own,
        controls=controls,
        interrupted=record["interrupted"],
        seconds=record.get("seconds"),
        verdict=record.get("verdict", ""),
    )


def _figures(space: SearchSpace, record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "config": space.config(record["indices"]),
        "predicted": (record["predicted"]["mean"], record["predicted"]["std"]),
        "measured": record["measured"],
        "costs": record["costs"],
    }
