"""Laws of every export profile of conf/profile."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from supernet.config import build
from supernet.elastic.supernet import SuperNet

CONF = Path(__file__).parents[2] / "conf" / "profile"
PROFILES = sorted(path for path in CONF.glob("*.yaml") if path.stem != "all")  # which only names others


@pytest.fixture(params=PROFILES, ids=lambda path: path.stem)
def exporter(request):
    if request.param.stem == "openvino":
        pytest.importorskip("openvino", reason="needs the extra elastibit[openvino]")
    return build(OmegaConf.load(request.param))


@pytest.fixture(scope="module")
def subnet():
    """A trained module of mixed bits, and images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )
    x = torch.randn(24, 3, 6, 6)
    net = SuperNet(model.eval(), x[:1]).eval()
    net.calibrate([x])
    return net.materialise(net.space.uniform("w3a5")).eval(), x


def batches(x):
    return [(x[:16], torch.arange(16) % 3), (x[16:], torch.arange(8) % 3)]


class TestExporter:
    def test_its_file_is_proved(self, exporter, subnet, tmp_path):
        model, x = subnet
        path = exporter.export(model, x[:1], tmp_path / "file.onnx")
        assert path in tmp_path.iterdir() and {p.stem for p in tmp_path.iterdir()} == {"file"}
        figures = exporter.verify(path, model, iter(batches(x)))
        assert figures["verification"]["passed"], figures["verification"]["failures"]
        assert {"layers", "costs", "measured"} <= figures.keys()
        assert figures["verification"]["images"] == 24

    def test_the_same_subnet_gives_the_same_bytes(self, exporter, subnet, tmp_path):
        model, x = subnet
        first, second = (exporter.export(model, x[:1], tmp_path / f"{name}.onnx").read_bytes() for name in "ab")
        assert first == second

    def test_it_tells_another_subnet_apart(self, exporter, subnet, tmp_path):
        model, x = subnet
        path = exporter.export(model, x[:1], tmp_path / "file.onnx")
        weight = model.get_submodule("5").weight
        before = weight.data.clone()
        weight.data = weight.data.flip(0)
        try:
            assert not exporter.verify(path, model, batches(x))["verification"]["passed"]
        finally:
            weight.data = before

    def test_nothing_is_written_where_it_cannot_be(self, exporter, subnet, tmp_path):
        _, x = subnet
        net = SuperNet(nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(), nn.Conv2d(4, 2, 4)), x[:1], bits=[8]).eval()
        net.calibrate([x])
        with pytest.raises(ValueError, match="PReLU"):
            exporter.export(net.materialise(net.space.largest()), x[:1], tmp_path / "file.onnx")
        assert not list(tmp_path.iterdir())

    def test_a_proof_needs_images(self, exporter, subnet, tmp_path):
        model, x = subnet
        path = exporter.export(model, x[:1], tmp_path / "file.onnx")
        with pytest.raises(ValueError, match="batch"):
            exporter.verify(path, model, [])
