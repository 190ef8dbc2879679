"""Qualcomm AIMET: encodings as its quantization simulator exports them, versions 0.6.1 to 2.1.0.

| version                   | weights                                        | activations                            |
|---------------------------|------------------------------------------------|----------------------------------------|
| 0.6.1, `_torch.encodings` | `param_encodings: {name: [{bitwidth, ..}]}`    | `{module: {input/output: {"0": {..}}}}`|
| 0.6.1                     | the same                                       | `{ONNX tensor: [{bitwidth, ..}]}`      |
| 1.0.0                     | `param_encodings: [{name, bw, enc_type, ..}]`  | `[{name: ONNX tensor, bw, ..}]`        |
| 2.0.0, 2.1.0              | `encodings: [{name, output_dtype, axis, ..}]`  | in the same list                       |

AIMET names the tensor that a module writes; which layer reads it is found in our graph. The network's own input bears
a name that nobody can guess (`t.1`): where the space offers several bits for it, say `names={"t.1": "conv1.input"}`.
Tensors in floating point, and biases, say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from supernet.config import Granularity, PerChannel, PerTensor, Stated
from supernet.export.assignments.names import Names
from supernet.export.assignments.tensors import whole

WEIGHT = ".weight"


class Aimet:
    """Encodings of AIMET."""

    def recognises(self, content: Any) -> bool:
        """Whether it has `param_encodings`, or a list `encodings`."""
        return isinstance(content, Mapping) and (
            "param_encodings" in content or isinstance(content.get("encodings"), list)
        )

    def read(self, content: Mapping[str, Any], names: Names) -> dict[str, Stated]:
        """What it says, by our dimension.

        Raises:
            ValueError: weights that fit no layer here, or encodings without bits.
        """
        weights: dict[str, Stated] = {}
        tensors: dict[str, Stated] = {}
        said: dict[str, Stated] = {}
        for name, kind, stated in _encodings(content):
            if name.endswith(WEIGHT):
                weights[name] = stated
            elif kind == "input":
                said |= {f"{layer}.input": stated for layer in [names.layer(name)] if layer in names.kinds}
            elif not name.endswith(".bias"):
                tensors[name] = stated
        found = {f"{ours}.weight": weights[theirs] for theirs, ours in names.layers(weights).items()}
        return found | names.inputs(tensors) | said


def _encodings(content: Mapping[str, Any]) -> Iterator[tuple[str, str, Stated]]:
    """Name, `tensor` or `input` (of the module of that name), and what is said; of integers only."""
    for group in ("encodings", "param_encodings", "activation_encodings"):
        listed = content.get(group, [])
        if isinstance(listed, Mapping):
            listed = [{"name": name} | _first(value) for name, value in listed.items()]
        for entry in listed:
            name = str(entry.get("name"))
            ports = [(side, entry[side]) for side in ("input", "output") if isinstance(entry.get(side), Mapping)]
            for side, kept in [(side, next(iter(inner.values()))) for side, inner in ports] or [("", entry)]:
                if _integer(kept):
                    yield name, "input" if side == "input" else "tensor", _stated(kept, name)


def _first(value: Any) -> dict[str, Any]:
    """An entry of version 0.6.1: a list with one item for each channel, or the ports of a module."""
    return dict(value) if isinstance(value, Mapping) else dict(value[0]) | {"channels": len(value)}


def _integer(entry: Mapping[str, Any]) -> bool:
    return "int" in str(entry.get("output_dtype", entry.get("dtype", "int"))).lower()


def _stated(entry: Mapping[str, Any], name: str) -> Stated:
    """Bits, granularity and symmetry of one entry of any version."""
    granularity: Granularity = PerTensor()
    if "output_dtype" in entry:
        kind = re.fullmatch(r"(u?)int(\d+)", str(entry["output_dtype"]))
        granularity = PerTensor() if entry.get("axis") is None else PerChannel()
        bits = int(kind[2]) if kind else entry["output_dtype"]
        return Stated(
            whole(bits, name), granularity, kind is not None and not kind[1] and not _any(entry.get("y_zero_point"))
        )
    if "enc_type" in entry:
        if entry["enc_type"] not in ("PER_TENSOR", "PER_CHANNEL"):
            raise ValueError(f"{name} is {entry['enc_type']} in the map; here scales are per tensor or per channel")
        granularity = PerChannel() if entry["enc_type"] == "PER_CHANNEL" else PerTensor()
        return Stated(whole(entry.get("bw"), name), granularity, bool(entry.get("is_sym")))
    granularity = PerChannel() if entry.get("channels", 1) > 1 else PerTensor()
    return Stated(whole(entry.get("bitwidth"), name), granularity, str(entry.get("is_symmetric")) == "True")


def _any(zero_point: Any) -> bool:
    return any(zero_point) if isinstance(zero_point, list) else bool(zero_point)
