"""A kind of ONNX file: which integers weights are stored in, how it is written, what it costs, and its proof."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from jaxtyping import Float
from torch import Tensor, nn

from supernet.artefacts import VerificationError, write_bytes
from supernet.export.deploy import deploy
from supernet.export.graph import Deployed
from supernet.export.lint import floating, ideal_bytes, without_metadata
from supernet.export.onnx import container, write, write_float
from supernet.export.operators import Conv, Layer
from supernet.export.operators_tokens import Product
from supernet.export.runtime import latency, session
from supernet.export.verify import verify
from supernet.interfaces import Batch


@dataclass(frozen=True)
class Profile:
    """An Exporter (`supernet.interfaces`) of QDQ files for onnxruntime.

    Args:
        name: for cards and the file's metadata.
        containers: bits of the integers that weights may be stored in, of 2, 4 and 8, 8 among them; 2 is left out where
            the installed runtime does not load the file with it.
        rounds: timed runs of the file and of its float twin, at least 20.
        tiles: for a processor that multiplies tiles of integers, see `supernet.export.kernels`.

    Raises:
        ValueError: other containers, or too few rounds.
    """

    name: str
    containers: Sequence[int] = (8,)
    rounds: int = 30
    tiles: bool = False

    def __post_init__(self) -> None:
        if 8 not in self.containers or not set(self.containers) <= {2, 4, 8}:
            raise ValueError(
                f"containers are of 2, 4 and 8 bits, 8 among them, got {list(self.containers)}; e.g. [4, 8]"
            )
        if self.rounds < 20:
            raise ValueError(f"a median needs 20 rounds or more, got rounds={self.rounds}")

    def export(self, model: nn.Module, example: Float[Tensor, "1 ..."], path: Path) -> Path:
        """Write a materialised subnet; the file appears whole or not at all.

        Raises:
            ValueError: the subnet cannot be exported; says why.
            VerificationError: the installed onnxruntime does not load the file.
        """
        write_bytes(path, self.loadable(deploy(model, example)).SerializeToString())
        return path

    def verify(self, path: Path, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """Run a written file beside the subnet that it was made of.

        Args:
            path: the file.
            model: the materialised subnet.
            batches: test images and labels.

        Returns:
            `layers`, `costs`, `verification` (see `supernet.export.verify.verify`, with `bytes` as `sizes` gives them
            and `lint`, what computes in float and why) and `measured` (`latency` of the file and of its float twin).
        """
        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            raise ValueError("a file is verified on batches of (images, labels), got none; give at least one batch")
        deployed, file = deploy(model, first[0]), onnx.load(path)
        twin = write_float(deployed)
        rows = json.loads(_metadata(file)["elastibit.layers"])
        stored = {row["name"]: row["stored_bits"] for row in rows}
        proof = verify(file, deployed, itertools.chain([first], batches), model)
        proof["bytes"] = sizes(path.stat().st_size, without_metadata(file), deployed, stored)
        proof["lint"] = floating(session(file)[1], deployed, stored)
        times = latency({"file": file, "float": twin}, deployed.example, self.rounds)
        speed = {f"{name}_ms": ms for name, ms in times.items()} | {"speedup": times["float"] / times["file"]}
        return {
            "layers": rows,
            "costs": costs(deployed),
            "verification": proof,
            "measured": {"latency": speed | {"threads": 1, "batch": 1, "rounds": self.rounds}},
        }

    def loadable(self, deployed: Deployed) -> onnx.ModelProto:
        """The model, without 2-bit integers if the installed runtime refuses them."""
        if 2 in self.containers:
            model = self._model(deployed, self.containers)
            try:
                session(model)
                return model
            except VerificationError:
                if not any(container(layer, self.containers) == 2 for layer in layers_of(deployed)):
                    raise
        return self._model(deployed, [c for c in self.containers if c != 2])

    def _model(self, deployed: Deployed, containers: Sequence[int]) -> onnx.ModelProto:
        numbers = {"layers": layers(deployed, containers), "costs": costs(deployed)}
        metadata = {f"elastibit.{name}": json.dumps(value, separators=(",", ":")) for name, value in numbers.items()}
        return write(deployed, containers, metadata | {"elastibit.profile": self.name}, self.tiles)


def layers_of(deployed: Deployed) -> list[Layer]:
    """Convolutions and linear layers in order of execution."""
    return [op for op in deployed.operators() if isinstance(op, Layer)]


def layers(deployed: Deployed, containers: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each layer and product of activations: its true bits, and how the file stores them.

    `weight` is the choice in the search space; `scales` how many the file has (a per-tensor weight behind a BatchNorm
    has one for each channel there); `embedding` what an 8-bit container multiplies the grid by.
    """
    sizes = deployed.tensors(deployed.example)
    rows: list[dict[str, Any]] = []
    for op in multiplying(deployed):
        if isinstance(op, Product):
            rows.append(_product(op, deployed, sizes[op.name].numel()))
            continue
        source = deployed.grids[op.inputs[0]]
        assert source is not None
        elements, stored = op.codes.numel(), container(op, containers)
        rows.append(
            {
                "name": op.name,
                "kind": "conv" if isinstance(op, Conv) else "linear",
                "macs": sizes[op.name].numel() * op.codes[0].numel(),
                "weight": str(op.choice),
                "weight_bits": op.choice.bits,
                "input_bits": source.bits,
                "stored_bits": stored,
                "embedding": op.factor * (op.fine if stored == 8 else 1),
                "scales": len(op.scale),
                "weights": elements,
                "nominal_bytes": math.ceil(elements * op.choice.bits / 8),
                "stored_bytes": math.ceil(elements * stored / 8),
                "constant_channels": op.constant,
            }
        )
    return rows


def costs(deployed: Deployed) -> dict[str, float]:
    """Costs of the deployed network under the names and rules of `supernet.cost`, counted once more from the graph:
    BitOps, bytes and MACs."""
    rows = layers(deployed, (8,))
    spent = [(row["macs"], row["macs"] * row["weight_bits"] * row["input_bits"]) for row in rows]
    inner = sum(product for _, product in spent[1:-1])
    edge = sum(macs * 64 for macs, _ in (spent if len(spent) < 3 else [spent[0], spent[-1]]))
    return {
        "bitops": float(sum(product for _, product in spent)),
        "bitops_first_last_8": float(inner + edge),
        "bitops_inner": float(inner),
        "bytes": float(sum(_stored(op) for op in multiplying(deployed))),
        "macs": float(sum(macs for macs, _ in spent)),
    }


def sizes(file: int, bare: int, deployed: Deployed, stored: Mapping[str, int]) -> dict[str, int]:
    """Bytes of a file beside what they could be.

    Args:
        file: bytes of the file.
        bare: the same without its metadata.
        deployed: the network that it holds.
        stored: bits of the container of each layer's weight, by name.

    Returns:
        `file`, `bare`, `ideal` (see `lint.ideal_bytes`), `nominal` (weights at their true bits, as the cost model
        counts and predicts them) and `float` (of the float twin).
    """
    ideal, nominal = ideal_bytes(layers_of(deployed), stored), sum(_stored(op) for op in multiplying(deployed))
    return {"file": file, "bare": bare, "ideal": ideal, "nominal": nominal, "float": write_float(deployed).ByteSize()}


def multiplying(deployed: Deployed) -> list[Layer | Product]:
    """Layers and products of activations in order of execution."""
    return [op for op in deployed.operators() if isinstance(op, Layer | Product)]


def _product(op: Product, deployed: Deployed, outputs: int) -> dict[str, Any]:
    """The row of a product; its right operand stands in the place of the weight, and nothing of it is stored."""
    left, right = (deployed.grids[name] for name in op.inputs)
    assert left is not None and right is not None
    bits = {"weight": str(op.choice), "weight_bits": right.bits, "input_bits": left.bits, "stored_bits": 8}
    empty = dict.fromkeys(("weights", "nominal_bytes", "stored_bytes", "constant_channels"), 0)
    return {"name": op.name, "kind": "matmul", "macs": outputs * op.depth, **bits, "embedding": 1, "scales": 1, **empty}


def _stored(op: Layer | Product) -> int:
    """Bytes of packed codes, scales (4, with a zero-point 5), int32 biases, the input's scale and zero-point (5)."""
    if isinstance(op, Product):
        return (4 if op.choice.symmetric else 5) + 5
    codes = math.ceil(op.codes.numel() * op.choice.bits / 8)
    bias = 0 if op.bias is None else 4 * len(op.bias)
    return codes + len(op.scale) * (4 if op.choice.symmetric else 5) + bias + 5


def _metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}
