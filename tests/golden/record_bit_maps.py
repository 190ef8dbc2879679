"""Records real bit maps of other tools on one small network, for tests/golden/bit_maps.json.

Each tool lives in a virtual environment of its own, with torch; there, from the root of the repository:

    python -m tests.golden.record_bit_maps modelopt     nvidia-modelopt 0.47.0
    python -m tests.golden.record_bit_maps aimet        aimet-torch 2.42.0, once for each AIMET_ENCODING_VERSION
    python -m tests.golden.record_bit_maps mct          model-compression-toolkit 2.6.1

The last line printed is one JSON object.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IMAGES = (4, 3, 8, 8)


class Block(nn.Module):
    """Residual block; activations are modules, as AIMET asks for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + x)


class Network(nn.Module):
    """Six layers: stem, two blocks of two, fc."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.bn, self.relu = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.pool, self.flat, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flat(self.pool(self.blocks(self.relu(self.bn(self.stem(x)))))))


def network() -> Network:
    """The same each time."""
    torch.manual_seed(0)
    return Network().eval()


# -- ModelOpt ----------------------------------------------------------------------------------------------------------
OFF, W4, W8, A8 = (
    {"quantizer_name": "*", "enable": False},
    {"num_bits": 4, "axis": 0},
    {"num_bits": 8, "axis": 0},
    {"num_bits": 8, "axis": None},
)
USUAL = [OFF, {"quantizer_name": "*weight_quantizer", "cfg": W4}, {"quantizer_name": "*input_quantizer", "cfg": A8}]
CASES: dict[str, Any] = {
    "precedence": [
        *USUAL,
        {"quantizer_name": "*blocks.1*weight_quantizer", "cfg": {"num_bits": 2, "axis": 0}},
        {"quantizer_name": "*conv2.weight_quantizer", "cfg": W8},
        {"quantizer_name": "blocks.0.conv?.input_quantizer", "cfg": {"num_bits": 4}},
    ],
    "classes": [
        *USUAL,
        {"quantizer_name": "*weight_quantizer", "parent_class": "nn.Linear", "cfg": {"num_bits": 8, "axis": None}},
    ],
    "toggles": [
        USUAL[1],
        OFF,
        {"quantizer_name": "*_quantizer", "enable": True},
        {"quantizer_name": "fc.*", "enable": False},
    ],
    "unmatched": [{"quantizer_name": "*conv1.weight_quantizer", "cfg": W4}],
    "replaced": [*USUAL, {"quantizer_name": "*conv2.weight_quantizer", "cfg": {"axis": 0}}],
    "mapping": {
        "default": {"enable": False},
        "*weight_quantizer": W4,
        "*input_quantizer": A8,
        "nn.Linear": {"*weight_quantizer": {"num_bits": 8, "axis": None}},
        "*stem.weight_quantizer": W8,
    },
}


def modelopt() -> dict[str, Any]:
    """Configurations and the quantizers they give; a search; subnets of ours written, and what they give."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    import elastibit as eb

    batches = [(torch.randn(IMAGES), torch.randint(0, 5, IMAGES[:1])) for _ in range(2)]

    def on(model: nn.Module) -> dict[str, Any]:
        found = {n: m for n, m in model.named_modules() if isinstance(m, TensorQuantizer) and m.is_enabled}
        return {name: {"num_bits": m.num_bits, "axis": m.axis} for name, m in found.items()}

    def given(config: Any) -> dict[str, Any]:
        copied = json.loads(json.dumps(config))
        return {"config": config, "quantizers": on(mtq.quantize(network(), copied, lambda m: m(batches[0][0])))}

    made: dict[str, Any] = {"version": importlib.metadata.version("nvidia-modelopt")}
    made["cases"] = {name: given({"quant_cfg": entries, "algorithm": "max"}) for name, entries in CASES.items()}
    formats = [
        {"quant_cfg": [*USUAL, {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": b, "axis": 0}}]}
        for b in (2, 4, 8)
    ]
    model, state = mtq.auto_quantize(
        network(),
        constraints={"effective_bits": 5.0},
        quantization_formats=[f | {"algorithm": "max"} for f in formats],
        data_loader=batches,
        forward_step=lambda m, batch: m(batch[0]),
        loss_func=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
        num_calib_steps=2,
        num_score_steps=2,
    )
    config = mtq.get_auto_quantize_config(state, {"effective_bits": 5.0})
    recipes = state["best"]["recipe"].items()
    best = {name: recipe.config.model_dump(mode="json", exclude_unset=True) for name, recipe in recipes}
    made["auto"] = {"config": _json(config), "best": {"recipe": best}, "quantizers": on(model)}
    net = eb.SuperNet(network(), torch.randn(1, *IMAGES[1:]), first_last_bits=None, symmetries=[True])
    rows = [net.space.smallest(), net.space.largest(), net.space.uniform("w5a6")]
    made["written"] = [{"row": list(c.row)} | given(eb.export_bits(net, c, "modelopt")) for c in rows]
    return made


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda o: o.model_dump(mode="json", exclude_unset=True)))


# -- AIMET, MCT --------------------------------------------------------------------------------------------------------
def aimet() -> dict[str, Any]:
    """Encodings of a simulation with 2, 4 and 8 bits, in the version of the environment's AIMET_ENCODING_VERSION."""
    from aimet_torch import QuantizationSimModel

    version, x = os.environ.get("AIMET_ENCODING_VERSION", "1.0.0"), torch.randn(IMAGES)
    sim = QuantizationSimModel(network(), x[:1], default_param_bw=4, default_output_bw=8)
    for path, bits in {"stem": 8, "blocks.1.conv2": 2, "fc": 8}.items():
        sim.model.get_submodule(path).param_quantizers["weight"].bitwidth = bits
    for path in ("blocks.0.relu1", "blocks.0.relu2"):
        sim.model.get_submodule(path).output_quantizers[0].bitwidth = 4
    sim.compute_encodings(lambda model: model(x))
    with tempfile.TemporaryDirectory() as folder:
        if version in ("0.6.1", "1.0.0"):
            sim.export(folder, "net", dummy_input=x[:1])
        else:
            sim.onnx.export((x[:1],), f"{folder}/net.onnx", encoding_version=version, dynamo=False, opset_version=17)
        files = sorted(Path(folder).glob("*.encodings"))
        return {f"{version} {file.name}": _short(json.loads(file.read_text())) for file in files}


def _short(value: Any) -> Any:
    """Four digits of each number: nothing here looks at ranges."""
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_short(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def mct() -> dict[str, Any]:
    """Bits by node after a search for 60 % of the bytes at 8 bits, as docs/bit-maps.md says to write them down."""
    import model_compression_toolkit as toolkit
    from model_compression_toolkit.core import CoreConfig, MixedPrecisionQuantizationConfig, ResourceUtilization

    net = network()
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model, info = toolkit.ptq.pytorch_post_training_quantization(
        net,
        lambda: iter([[torch.randn(IMAGES)] for _ in range(2)]),
        target_resource_utilization=ResourceUtilization(weights_memory=0.6 * sum(m.weight.numel() for m in layers)),
        core_config=CoreConfig(mixed_precision_config=MixedPrecisionQuantizationConfig(num_of_images=4)),
    )
    nodes: dict[str, Any] = {}
    for name, module in model.named_modules():
        if hasattr(module, "weights_quantizers"):
            nodes[name] = {"weights": int(module.weights_quantizers["weight"].num_bits)}
        if hasattr(module, "activation_holder_quantizer"):
            nodes[name] = {"activations": int(module.activation_holder_quantizer.num_bits)}
    version = importlib.metadata.version("model-compression-toolkit")
    return {"version": version, "nodes": nodes, "mixed_precision_cfg": [int(i) for i in info.mixed_precision_cfg]}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        recorded = {"modelopt": modelopt, "aimet": aimet, "mct": mct}[sys.argv[1]]()
    print(json.dumps(recorded))
