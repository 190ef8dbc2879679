"""The profile of integer networks: written, and proved bit by bit."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from supernet.artefacts import write_bytes
from supernet.export.deploy import deploy
from supernet.export.graph import Deployed
from supernet.export.integer import IntegerNetwork, integer
from supernet.export.integer_onnx import real_nodes, write_integer
from supernet.export.integer_operators import Entrance
from supernet.export.lint import without_metadata
from supernet.export.onnx import write_float
from supernet.export.profile import costs, layers, sizes
from supernet.export.runtime import counts, latency, session
from supernet.export.verify import OPERATOR_IMAGES, compare, narrowest, operators, outputs
from supernet.interfaces import Batch

FARTHER = 2.0
"""How much more noise power than the deployed network's, against the trained subnet."""

NEGLIGIBLE = 3e-3
"""Noise of this share of the signal's power, 25 dB below it, is none: in a small network 16-bit sums make that much, by
one step of the last codes."""


@dataclass(frozen=True)
class IntegerProfile:
    """An Exporter (`supernet.interfaces`) of files that compute in integers only, in the manner of HAWQ-V3.

    Two questions, two rulers. The file against the integer network in torch: every logit of every image and every
    output of every operator must be the same integer. The integer network against the deployed one, which rescales in
    float: no farther from the trained subnet, and no less accurate (`moved`).

    Args:
        name: for cards and the file's metadata.
        residual_bits: of the grid on which the two sides of a sum meet, 4..16.
        rounds: timed runs of the file and of its float twin, at least 20.

    Raises:
        ValueError: too few rounds.
    """

    name: str = "integer"
    residual_bits: int = 16
    rounds: int = 30

    def __post_init__(self) -> None:
        if self.rounds < 20:
            raise ValueError(f"a median needs 20 rounds or more, got rounds={self.rounds}")

    def export(self, model: nn.Module, example: Float[Tensor, "1 ..."], path: Path) -> Path:
        """Write a materialised subnet; the file appears whole or not at all.

        Raises:
            ValueError: the subnet cannot be exported, or has operators without an integer form; names them.
        """
        deployed = deploy(model, example)
        network = integer(deployed, self.residual_bits)
        numbers = {"layers": layers(deployed, (8,)), "costs": costs(deployed)}
        metadata = {f"elastibit.{name}": json.dumps(value, separators=(",", ":")) for name, value in numbers.items()}
        file = write_integer(network, metadata | {"elastibit.profile": self.name})
        write_bytes(path, file.SerializeToString())
        return path

    def verify(self, path: Path, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """Run a written file beside the subnet that it was made of.

        Args:
            path: the file.
            model: the materialised subnet.
            batches: test images and labels.

        Returns:
            What `supernet.export.profile.Profile.verify` returns, where the reference that the file agrees with is the
            integer network; and in `verification` an entry `integer`: `scale` of the logits, the nodes at the
            `entrance`, `equal_images` and `most_off` of the file against the integer network, and the `distance` of
            its logits to those of the deployed network and the trained subnet (`apart`), beside that of these two.
        """
        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            raise ValueError("a file is verified on batches of (images, labels), got none; give at least one batch")
        deployed, file = deploy(model, first[0]), onnx.load(path)
        network, twin, rows = integer(deployed, self.residual_bits), write_float(deployed), layers(deployed, (8,))
        proof = verify(file, network, deployed, itertools.chain([first], batches), model)
        stored = {row["name"]: int(row["stored_bits"]) for row in rows if row["weights"]}
        proof["bytes"] = sizes(path.stat().st_size, without_metadata(file), deployed, stored)
        times = latency({"file": file, "float": twin}, deployed.example, self.rounds)
        speed = {"file_ms": times["file"], "float_ms": times["float"], "speedup": times["float"] / times["file"]}
        return {
            "layers": rows,
            "costs": costs(deployed),
            "verification": proof,
            "measured": {"latency": speed | {"threads": 1, "batch": 1, "rounds": self.rounds}},
        }


def verify(
    file: onnx.ModelProto, network: IntegerNetwork, deployed: Deployed, batches: Iterable[Batch], subnet: nn.Module
) -> dict[str, Any]:
    """Compare a file with its integer network bit by bit, and the network with where it comes from.

    Args:
        file: as loaded.
        network: what the file must compute.
        deployed: what the integer network was made of.
        batches: images and labels; the first images also feed the operators.
        subnet: the trained module.

    Returns:
        See `IntegerProfile.verify` and `supernet.export.verify.verify`.
    """
    made, kernels = session(file)
    logits, labels, images = outputs({"file": made}, deployed, batches, subnet, {"integer": network})
    exact = _exact(logits["file"], logits["integer"])
    logits |= {name: logits[name] * network.scale for name in ("file", "integer")}
    reference = {"file": logits["file"], "deployed": logits["integer"], "subnet": logits["subnet"]}
    whole = compare(reference, labels, narrowest(deployed)) | {"agreement_needed": 1.0}
    whole["accuracy"] |= {"integer": whole["accuracy"]["deployed"], "deployed": _accuracy(logits["deployed"], labels)}
    rows = operators(file, network, images[:OPERATOR_IMAGES], exact=True)
    distance = {name: apart(logits["integer"], logits[name]) for name in ("deployed", "subnet")}
    distance["deployed_subnet"] = apart(logits["deployed"], logits["subnet"])
    real, entrances = real_nodes(file), sum(isinstance(op, Entrance) for op in network.operators())
    failures = [
        *whole.pop("failures"),
        *_inexact(exact, len(labels)),
        *(f"operator {row['name']}: {row['verdict']}" for row in rows if row["verdict"] != "ok"),
        *moved(logits, labels),
    ]
    if len(real) != entrances:
        failures.append(f"real numbers in {', '.join(real)}; only the {entrances} at the entrance may have them")
    found = {"scale": network.scale, "entrance": real, **exact, "distance": distance}
    about = {"kernels": counts(kernels), "unfused": [], "operators": rows, "integer": found}
    return {"passed": not failures, "failures": failures} | whole | about


def _exact(file: Float[Tensor, "n k"], network: Float[Tensor, "n k"]) -> dict[str, Any]:
    """How many images have the same integers, and how far apart the others are."""
    off = (file - network).abs().flatten(1).amax(1)
    return {"equal_images": int((off == 0).sum()), "most_off": float(off.max())}


def _inexact(exact: Mapping[str, Any], images: int) -> list[str]:
    wrong = images - exact["equal_images"]
    return [f"logits of {wrong} of {images} images differ, by up to {exact['most_off']:g} steps"] if wrong else []


def moved(logits: Mapping[str, Float[Tensor, "n k"]], labels: Int[Tensor, " n"]) -> list[str]:
    """Whether the integer network is worse than the deployed one; a line for each ruler that says so.

    (a) Its squared distance to the trained subnet's logits may be twice the deployed network's, plus 0.3 % of theirs.
    (b) It may lose as many images as it wins, plus three standard deviations (of lost + won coins) and one.

    Equal predictions cannot be asked for: a code that is rounded the other way is carried on, and the deployed network
    itself, which agrees with the trained one no better, is another such rounding.
    """
    failures = []
    signal = float(logits["subnet"].pow(2).sum())
    noise = {name: float((logits[name] - logits["subnet"]).pow(2).sum()) for name in ("integer", "deployed")}
    if noise["integer"] > FARTHER * noise["deployed"] + NEGLIGIBLE * signal:
        share = {name: f"{100 * math.sqrt(n / max(signal, 1e-30)):.3g} %" for name, n in noise.items()}
        failures.append(
            f"logits: {share['integer']} off the trained subnet's in integers, {share['deployed']} with real factors; "
            "sums need residual_bits=16, or the layers more bits"
        )
    right = {name: logits[name].argmax(1) == labels for name in ("integer", "deployed")}
    lost = int((right["deployed"] & ~right["integer"]).sum())
    won = int((right["integer"] & ~right["deployed"]).sum())
    if lost - won > 3 * math.sqrt(lost + won) + 1:
        failures.append(
            f"accuracy: {lost} of {len(labels)} images are lost to integers and {won} won, no chance effect"
        )
    return failures


def apart(ours: Float[Tensor, "n k"], other: Float[Tensor, "n k"]) -> dict[str, float | None]:
    """Distance of logits: largest difference, SQNR in dB (None: equal), share of equal labels."""
    noise = float((ours - other).pow(2).sum())
    return {
        "most_off": float((ours - other).abs().max()),
        "sqnr_db": 10 * float(torch.log10(other.pow(2).sum() / noise)) if noise else None,
        "equal_labels": float((ours.argmax(1) == other.argmax(1)).double().mean()),
    }


def _accuracy(logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> float:
    return float((logits.argmax(1) == labels).double().mean())
