"""The target ort-cpu: its models compute what the pieces compute, and its arithmetic on times."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from supernet.artefacts import VerificationError
from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.export.legality import Shape, trial
from supernet.export.onnx import write
from supernet.export.runtime import Parts, session
from supernet.export.targets import ort_cpu
from supernet.export.targets.ort_cpu import OVERHEAD, OrtCpu, copied, fixed, laid_out, size
from supernet.formats.integer import Integer

W, A = QuantConfig(Integer(8), PerChannel()), QuantConfig(Integer(8), PerTensor(), False)


@pytest.fixture(scope="module")
def piece() -> onnx.ModelProto:
    """An integer convolution between codes."""
    deployed, _ = trial(Shape("conv", (6, 4, 3, 3), padding=(1, 1)), W, A)
    return fixed(Parts(write(deployed)).cut(["codes"], "layer"))


def outputs(model: onnx.ModelProto, feed: dict[str, Any]) -> list[Any]:
    made = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(made.run(None, feed))


def codes(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 255, (1, 4, 8, 8)).astype(np.uint8)


def test_channels_last_is_the_same_piece_without_transposes(piece: onnx.ModelProto) -> None:
    x = codes()
    (plain,) = outputs(piece, {"codes": x})
    last = laid_out(piece, True)
    (turned,) = outputs(last, {"codes.last": x.transpose(0, 2, 3, 1)})
    assert (turned.transpose(0, 3, 1, 2) == plain).all() and len(np.unique(plain)) > 20
    kinds = [[kind for kind, _ in session(model)[1]] for model in (piece, last)]
    assert kinds[0].count("Transpose") == 2 and kinds[1] == [kind for kind in kinds[0] if kind != "Transpose"]


def test_copies_are_independent_and_have_weights_of_their_own(piece: onnx.ModelProto) -> None:
    many = copied(piece, 5)
    got = outputs(many, {f"{i}.codes": codes(i) for i in range(5)})
    assert (got[0] == outputs(piece, {"codes": codes(0)})[0]).all()
    again = outputs(many, {f"{i}.codes": codes(0) for i in range(5)})
    assert len({out.tobytes() for out in again}) == 5
    assert len(session(many)[1]) == 5 * len(session(piece)[1])


def test_the_size_is_that_of_weights_and_tensors(piece: onnx.ModelProto) -> None:
    per_channel = 6 * (4 * 9 + 4 + 1) + 6 * (4 + 4)  # weight with scale and zero-point, bias with scale
    per_tensor = 2 * (4 + 1) + 2  # scale and zero-point of input and output, bounds of the clamp
    assert size(piece) == 4 * 64 + 6 * 64 + per_channel + per_tensor


def test_times_of_pieces_are_what_is_left_of_a_fan_without_the_call(
    piece: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed form: a call takes 5, a trivial kernel 0.5; a fan of n pieces 5 + 3 n."""
    monkeypatch.setattr(OrtCpu, "_times", lambda self, runs: {"1": 5.5, "9": 9.5, "a": 5 + 3 * 7})
    found = OrtCpu(rounds=3).pieces({"a": piece}, memory=7 * size(piece) - 1)
    assert found == {"a": pytest.approx(3.0), OVERHEAD: pytest.approx(5.0)}


def test_a_round_keeps_the_fastest_and_rounds_their_median(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = {"a": iter([9, 1, 9, 9, 9, 9, 9, 2, 9, 9, 30, 40, 50, 60, 70]), "b": iter(range(100, 115))}
    monkeypatch.setattr(ort_cpu, "_timed", lambda call, clock: float(next(ticks[call()])))
    runs = {"a": lambda: "a", "b": lambda: "b"}
    assert OrtCpu(rounds=3)._times(runs) == {"a": 2.0, "b": 105.0}


def test_real_times_are_positive(piece: onnx.ModelProto) -> None:
    target = OrtCpu(rounds=3)
    found = target.pieces({"conv": piece}, memory=10_000)
    assert found["conv"] > 0 and found[OVERHEAD] >= 0
    assert target.whole({"x": piece})["x"] > 0


def test_origin_names_versions_and_processor() -> None:
    origin = OrtCpu().origin()
    assert origin["onnxruntime"] == onnxruntime.__version__ and origin["onnx"] == onnx.__version__
    assert origin["processor"] and origin["threads"] == 1


def test_what_does_not_load_says_so(piece: onnx.ModelProto) -> None:
    broken = onnx.ModelProto.FromString(piece.SerializeToString())
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(VerificationError, match="does not run the file"):
        OrtCpu().load(broken)


@pytest.mark.parametrize("options", [{"rounds": 2}, {"threads": 0}])
def test_what_makes_no_median_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="rounds"):
        OrtCpu(**options)
