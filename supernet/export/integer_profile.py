"""The profile of integer networks: written, and proved bit by bit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from jaxtyping import Float
from torch import Tensor, nn

from supernet.artefacts import write_bytes
from supernet.export.deploy import deploy
from supernet.export.graph import Deployed
from supernet.export.integer import IntegerNetwork, integer
from supernet.export.integer_onnx import real_nodes, write_integer
from supernet.export.integer_operators import Entrance
from supernet.export.onnx import write_float
from supernet.export.profile import costs, layers
from supernet.export.runtime import counts, latency, session
from supernet.export.verify import OPERATOR_IMAGES, compare, narrowest, operators, outputs
from supernet.interfaces import Batch


@dataclass(frozen=True)
class IntegerProfile:
    """An Exporter (`supernet.interfaces`) of files that compute in integers only, in the manner of HAWQ-V3.

    Three questions, three rulers. The file against the integer network in torch: every logit of every image and every
    output of every operator must be the same integer. The integer network against the deployed one, which rescales in
    float: predictions and accuracy, by the limits of `supernet.export.verify`. Against the trained subnet: reported.

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
            What `supernet.export.profile.Profile.verify` returns, and in `verification` an entry `integer`: `scale` of
            the logits, `equal_images` and `most_off` of the file against the integer network, and `trained`, the
            distance to the trained subnet's logits.
        """
        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            raise ValueError("a file is verified on batches of (images, labels), got none; give at least one batch")
        deployed, file = deploy(model, first[0]), onnx.load(path)
        network, twin = integer(deployed, self.residual_bits), write_float(deployed)
        proof = verify(file, network, deployed, itertools.chain([first], batches), model)
        proof["bytes"] = {"file": path.stat().st_size, "float": twin.ByteSize()}
        times = latency({"file": file, "float": twin}, deployed.example, self.rounds)
        speed = {"file_ms": times["file"], "float_ms": times["float"], "speedup": times["float"] / times["file"]}
        return {
            "layers": layers(deployed, (8,)),
            "costs": costs(deployed),
            "verification": proof,
            "measured": {"latency": speed | {"threads": 1, "batch": 1, "rounds": self.rounds}},
        }


def verify(
    file: onnx.ModelProto, network: IntegerNetwork, deployed: Deployed, batches: Iterable[Batch], subnet: nn.Module
) -> dict[str, Any]:
    """Compare a file with its integer network bit by bit, and both with where they come from.

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
    logits, labels, images = outputs(made, deployed, batches, subnet, {"integer": network})
    exact = _exact(logits["file"], logits.pop("integer"))
    logits["file"] = logits["file"] * network.scale
    whole = compare(logits, labels, narrowest(deployed))
    rows = operators(file, network, images[:OPERATOR_IMAGES], exact=True)
    real = real_nodes(file)
    failures = [
        *whole.pop("failures"),
        *(f"operator {r['name']}: {r['verdict']}" for r in rows if r["verdict"] != "ok"),
    ]
    if exact["equal_images"] < len(labels):
        wrong = len(labels) - exact["equal_images"]
        failures.insert(0, f"logits of {wrong} of {len(labels)} images differ, by up to {exact['most_off']:g} steps")
    entrances = sum(isinstance(op, Entrance) for op in network.operators())
    if len(real) != entrances:
        failures.append(f"real numbers in {', '.join(real)}; only the {entrances} at the entrance may have them")
    found = {"scale": network.scale, **exact, "entrance": real, "trained": _distance(logits["file"], logits["subnet"])}
    about = {"kernels": counts(kernels), "unfused": [], "operators": rows, "integer": found}
    return {"passed": not failures, "failures": failures} | whole | about


def _exact(file: Float[Tensor, "n k"], network: Float[Tensor, "n k"]) -> dict[str, Any]:
    """How many images have the same integers, and how far apart the others are."""
    off = (file - network).abs().flatten(1).amax(1)
    return {"equal_images": int((off == 0).sum()), "most_off": float(off.max())}


def _distance(file: Float[Tensor, "n k"], trained: Float[Tensor, "n k"]) -> Mapping[str, float | None]:
    """From the trained subnet's logits, in real numbers."""
    noise = float((file - trained).pow(2).sum())
    return {
        "most_off": float((file - trained).abs().max()),
        "largest": float(trained.abs().max()),
        "sqnr_db": 10 * float(torch.log10(trained.pow(2).sum() / noise)) if noise else None,
        "equal_labels": float((file.argmax(1) == trained.argmax(1)).double().mean()),
    }
