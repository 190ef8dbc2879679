"""A second runtime: what it converts, what it computes, and what is said where it is missing."""

import sys

import pytest
import torch

from supernet.config import build
from supernet.export.bundle import export
from supernet.export.openvino import OpenVINO


def batches(x):
    return [(part, torch.arange(len(part)) % 5) for part in x.split(16)]


def test_without_the_package_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"not installed; `pip install elastibit\[openvino\]`") as said:
        OpenVINO()
    assert "\n" not in str(said.value)
    with pytest.raises(ValueError, match="elastibit"):
        build({"_target_": "supernet.export.openvino.OpenVINO"})


class TestOpenVINO:
    @pytest.fixture(autouse=True)
    def runtime(self):
        pytest.importorskip("openvino", reason="needs the extra elastibit[openvino]")

    @pytest.mark.parametrize("index", [0, 2, 4])  # an untrained network's margins are thin; these have wide enough ones
    def test_files_are_proved(self, resnet, subnets, tmp_path, index):
        _, x = resnet
        card = export(subnets[index][1], x[:1], tmp_path, "openvino", batches(x))
        assert {p.name for p in tmp_path.iterdir()} == {"card.json", "card.md", "model.bin", "model.xml"}
        proof = card["verification"]
        assert proof["passed"] and {row["most_off"] for row in proof["operators"] if row["kind"] == "Conv"} <= {
            0.0,
            1.0,
        }
        assert proof["kernels"]["Convolution u8"] == 7 and proof["lint"] == []
        assert card["file"]["bytes"] + card["beside"][0]["bytes"] == proof["bytes"]["file"]
        assert card["measured"]["latency"]["file_ms"] > 0

    def test_another_network_is_found(self, resnet, subnets, tmp_path):
        _, x = resnet
        path = OpenVINO().export(subnets[0][1], x[:1], tmp_path / "model.onnx")
        proof = OpenVINO().verify(path, subnets[2][1], batches(x))["verification"]
        assert not proof["passed"] and "equal predictions" in proof["failures"][0]

    def test_bad_settings(self):
        with pytest.raises(ValueError, match="rounds=3"):
            OpenVINO(rounds=3)
