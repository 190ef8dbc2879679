"""onnxruntime: sessions whose results can be compared, the kernels that really run, and time."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from torch import Tensor

from supernet.artefacts import VerificationError

INTEGER = (
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "QLinearAdd",
    "QLinearMul",
    "QLinearConcat",
    "QLinearGlobalAveragePool",
    "QLinearAveragePool",
)
"""Kernels that compute on codes."""

NEUTRAL = (
    *("QuantizeLinear", "DequantizeLinear", "Clip", "Identity", "Cast"),
    *(
        "Transpose",
        "Split",
        "ReorderInput",
        "ReorderOutput",
        "MaxPool",
        "NhwcMaxPool",
        "Slice",
        "Pad",
        "Flatten",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
    ),
)
"""Kernels that move or convert numbers."""

WARM_UP = 3


LEVEL = "session.qdq_matmulnbits_accuracy_level"
WIDE = "session.x64quantprecision"
"""Products of uint8 and int8 that do not saturate on processors without VNNI: int8 weights become uint8 on loading."""
REQUANTIZING = "MatMulNBits"
"""The kernel whose input onnxruntime quantizes once more by default, unasked; at accuracy level 0 it does not."""


def session(
    model: onnx.ModelProto, threads: int = 1, exact: bool = True
) -> tuple[onnxruntime.InferenceSession, list[tuple[str, str]]]:
    """A CPU session with every optimisation, and the (kind, name) of each node that it runs.

    Args:
        model: the file.
        threads: of the session.
        exact: products with packed weights at accuracy level 0, and sums of bytes that do not saturate on processors
            without VNNI; False: as onnxruntime has it by default (level 4, sums of two products in an int16 there).

    Raises:
        VerificationError: onnxruntime does not load the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 4
    if exact:
        options.add_session_config_entry(LEVEL, "0")
        options.add_session_config_entry(WIDE, "1")
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        with _refusals():
            made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath)
    return made, [(node.op_type, node.name) for node in optimized.graph.node]


def run(made: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """The only output of a session, as float64; inputs are cast to the types that it asks for.

    Raises:
        VerificationError: onnxruntime does not run the model.
    """
    types = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int32)": np.int32}
    feed = {i.name: inputs[i.name].cpu().numpy().astype(types[i.type]) for i in made.get_inputs()}
    with _refusals():
        output: NDArray[np.float64] = made.run(None, feed)[0].astype(np.float64)
    return output


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns onnxruntime's errors, which have no class in common, into ours."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise VerificationError(
            f"onnxruntime {onnxruntime.__version__} does not run the file ({reason}); a later release may"
        ) from error


def counts(kernels: Iterable[tuple[str, str]]) -> dict[str, int]:
    """How often each kind of kernel runs."""
    kinds = [kind for kind, _ in kernels]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def requantizes(kernels: Iterable[tuple[str, str]]) -> bool:
    """Whether a default session computes something else than one at accuracy level 0."""
    return any(kind == REQUANTIZING for kind, _ in kernels)


def unfused(kernels: Iterable[tuple[str, str]]) -> list[str]:
    """Names of nodes that compute in float."""
    return [f"{name} ({kind})" for kind, name in kernels if kind not in INTEGER and kind not in NEUTRAL]


def latency(models: Mapping[str, onnx.ModelProto], example: Tensor, rounds: int = 30) -> dict[str, float]:
    """Median milliseconds for one input by model, one thread; `<name>_default` too where accuracy levels matter.

    The models take turns within each round, so that whatever else the machine does meets all of them alike.
    """
    sessions = {}
    for name, model in models.items():
        sessions[name], kernels = session(model)
        if requantizes(kernels):
            sessions[f"{name}_default"] = session(model, exact=False)[0]
    feed = example[:1].cpu().numpy().astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(rounds + WARM_UP):
        for name, made in sessions.items():
            start = time.perf_counter()
            made.run(None, {made.get_inputs()[0].name: feed})
            if turn >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


class Parts:
    """A written model that can be cut between its tensors.

    Args:
        model: a file of `supernet.export.onnx`.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        graph = onnx.shape_inference.infer_shapes(model).graph
        self._known = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}

    def cut(self, inputs: Sequence[str], output: str) -> onnx.ModelProto:
        """The part that computes the tensor `output` from the tensors `inputs`, as a model of its own."""
        nodes: list[onnx.NodeProto] = []
        used: dict[str, onnx.TensorProto] = {}
        seen = set(inputs)

        def collect(name: str) -> None:
            if name in seen:
                return
            seen.add(name)
            if name in self._constants:
                used[name] = self._constants[name]
                return
            for source in self._makers[name].input:
                collect(source)
            nodes.append(self._makers[name])

        collect(output)
        graph = onnx.helper.make_graph(
            nodes, output, [self._known[n] for n in inputs], [self._known[output]], list(used.values())
        )
        return onnx.helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
