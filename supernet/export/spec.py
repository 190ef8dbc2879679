"""The interchange file: every tensor in the smallest type that the ONNX standard has for it, for runtimes to come.

onnxruntime's processor kernels run few of these types; the file is proved with the reference evaluator of the onnx
package, which runs all of them, image by image, slowly.

| bits | weights                             | activations              |
|------|-------------------------------------|--------------------------|
| 2    | INT2 (opset 25)                     | UINT2 or INT2 (opset 25) |
| 3, 4 | INT4 (opset 21), FP4 E2M1 (opset 23)| UINT4 or INT4 (opset 21) |
| 5..8 | INT8                                | UINT8                    |

Weights on a grid that is not of consecutive integers take the first of INT2, INT4, FP4, INT8 that holds all its levels.
FP8 is not among them: grids that only FP8 holds do not fit an int8, and such a subnet has no deployed form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from supernet.artefacts import write_bytes
from supernet.elastic.wrap import evaluating
from supernet.export.deploy import deploy
from supernet.export.graph import SHIFT, Deployed, Grid, Op
from supernet.export.lint import without_metadata
from supernet.export.onnx import Writer
from supernet.export.operators import Layer
from supernet.export.profile import costs, layers, layers_of, sizes
from supernet.export.verify import compare, narrowest, operators
from supernet.formats.integer import Integer
from supernet.interfaces import Batch

Array = NDArray[Any]
CODES_DIRECTLY = ("Flatten", "Reshape")
"""What moves values and is defined for every type; the others take the narrow types through real numbers."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of the ONNX standard: bits, the first opset whose DequantizeLinear takes it, and how numpy spells it."""

    bits: int
    opset: int
    dtype: Any

    def holds(self, values: Array) -> bool:
        """Whether each of the values is one of the type's."""
        every = np.arange(1 << self.bits, dtype=np.uint8).view(self.dtype)
        return bool(np.isin(values, every.astype(np.float64)).all())


INT2, INT4, INT8 = Kind(2, 25, ml_dtypes.int2), Kind(4, 21, ml_dtypes.int4), Kind(8, 21, np.int8)
UINT2, UINT4, UINT8 = Kind(2, 25, ml_dtypes.uint2), Kind(4, 21, ml_dtypes.uint4), Kind(8, 21, np.uint8)
FP4 = Kind(4, 23, ml_dtypes.float4_e2m1fn)
WEIGHTS = (INT2, INT4, FP4, INT8)


def weight_kind(layer: Layer) -> tuple[Kind, int]:
    """The smallest type that holds every level of a layer's grid, and what its integer codes are divided by for it."""
    if isinstance(layer.choice.format, Integer):
        return next(kind for kind in (INT2, INT4, INT8) if kind.bits >= layer.width), 1
    levels = np.array(layer.choice.format.levels(layer.choice.symmetric)) * layer.factor
    tries = ((kind, factor) for kind in WEIGHTS for factor in (1, layer.factor))
    return next((kind, factor) for kind, factor in tries if kind.holds(levels / factor))


def site_kind(grid: Grid) -> tuple[Kind, int]:
    """The smallest type for the codes of a tensor, and what is taken off them for it (they are kept as unsigned)."""
    bits = next(b for b in (2, 4, 8) if b >= grid.bits)
    if grid.high < 1 << bits:
        return {2: UINT2, 4: UINT4, 8: UINT8}[bits], 0
    return {2: INT2, 4: INT4}[bits], SHIFT


class _SpecWriter(Writer):
    """Writes the same nodes with other types; where a grid is narrower than its type, its real values are clipped."""

    def __init__(self, deployed: Deployed) -> None:
        super().__init__(deployed, (8,))

    def typed(self, name: str, value: Array, kind: Kind) -> str:
        """Add an initialiser of a type; returns its name."""
        self.opset = max(self.opset, kind.opset)
        self.initializers[name] = numpy_helper.from_array(np.asarray(value).astype(kind.dtype), name)
        return name

    def grid(self, name: str, grid: Grid) -> tuple[str, str]:
        kind, shift = site_kind(grid)
        scale = self.constant(f"{name}.scale", grid.scale, np.float32)
        return scale, self.typed(f"{name}.zero", np.array(grid.zero - shift), kind)

    def quantize(self, op: Op, value: str) -> None:
        """QuantizeLinear; before it a Clip of the real values, which rounds to the same codes as one of the codes."""
        assert op.grid is not None
        grid, (kind, shift) = op.grid, site_kind(op.grid)
        least, most = (0, 2**kind.bits - 1) if shift == 0 else (-(2 ** (kind.bits - 1)), 2 ** (kind.bits - 1) - 1)
        if (grid.low - shift, grid.high - shift) != (least, most):
            ends = [
                self.constant(f"{op.name}.{what}", np.float32(code - grid.zero) * np.float32(grid.scale), np.float32)
                for what, code in (("low", grid.low), ("high", grid.high))
            ]
            value = self.node("Clip", [value, *ends], f"{op.name}.clipped")
        self.node("QuantizeLinear", [value, *self.grid(op.name, grid)], op.name)

    def spare(self, op: Layer) -> int:
        """None: other runtimes have kernels of their own."""
        return 0

    def weight(self, op: Layer) -> str:
        kind, factor = weight_kind(op)
        name, scale, axis = f"{op.name}.weight", op.scale.cpu().numpy() * np.float32(factor), {}
        shape: tuple[int, ...] = ()
        if len(scale) > 1:
            shape, axis = (-1,), {"axis": 0}
        parts = [
            self.typed(name, op.codes.cpu().numpy() / factor, kind),
            self.constant(f"{name}.scale", scale.reshape(shape), np.float32),
            self.typed(f"{name}.zero", op.zero.cpu().numpy().reshape(shape) / factor, kind),
        ]
        return self.node("DequantizeLinear", parts, f"{name}.value", **axis)

    def move(self, op: Op, kind: str, more: Sequence[str] = (), **attributes: Any) -> None:
        narrow = op.grid is not None and site_kind(op.grid)[0] is not UINT8
        if narrow and kind not in CODES_DIRECTLY:
            value = self.node(kind, [self.read(op.inputs[0]), *more], f"{op.name}.moved", **attributes)
            assert op.grid is not None
            self.node("QuantizeLinear", [value, *self.grid(op.name, op.grid)], op.name)
        else:
            super().move(op, kind, more, **attributes)

    def nought(self, op: Op) -> tuple[int | float, Any]:
        grid = self.deployed.grids[op.inputs[0]]
        return (0.0, np.float32) if grid is not None and site_kind(grid)[0] is not UINT8 else super().nought(op)


@dataclass(frozen=True)
class Spec:
    """An Exporter (`supernet.interfaces`) of files in the standard's own small types.

    Args:
        name: for cards and the file's metadata.
        images: test images that the evaluator runs, at most; it takes 0.2 s for one of 64 pixels in a ResNet-18.

    Raises:
        ValueError: no images.
    """

    name: str = "spec"
    images: int = 32

    def __post_init__(self) -> None:
        if self.images < 2:
            raise ValueError(f"a file is proved on 2 images or more, got images={self.images}")

    def export(self, model: nn.Module, example: Float[Tensor, "1 ..."], path: Path) -> Path:
        """Write a materialised subnet; the file appears whole or not at all.

        Raises:
            ValueError: the subnet cannot be exported; says why.
        """
        write_bytes(path, write_spec(deploy(model, example), self.name).SerializeToString())
        return path

    def verify(self, path: Path, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """Run a written file in the reference evaluator, on the first images, beside the subnet that it was made of.

        Returns:
            `layers`, `costs`, `verification` (see `supernet.export.verify.verify`; no kernels) and `measured` (nothing:
            the evaluator's time says nothing of any runtime).
        """
        images, labels = _first(batches, self.images)
        deployed, file = deploy(model, images), onnx.load(path)
        logits = {"file": torch.from_numpy(_evaluate(file, {deployed.source: images.cpu().numpy()}))}
        with evaluating(model), torch.no_grad():
            logits |= {"deployed": deployed(images).double(), "subnet": model(images).double()}
        whole = compare(logits, labels, narrowest(deployed))
        rows = operators(file, deployed, images, _Engine(deployed))
        bad = [f"operator {row['name']}: {row['verdict']}" for row in rows if row["verdict"] != "ok"]
        failures = [*whole.pop("failures"), *bad]
        proof = {"passed": not failures, "failures": failures} | whole | {"kernels": {}, "unfused": []}
        written = rows_of(deployed)
        stored = {row["name"]: row["stored_bits"] for row in written}
        size = sizes(path.stat().st_size, without_metadata(file), deployed, stored)
        proof |= {"operators": rows, "bytes": size}
        return {"layers": written, "costs": costs(deployed), "verification": proof, "measured": {}}


def write_spec(deployed: Deployed, name: str = "spec") -> onnx.ModelProto:
    """The model of a deployed network in the standard's smallest types."""
    numbers = {"layers": rows_of(deployed), "costs": costs(deployed)}
    metadata = {f"elastibit.{key}": json.dumps(value, separators=(",", ":")) for key, value in numbers.items()}
    return _SpecWriter(deployed).model(metadata | {"elastibit.profile": name})


def rows_of(deployed: Deployed) -> list[dict[str, Any]]:
    """`profile.layers` with the type that this file stores each weight in."""
    kinds = {op.name: weight_kind(op) for op in layers_of(deployed)}
    rows = []
    for row in layers(deployed, (8,)):
        if row["name"] not in kinds:  # a product of activations stores nothing
            rows.append(row)
            continue
        kind, factor = kinds[row["name"]]
        embedding = next(op.factor for op in layers_of(deployed) if op.name == row["name"]) // factor
        more = {"stored_bits": kind.bits, "stored_type": np.dtype(kind.dtype).name, "embedding": embedding}
        rows.append(row | more | {"stored_bytes": -(-row["weights"] * kind.bits // 8)})
    return rows


class _Engine:
    """The reference evaluator on parts of a file, speaking the codes of the deployed network."""

    def __init__(self, deployed: Deployed) -> None:
        self.grids = deployed.grids

    def __call__(self, part: onnx.ModelProto, inputs: Mapping[str, Tensor]) -> tuple[NDArray[np.float64], str]:
        feed = {}
        for name, value in inputs.items():
            grid = self.grids[name]
            kind, shift = (None, 0) if grid is None else site_kind(grid)
            feed[name] = (value.cpu().numpy() - shift).astype(np.float32 if kind is None else kind.dtype)
        output = _evaluate(part, feed)
        grid = self.grids[part.graph.output[0].name]
        kinds = [node.op_type for node in part.graph.node if node.op_type not in ("DequantizeLinear", "Clip")]
        return output + (0 if grid is None else site_kind(grid)[1]), kinds[0]


def _evaluate(model: onnx.ModelProto, feed: Mapping[str, Array]) -> NDArray[np.float64]:
    """The only output of a model."""
    outputs: Any = ReferenceEvaluator(model).run(None, dict(feed))
    return np.asarray(outputs[0]).astype(np.float64)


def _first(batches: Iterable[Batch], n: int) -> tuple[Tensor, Tensor]:
    """The first `n` images and labels."""
    images, labels, count = [], [], 0
    for inputs, target in batches:
        images.append(inputs[: n - count])
        labels.append(target[: n - count])
        count += len(images[-1])
        if count >= n:
            break
    if not images:
        raise ValueError("a file is verified on batches of (images, labels), got none; give at least one batch")
    return torch.cat(images), torch.cat(labels)
