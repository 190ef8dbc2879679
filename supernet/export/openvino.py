"""The int8 file converted for OpenVINO (extra `elastibit[openvino]`): model.xml and model.bin.

It computes a convolution and the sum behind it in one kernel, without the rounding between them: every operator, cut
out, is exact, but in the whole network about one code in ten is off by one behind a sum. So operators are held to the
rule of onnxruntime's, and the whole file to a wider one.
"""

from __future__ import annotations

import itertools
import re
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from supernet.artefacts import VerificationError, write_bytes
from supernet.elastic.wrap import evaluating
from supernet.export.deploy import deploy
from supernet.export.graph import Deployed
from supernet.export.onnx import write, write_float
from supernet.export.profile import costs, layers, sizes
from supernet.export.runtime import WARM_UP
from supernet.export.verify import OPERATOR_IMAGES, compare, narrowest, operators
from supernet.interfaces import Batch

SETTINGS = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
EQUAL = 0.9
ACCURACY_OFF = 0.01
COMPUTE = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")


@dataclass(frozen=True)
class OpenVINO:
    """An Exporter (`supernet.interfaces`) of OpenVINO's files, on one thread of the processor.

    Args:
        name: for cards.
        rounds: timed runs of the file and of its float twin, at least 20.

    Raises:
        ValueError: OpenVINO is not installed, or too few rounds.
    """

    name: str = "openvino"
    rounds: int = 30

    def __post_init__(self) -> None:
        _runtime()
        if self.rounds < 20:
            raise ValueError(f"a median needs 20 rounds or more, got rounds={self.rounds}")

    def export(self, model: nn.Module, example: Float[Tensor, "1 ..."], path: Path) -> Path:
        """Write a materialised subnet as `.xml` and `.bin`.

        Raises:
            ValueError: the subnet cannot be exported, or OpenVINO does not convert it; says why.
        """
        for suffix, content in converted(deploy(model, example)).items():
            write_bytes(path.with_suffix(suffix), content)
        return path.with_suffix(".xml")

    def verify(self, path: Path, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """Run a written file beside the subnet that it was made of.

        Returns:
            `layers`, `costs`, `verification` (see `supernet.export.verify.verify`; operators are those of the int8
            file, in OpenVINO, and this file must be that one, converted) and `measured` (`latency` of the file and of
            its float twin).
        """
        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            raise ValueError("a file is verified on batches of (images, labels), got none; give at least one batch")
        deployed, compiled = deploy(model, first[0]), _compiled(path)
        names = ("file", "deployed", "subnet")
        logits: dict[str, list[Tensor]] = {name: [] for name in names}
        labels = []
        for images, target in itertools.chain([first], batches):
            with evaluating(model), torch.no_grad():
                answers = (torch.from_numpy(_run(compiled, {deployed.source: images})), deployed(images), model(images))
            for name, answer in zip(names, answers, strict=True):
                logits[name].append(answer.double())
            labels.append(target)
        whole = compare({n: torch.cat(parts) for n, parts in logits.items()}, torch.cat(labels), narrowest(deployed))
        rows = operators(write(deployed), deployed, first[0][:OPERATOR_IMAGES], _engine)
        failures = [f"operator {row['name']}: {row['verdict']}" for row in rows if row["verdict"] != "ok"]
        if any(path.with_suffix(suffix).read_bytes() != content for suffix, content in converted(deployed).items()):
            failures.append("the file is not what the subnet's int8 file becomes; export it again")
        whole |= {"agreement_needed": EQUAL, "failures": [*_failures(whole), *failures]}
        stored = dict.fromkeys((row["name"] for row in rows), 8)
        weight = sum(path.with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin"))
        proof = {"passed": not whole["failures"]} | whole | _kernels(compiled)
        proof |= {"operators": rows, "bytes": sizes(weight, weight, deployed, stored)}
        times = self._latency({"file": compiled, "float": _compiled(write_float(deployed))}, deployed)
        measured = {"latency": times | {"threads": 1, "batch": 1, "rounds": self.rounds}}
        return {"layers": layers(deployed, (8,)), "costs": costs(deployed), "verification": proof, "measured": measured}

    def _latency(self, networks: Mapping[str, Any], deployed: Deployed) -> dict[str, float]:
        """Median milliseconds for one image; the networks take turns."""
        times: dict[str, list[float]] = {name: [] for name in networks}
        for turn in range(self.rounds + WARM_UP):
            for name, network in networks.items():
                start = time.perf_counter()
                _run(network, {deployed.source: deployed.example})
                if turn >= WARM_UP:
                    times[name].append(1e3 * (time.perf_counter() - start))
        medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
        return medians | {"speedup": medians["float_ms"] / medians["file_ms"]}


def converted(deployed: Deployed) -> dict[str, bytes]:
    """`.bin` and `.xml` of a deployed network; equal networks give equal bytes.

    Raises:
        ValueError: OpenVINO does not convert it.
    """
    openvino = _runtime()
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "model.onnx", Path(folder) / "model.xml"
        source.write_bytes(write(deployed).SerializeToString())
        try:
            openvino.save_model(_renamed(openvino.convert_model(source)), made, compress_to_fp16=False)
        except Exception as error:  # its errors have no class in common
            raise ValueError(f"OpenVINO does not convert the int8 file ({_short(error)})") from error
        return {suffix: made.with_suffix(suffix).read_bytes() for suffix in (".bin", ".xml")}


def _renamed(network: Any) -> Any:
    """The network with nameless nodes counted from 0: OpenVINO counts all that a process has made."""
    for count, node in enumerate(network.get_ordered_ops()):
        name = node.get_friendly_name()
        if re.fullmatch(r"[A-Z]\w*_\d+", name):
            node.set_friendly_name(f"{name.rpartition('_')[0]}_{count}")
    network.set_friendly_name("elastibit")
    return network


def _runtime() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise ValueError(
            "profile openvino needs OpenVINO, which is not installed; `pip install elastibit[openvino]`"
        ) from error
    return openvino


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _compiled(model: onnx.ModelProto | Path) -> Any:
    """A network ready to run on one thread.

    Raises:
        VerificationError: OpenVINO does not load it.
    """
    core = _runtime().Core()
    try:
        if isinstance(model, Path):
            return core.compile_model(model, "CPU", SETTINGS)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(model.SerializeToString())
            return core.compile_model(path, "CPU", SETTINGS)
    except Exception as error:
        raise VerificationError(f"OpenVINO does not run the file ({_short(error)}); a later release may") from error


def _run(compiled: Any, inputs: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """The only output of a network, as float64; inputs are cast to the types that it asks for."""
    feed = {}
    for port in compiled.inputs:
        name = next(name for name in port.get_names() if name in inputs)
        feed[port] = inputs[name].cpu().numpy().astype(port.element_type.to_dtype())
    output: NDArray[np.float64] = compiled(feed)[compiled.outputs[0]].astype(np.float64)
    return output


def _engine(part: onnx.ModelProto, inputs: Mapping[str, Tensor]) -> tuple[NDArray[np.float64], str]:
    """The engine of `supernet.export.verify.operators`."""
    compiled = _compiled(part)
    kinds = [kind for kind, _, _ in _nodes(compiled) if kind not in ("Input", "Output", "Const", "Reorder", "Reshape")]
    return _run(compiled, inputs), next(iter(kinds), "Reorder")


def _nodes(compiled: Any) -> list[tuple[str, str, str]]:
    """Kind, precision and name of each node that runs."""
    nodes = []
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, precision = (_text(info[key]) if key in info else "" for key in ("layerType", "runtimePrecision"))
        nodes.append((kind, precision, node.get_friendly_name()))
    return nodes


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def _kernels(compiled: Any) -> dict[str, Any]:
    """How often each kind runs in which precision, and what computes in float."""
    nodes = [node for node in _nodes(compiled) if node[0] not in ("Input", "Output", "Const")]
    kinds = [f"{kind} {precision}" for kind, precision, _ in nodes]
    real = [(kind, name) for kind, precision, name in nodes if kind in COMPUTE and precision.startswith("f")]
    lint = [{"node": name, "kernel": kind, "why": "OpenVINO has chosen a float kernel"} for kind, name in real]
    counted = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return {"kernels": counted, "unfused": [f"{name} ({kind})" for kind, name in real], "lint": lint}


def _failures(whole: Mapping[str, Any]) -> list[str]:
    """Labels and accuracy, by the rule of this file."""
    n, accuracy, found = whole["images"], whole["accuracy"], []
    if whole["agreement"] < EQUAL - 1 / n:
        found.append(f"equal predictions: {whole['agreement']:.2%} of {n} images, at least {EQUAL:.0%} must be")
    allowed = max(ACCURACY_OFF, 2 / n)
    if abs(accuracy["file"] - accuracy["deployed"]) > allowed + 1e-12:
        both = f"{accuracy['file']:.2%} in the file, {accuracy['deployed']:.2%} deployed"
        found.append(f"accuracy: {both}, at most {100 * allowed:.2g} points apart are allowed")
    return found
