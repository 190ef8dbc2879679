"""Networks as users bring them."""

import pytest
import torch

from supernet.calibration.batchnorm import recalibrate
from supernet.config import PerChannel
from supernet.elastic.supernet import SuperNet
from supernet.export.deploy import deploy
from supernet.export.onnx import write
from supernet.export.operators import Conv
from supernet.export.runtime import counts, run, session, unfused
from supernet.export.verify import compare, operators

CASES = {"resnet18": ({"zero_init_last": False}, 20), "mobilenetv2_100": ({}, 52)}


@pytest.mark.parametrize("name", CASES)
def test_a_timm_model(name):
    """Calibrated on a few images, not trained: every operator of the file gives the reference's codes."""
    options, convolutions = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(6, 3, 64, 64)
    few = {"bits": (4, 8), "granularities": [PerChannel()], "symmetries": [True]}
    net = SuperNet(f"timm/{name}", x[:1], **few, num_classes=10, **options).eval()
    with net.floating():
        recalibrate(net.model, [x])
    net.calibrate([x])
    subnet = net.materialise(net.space.uniform("w4a8"))
    recalibrate(subnet, [x])
    made = deploy(subnet, x)
    assert made.folded == convolutions == sum(isinstance(op, Conv) for op in made.operators())
    file = write(made)
    assert [row for row in operators(file, made, x[:2]) if row["verdict"] != "ok"] == []
    runner, kernels = session(file)
    assert all(op.grid is not None for op in made.operators() if isinstance(op, Conv))
    assert counts(kernels)["QLinearConv"] == convolutions and unfused(kernels) == []
    logits = {"deployed": made(x).double(), "file": torch.from_numpy(run(runner, {made.source: x}))}
    assert compare(logits, logits["deployed"].argmax(1), 4)["failures"] == []
