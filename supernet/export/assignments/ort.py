"""onnxruntime: `TensorQuantOverrides`, what its `quantize_static` is told about single tensors.

    {"conv1.weight": [{"quant_type": "QInt4", "symmetric": true, "axis": 0}], "x": [{"quant_type": "QUInt8", ...}]}

Names are those of one ONNX model, so the map belongs to a file. It is the user's, exported by torch, or the float twin
of the subnet, which is then written beside the map. Scales are left to onnxruntime's own calibration.

| bits | weight         | input, signed or symmetric | input, else                       |
|------|----------------|----------------------------|-----------------------------------|
| 4    | QInt4          | QInt4                      | QUInt4                            |
| 8    | QInt8          | QInt8                      | QUInt8                            |
| else | error; loosely the next wider | the same    | the same                          |

A symmetric input that is never negative is QUInt8 without `symmetric`: onnxruntime then starts its range at 0, as we
do. One tensor has one type in the file, and so have those that operators like Flatten and MaxPool make of it; layers
that read it at different bits are an error, loosely the most bits win.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from supernet.config import PerChannel, QuantConfig, SubnetConfig
from supernet.elastic.supernet import SuperNet
from supernet.export.assignments.names import WAY_OUT, Names, few
from supernet.export.assignments.tensors import quantized
from supernet.export.deploy import deploy
from supernet.export.onnx import write_float

CONTAINERS = (4, 8)
LAYERS = ("Conv", "Gemm", "MatMul")
SAME = (
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "MaxPool",
    "AveragePool",
    "Slice",
    "Pad",
    "Resize",
)
"""Operators whose output onnxruntime quantizes as it does their input."""
TWIN = "float.onnx"


class Ort:
    """Overrides for onnxruntime's static quantization.

    Args:
        model: the float ONNX model that is to be quantized, or its file; None: the float twin of the subnet.
        names: name of a node or weight in the model -> layer, where the rules do not find it.
    """

    def __init__(
        self, model: onnx.ModelProto | Path | str | None = None, names: Mapping[str, str | None] | None = None
    ) -> None:
        self.model = onnx.load(model) if isinstance(model, Path | str) else model
        self.names = dict(names or {})

    def write(self, net: SuperNet, config: SubnetConfig, loose: bool = False) -> dict[str, Any]:
        """The overrides, types by name, as JSON holds them; onnxruntime wants `QuantType[name]` in their place.

        Raises:
            ValueError: bits without a type (unless `loose`), layers that are not in the model, readers of one tensor
                that disagree.
        """
        model = self.model if self.model is not None else _twin(net.materialise(config), net)
        layers = quantized(net, config, "onnxruntime")
        nodes = self._nodes(model, Names(net, self.names))
        missing = [layer.name for layer, _, _ in layers if layer.name not in nodes]
        if missing:
            raise ValueError(
                f"the model has no node for {len(missing)} layers: {few(missing)}; "
                f"export it from this network, or {WAY_OUT}"
            )
        made: dict[str, Any] = {}
        writers = {name: node for node in model.graph.node for name in node.output}
        read: dict[str, tuple[str, dict[str, Any]]] = {}
        for layer, weight, data in layers:
            node = nodes[layer.name]
            about = _override(weight, True, loose, layer.weight)
            per_channel = isinstance(weight.granularity, PerChannel)
            made[node.input[1]] = [about | ({"axis": _axis(node)} if per_channel else {})]
            quantizer = net.quantizers[f"{layer.name}.input_quantizer"]
            passed = bool(quantizer.bypass) and data.bits >= quantizer.bypass  # on the grid of a site: not symmetric
            signed = data.symmetric and not quantizer.unsigned and not passed
            chain = _chain(node.input[0], writers)
            kind = _agreed(read.get(chain[-1]), (layer.name, _override(data, signed, loose, layer.input)), loose)
            read[chain[-1]] = kind
            made |= dict.fromkeys(chain, chain[-1])
        return {name: [read[value][1]] if isinstance(value, str) else value for name, value in made.items()}

    def _nodes(self, model: onnx.ModelProto, names: Names) -> dict[str, onnx.NodeProto]:
        """The node of each layer, found by the name of its weight, else by its own."""
        weights = {tensor.name for tensor in model.graph.initializer}
        found: dict[str, onnx.NodeProto] = {}
        for node in model.graph.node:
            if node.op_type in LAYERS and node.input[1] in weights:
                layer = names.layer(node.input[1]) or names.layer(node.name)
                if layer is not None:
                    found.setdefault(layer, node)
        return found

    def beside(self, subnet: nn.Module, net: SuperNet) -> dict[str, bytes]:
        """The float twin, if it is what the map is about."""
        return {TWIN: _twin(subnet, net).SerializeToString()} if self.model is None else {}


def _twin(subnet: nn.Module, net: SuperNet) -> onnx.ModelProto:
    return write_float(deploy(subnet, net.example))


def _override(choice: QuantConfig, signed: bool, loose: bool, name: str) -> dict[str, Any]:
    wide = [bits for bits in CONTAINERS if bits >= choice.bits]
    if wide[0] != choice.bits and not loose:
        raise ValueError(
            f"onnxruntime has integers of {' and '.join(map(str, CONTAINERS))} bits, {name} has {choice.bits}; "
            "loose=true writes the next wider"
        )
    return {"quant_type": f"Q{'' if signed else 'U'}Int{wide[0]}", "symmetric": choice.symmetric and signed}


def _chain(tensor: str, writers: Mapping[str, onnx.NodeProto]) -> list[str]:
    """A tensor and those before it that onnxruntime gives the same type."""
    chain = [tensor]
    while chain[-1] in writers and writers[chain[-1]].op_type in SAME:
        chain.append(writers[chain[-1]].input[0])
    return chain


def _agreed(
    before: tuple[str, dict[str, Any]] | None, now: tuple[str, dict[str, Any]], loose: bool
) -> tuple[str, dict[str, Any]]:
    """What two layers that read one tensor say of it; loosely the wider, and rather the one with a zero-point."""
    if before is None or before[1] == now[1]:
        return now
    if not loose:
        raise ValueError(
            f"{before[0]} and {now[0]} read one tensor, as {before[1]['quant_type']} and as {now[1]['quant_type']}, "
            "but it has one type in the file; loose=true takes the wider"
        )
    return max(before, now, key=lambda said: (said[1]["quant_type"][-1], not said[1]["symmetric"]))


def _axis(node: onnx.NodeProto) -> int:
    """Where the output channels of a node's weight lie."""
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1
