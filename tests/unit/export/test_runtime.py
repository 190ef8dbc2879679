"""Sessions, kernels, parts of a file, and time."""

import numpy as np
import pytest
import torch

from supernet.artefacts import VerificationError
from supernet.export.onnx import write, write_float
from supernet.export.runtime import Parts, counts, latency, run, session, unfused


@pytest.fixture
def net(subnets):
    return subnets[1][2]


class TestParts:
    def test_a_part_computes_what_the_whole_does(self, resnet, net):
        _, x = resnet
        kept = net.tensors(x)
        parts = Parts(write(net))
        middle = parts.cut([net.source], "add")
        assert np.array_equal(run(session(middle)[0], {net.source: x}), kept["add"].double().numpy())
        rest = parts.cut(["add"], net.result)
        assert np.array_equal(run(session(rest)[0], {"add": kept["add"]}), kept[net.result].double().numpy())

    def test_a_part_holds_nothing_else(self, net):
        part = Parts(write(net)).cut(["conv"], "one.0.conv1.input_quantizer")
        assert [node.op_type for node in part.graph.node] == ["DequantizeLinear", "QuantizeLinear", "Clip"]
        assert [i.name for i in part.graph.input] == ["conv"]
        assert len(part.graph.initializer) == 6


class TestKernels:
    def test_counts(self):
        assert counts([("Conv", "a"), ("Add", "b"), ("Conv", "c")]) == {"Add": 1, "Conv": 2}

    def test_what_computes_in_float_is_listed(self, net):
        _, kernels = session(write_float(net))
        left = unfused(kernels)
        assert any(name.startswith("linear ") for name in left) and any("Conv" in name for name in left)
        assert unfused([("QLinearConv", "a"), ("Clip", "b"), ("NhwcMaxPool", "c")]) == []


class TestRefusals:
    def test_what_does_not_load(self, net):
        model = write(net)
        del model.graph.initializer[0]
        with pytest.raises(VerificationError, match=r"onnxruntime [\d.]+ does not run the file"):
            session(model)

    def test_what_does_not_run(self, net):
        made, _ = session(write(net))
        with pytest.raises(VerificationError, match="does not run the file"):
            run(made, {net.source: torch.zeros(1, 3, 9, 8, 1)})


def test_both_files_are_timed_in_the_same_rounds(net):
    times = latency({"a": write(net), "b": write_float(net)}, torch.zeros(1, 3, 8, 8), rounds=5)
    assert set(times) == {"a", "b"} and all(0 < value < 1000 for value in times.values())
