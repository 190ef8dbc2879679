"""The target `ort-cpu`: what onnxruntime runs on this machine's processor, with which kernels, and how fast.

How time is taken. An operator of a small network takes microseconds, less than the call of a session; and it is as fast
as the caches are warm. So a piece is timed as a *fan*: independent copies in one session, with weights of their own, as
many as fill the memory of the whole network, so that the caches are as warm as there. A round runs each fan a few times
unmeasured and a few times measured and keeps the fastest; fans take turns; the median over the rounds counts. The clock
is the processor time of the calling thread where there is one thread and the system counts it finely: what other
processes do on a shared machine is left out, except for the caches that they empty.
"""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from supernet.artefacts import cpu
from supernet.export.runtime import run, session, unfused

WARM_UP, MEASURED = 8, 5
"""Runs of a session in each round: it takes several until the caches hold what they hold in steady use."""

FEWEST, MOST, SESSIONS = 4, 64, 2
OVERHEAD = ""
Run = Callable[[], object]


@dataclass(frozen=True)
class OrtCpu:
    """A Target (`supernet.interfaces`): onnxruntime's CPU provider.

    Args:
        rounds: interleaved rounds behind a time, at least 3.
        threads: of each session.

    Raises:
        ValueError: fewer.
    """

    rounds: int = 15
    threads: int = 1
    name: str = "ort-cpu"

    def __post_init__(self) -> None:
        if self.rounds < 3 or self.threads < 1:
            raise ValueError(
                f"a median needs 3 rounds or more, on one thread or more; got rounds={self.rounds}, "
                f"threads={self.threads}"
            )

    def origin(self) -> dict[str, Any]:
        """What a measurement holds for; of another origin it says nothing."""
        versions = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
        return {"target": self.name, **versions, "processor": cpu(), "threads": self.threads}

    # -- legality -----------------------------------------------------------------------------------------------------
    def load(self, model: onnx.ModelProto) -> tuple[list[tuple[str, str]], Callable[..., NDArray[np.float64]]]:
        """(kind, name) of each kernel that the model runs, and a function from its inputs, by name, to its only output.

        Raises:
            VerificationError: the model does not load; the function raises it where it does not run.
        """
        made, kernels = session(model, self.threads)
        return kernels, functools.partial(run, made)

    def integer(self, kernels: list[tuple[str, str]]) -> bool:
        """Whether kernels compute on codes alone."""
        return not unfused(kernels)

    # -- time ---------------------------------------------------------------------------------------------------------
    def pieces(self, models: Mapping[str, onnx.ModelProto], memory: int) -> dict[str, float]:
        """Seconds of each piece inside a network, by name, and under OVERHEAD those of one call of a session.

        Args:
            models: pieces of networks, batch 1.
            memory: bytes of weights and tensors of the network that they are of.
        """
        fans, copies = {}, {}
        for name, model in models.items():
            fans[name], copies[name] = self._fan(model, memory)
        trivial = {n: self._bound(_trivial(n)) for n in (1, 9)}
        times = self._times(fans | {f"{OVERHEAD}{n}": made for n, made in trivial.items()})
        one, nine = times.pop("1"), times.pop("9")
        overhead = max(one - (nine - one) / 8, 0.0)
        return {name: max(t - overhead, 0.0) / copies[name] for name, t in times.items()} | {OVERHEAD: overhead}

    def whole(self, models: Mapping[str, onnx.ModelProto]) -> dict[str, float]:
        """Seconds of whole networks, batch 1, by name: of the faster of two sessions, whose memory may lie badly."""
        runs = {(name, i): self._bound(fixed(model)) for name, model in models.items() for i in range(SESSIONS)}
        times = self._times({f"{i} {name}": call for (name, i), call in runs.items()})
        return {name: min(times[f"{i} {name}"] for i in range(SESSIONS)) for name in models}

    def _times(self, runs: Mapping[str, Run]) -> dict[str, float]:
        fastest: dict[str, list[float]] = {name: [] for name in runs}
        clock = _clock(self.threads)
        for _ in range(self.rounds):
            for name, call in runs.items():
                for _ in range(WARM_UP):
                    call()
                fastest[name].append(min(_timed(call, clock) for _ in range(MEASURED)))
        return {name: statistics.median(values) for name, values in fastest.items()}

    def _fan(self, model: onnx.ModelProto, memory: int) -> tuple[Run, int]:
        """Copies of a piece in one session, and how many.

        Integer convolutions run channels-last, and transposes at the border of a piece would be counted with it. So a
        piece is handed its codes in the order of axes in which it needs the fewest kernels.
        """
        layouts = [laid_out(fixed(model), last) for last in (True, False)]
        best = min(layouts, key=lambda made: len(session(made, self.threads)[1]))
        copies = min(MOST, max(FEWEST, -(-memory // max(size(model), 1))))
        return self._bound(copied(best, copies)), copies

    def _bound(self, model: onnx.ModelProto) -> Run:
        """A call that runs the model on inputs and outputs that stay where they are."""
        made, _ = session(model, self.threads)
        binding, random = made.io_binding(), np.random.default_rng(0)
        types = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
        for value in made.get_inputs():
            codes = random.integers(0, 255, value.shape).astype(types[value.type])
            binding.bind_ortvalue_input(value.name, onnxruntime.OrtValue.ortvalue_from_numpy(codes))
        for value in made.get_outputs():
            empty = np.zeros(value.shape, types[value.type])
            binding.bind_ortvalue_output(value.name, onnxruntime.OrtValue.ortvalue_from_numpy(empty))
        return functools.partial(made.run_with_iobinding, binding)


def _timed(call: Run, clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def _clock(threads: int) -> Callable[[], float]:
    fine = hasattr(time, "thread_time") and time.get_clock_info("thread_time").resolution < 1e-6
    return time.thread_time if threads == 1 and fine and platform.system() != "Windows" else time.perf_counter


# -- models ------------------------------------------------------------------------------------------------------------
def size(model: onnx.ModelProto) -> int:
    """Bytes of the initialisers, inputs and outputs of a model."""
    values = [*model.graph.input, *model.graph.output]
    wide = [4 if v.type.tensor_type.elem_type == TensorProto.FLOAT else 1 for v in values]
    tensors = sum(int(np.prod(_dims(v))) * w for v, w in zip(values, wide, strict=True))
    return tensors + sum(len(t.raw_data) for t in model.graph.initializer)


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    return [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]


def fixed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with inputs and outputs of batch 1."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for value in (*made.graph.input, *made.graph.output):
        kind, dims = value.type.tensor_type.elem_type, _dims(value)
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, dims))
    return made


def laid_out(model: onnx.ModelProto, last: bool) -> onnx.ModelProto:
    """The model; with `last`, images of codes go in and out channels-last, between transposes that a runtime drops."""
    if not last:
        return model
    graph, before, after = model.graph, [], []
    sides: list[list[onnx.ValueInfoProto]] = [[], []]
    for side, values in enumerate((graph.input, graph.output)):
        for value in values:
            kind, dims = value.type.tensor_type.elem_type, _dims(value)
            if len(dims) != 4 or kind != TensorProto.UINT8:
                sides[side].append(value)
                continue
            outer = f"{value.name}.last"
            if side == 0:
                before.append(helper.make_node("Transpose", [outer], [value.name], perm=[0, 3, 1, 2]))
            else:
                after.append(helper.make_node("Transpose", [value.name], [outer], perm=[0, 2, 3, 1]))
            n, c, h, w = dims
            sides[side].append(helper.make_tensor_value_info(outer, kind, [n, h, w, c]))
    return _model([*before, *graph.node, *after], sides[0], sides[1], list(graph.initializer), model)


def copied(model: onnx.ModelProto, copies: int) -> onnx.ModelProto:
    """Independent copies of a model in one. Their weights differ: a runtime keeps equal ones once."""
    nodes, initializers = [], []
    sides: list[list[onnx.ValueInfoProto]] = [[], []]
    for i in range(copies):
        for node in model.graph.node:
            made = onnx.NodeProto()
            made.CopyFrom(node)
            made.name = f"{i}.{node.name}" if node.name else ""
            for names in (made.input, made.output):
                names[:] = [f"{i}.{name}" if name else "" for name in names]
            nodes.append(made)
        for tensor in model.graph.initializer:
            own = onnx.TensorProto()
            own.CopyFrom(tensor)
            own.name = f"{i}.{tensor.name}"
            if len(tensor.dims) > 1:
                shift = 8 * i % max(len(tensor.raw_data), 1)
                own.raw_data = tensor.raw_data[shift:] + tensor.raw_data[:shift]
            initializers.append(own)
        for side, values in zip(sides, (model.graph.input, model.graph.output), strict=True):
            for value in values:
                side.append(
                    helper.make_tensor_value_info(f"{i}.{value.name}", value.type.tensor_type.elem_type, _dims(value))
                )
    return _model(nodes, sides[0], sides[1], initializers, model)


def _trivial(n: int) -> onnx.ModelProto:
    """A chain of n kernels with next to nothing to do."""
    bounds = [numpy_helper.from_array(np.array(i, np.uint8), f"low{i}") for i in range(n)]
    top = numpy_helper.from_array(np.array(200, np.uint8), "high")
    nodes = [helper.make_node("Clip", [f"x{i}", f"low{i}", "high"], [f"x{i + 1}"]) for i in range(n)]
    ends = [helper.make_tensor_value_info(name, TensorProto.UINT8, [1, 4]) for name in ("x0", f"x{n}")]
    opsets = [helper.make_opsetid("", 21)]
    graph = helper.make_graph(nodes, "trivial", ends[:1], ends[1:], [*bounds, top])
    return helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initializers: list[onnx.TensorProto],
    like: onnx.ModelProto,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "piece", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=like.opset_import, ir_version=like.ir_version)
