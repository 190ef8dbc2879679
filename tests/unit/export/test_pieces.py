"""A written network cut apart: the pieces are the network, and their keys say what they are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest

from supernet.export.onnx import write
from supernet.export.pieces import key, pieces
from supernet.export.runtime import run, session


def by_name(value: Any) -> dict[str, Any]:
    return {v.name: v for v in value}


@pytest.mark.parametrize("which", [0, 1, 3])
def test_pieces_one_after_the_other_compute_the_network(subnets: Any, resnet: Any, which: int) -> None:
    """The witness is onnxruntime on the whole file."""
    _, _, deployed = subnets[which]
    model, x = write(deployed), resnet[1][:4]
    kept: dict[str, Any] = {deployed.source: x.numpy()}
    for piece in pieces(deployed, model):
        made, _ = session(piece.model)
        feed = {
            i.name: kept[i.name].astype({"tensor(float)": "f4", "tensor(uint8)": "u1"}[i.type])
            for i in made.get_inputs()
        }
        (output,) = made.get_outputs()
        kept[output.name] = made.run(None, feed)[0]
    whole = run(session(model)[0], {deployed.source: x})
    got = kept[model.graph.output[0].name]
    assert np.abs(got - whole).max() <= 0.02 * np.abs(whole).max()
    assert (got.argmax(1) == whole.argmax(1)).all() and np.ptp(whole) > 0


def test_only_codes_with_fewer_values_have_a_clamp_of_their_own(subnets: Any) -> None:
    for _, _, deployed in subnets[:4]:
        clamped = [piece.name for piece in pieces(deployed, write(deployed)) if piece.clamp]
        assert clamped == [op.name for op in deployed.operators() if f"{op.name}.codes" in names(write(deployed))]
        for op in deployed.operators():
            if op.name in clamped:
                assert op.grid is not None and op.grid.clipped


def names(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output}


def test_equal_shapes_have_one_key_and_containers_tell_them_apart(subnets: Any) -> None:
    _, _, deployed = subnets[1]  # w4a4
    int8 = pieces(deployed, write(deployed))
    packed = pieces(deployed, write(deployed, (4, 8)))
    keys = {piece.name: piece.key for piece in int8 if not piece.clamp}
    assert keys["one.0.conv1"] == keys["one.0.conv2"] != keys["two.0.conv2"]
    assert len(Counter(keys.values())) < len(keys)
    other = {piece.name: piece.key for piece in packed if not piece.clamp}
    assert "int8[4,4,3,3]" in keys["one.0.conv1"] and "int4[4,4,3,3]" in other["one.0.conv1"]
    assert other["conv"] == keys["conv"], "the pinned layer stays in 8 bits"


def test_zero_points_of_weights_tell_a_faster_kernel_apart(subnets: Any) -> None:
    _, _, deployed = subnets[0]
    piece = next(p for p in pieces(deployed, write(deployed)) if p.name == "one.0.conv1" and not p.clamp)
    model = onnx.ModelProto.FromString(piece.model.SerializeToString())
    zero = next(t for t in model.graph.initializer if t.name == "one.0.conv1.weight.zero")
    assert not any(zero.raw_data) and "int8[4]=0" in piece.key
    zero.raw_data = bytes([0, 0, 3, 0])
    assert "int8[4]=0" not in key(model) and "int8[4]" in key(model)


def test_values_do_not_change_a_key_but_shapes_written_as_values_do(subnets: Any) -> None:
    _, _, deployed = subnets[0]
    found = {piece.name: piece for piece in pieces(deployed, write(deployed)) if not piece.clamp}
    model = onnx.ModelProto.FromString(found["one.0.conv1"].model.SerializeToString())
    before = key(model)
    for tensor in model.graph.initializer:
        tensor.raw_data = bytes([1 if len(tensor.dims) > 1 else 0]) * len(tensor.raw_data)
    assert key(model) == before
    pad = next(p for p in found.values() if "Pad(" in p.key)
    changed = onnx.ModelProto.FromString(pad.model.SerializeToString())
    widths = next(t for t in changed.graph.initializer if t.data_type == onnx.TensorProto.INT64)
    widths.raw_data = np.roll(np.frombuffer(widths.raw_data, np.int64), 1).tobytes()
    assert key(changed) != pad.key
