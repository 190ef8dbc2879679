"""Every operator that the exporter knows, in each way to write it: torch, the reference and onnxruntime agree."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from supernet.export.deploy import deploy
from supernet.export.graph import Move
from supernet.export.onnx import write, write_float
from supernet.export.runtime import run, session


class Run(nn.Module):
    """A forward pass given as a function, and at most one module for it."""

    def __init__(self, run, part=None):
        super().__init__()
        self.run, self.part = run, part

    def forward(self, x):
        return self.run(x) if self.part is None else self.run(x, self.part)


FUNCTIONS = {
    "a + a": lambda x: x + x,
    "torch.add": lambda x: torch.add(x, x.relu()),
    "+=": lambda x: _iadd(x),
    ".add": lambda x: x.add(F.relu6(x)),
    "a * a": lambda x: x * torch.sigmoid(x),
    "torch.mul": lambda x: torch.mul(x, x),
    "torch.cat": lambda x: torch.cat([x, torch.tanh(x)], 1),
    "torch.cat, named": lambda x: torch.cat(tensors=(x, x), dim=-1),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d, named": lambda x: F.max_pool2d(x, kernel_size=(2, 3), ceil_mode=True),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool2d, named": lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_avg_pool2d, windows": lambda x: F.adaptive_avg_pool2d(x, (4, 2)),
    ".mean": lambda x: x.mean((2, 3)),
    ".mean, kept": lambda x: x.mean([-1, -2], keepdim=True),
    "torch.mean": lambda x: torch.mean(x, dim=(2, 3)),
    "torch.flatten": lambda x: torch.flatten(x, 1),
    ".flatten, partly": lambda x: x.flatten(2),
    ".view": lambda x: x.view(x.size(0), -1),
    ".reshape": lambda x: x.reshape(x.shape[0], 4, -1),
    "torch.reshape": lambda x: torch.reshape(x, (-1, 3 * 64)),
    "slice": lambda x: x[:, 1:, ::2, :-1],
    "slice, short": lambda x: x[:, :2],
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad, channels": lambda x: F.pad(x, (0, 0, 0, 0, 2, 1), value=0.0),
    "relu": lambda x: torch.relu(x),
    "silu": lambda x: F.silu(x),
    "hardswish": lambda x: F.hardswish(x),
    "hardsigmoid": lambda x: F.hardsigmoid(x),
    "gelu": lambda x: F.gelu(x),
    "dropout": lambda x: F.dropout(x, 0.5, training=False) + x,
    ".contiguous": lambda x: x.contiguous() + x,
}
MODULES = [
    nn.MaxPool2d(3, 2, padding=1),
    nn.MaxPool2d(2, dilation=2, ceil_mode=True),
    nn.AvgPool2d(3, 2, padding=1, ceil_mode=True),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveAvgPool2d((2, 4)),
    nn.Flatten(),
    nn.ZeroPad2d((1, 0, 2, 1)),
    *(nn.ReLU(), nn.ReLU6(), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.GELU()),
    nn.Sequential(nn.Identity(), nn.Dropout(), nn.ReLU()),
]


def _iadd(x):
    y = x.relu()
    y += x
    return y


def agree(model):
    x = 2 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = deploy(model, x)
    with torch.no_grad():
        expected = model(x)
    assert torch.allclose(made(x), expected, atol=1e-6)
    for file in (write(made), write_float(made)):
        assert np.allclose(run(session(file)[0], {made.source: x}), expected.numpy(), atol=1e-5)
    return made


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_methods(name):
    agree(Run(FUNCTIONS[name]))


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_modules(module):
    agree(Run(lambda x, part: part(x), module.eval()))


def test_what_moves_values_is_known_as_such():
    """Quantizers are moved before these, and codes go through them."""
    moves = {name for name, f in FUNCTIONS.items() if all(isinstance(op, Move) for op in agree(Run(f)).operators())}
    words = ("max_pool2d", "flatten", "view", "reshape", "slice", "pad")
    assert moves == {name for name in FUNCTIONS if any(w in name for w in words)}


REFUSED = {
    "adds 2 times a tensor": lambda x: torch.add(x, x, alpha=2),
    "joins along the batch": lambda x: torch.cat([x, x], 0),
    "divides by 3": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "pools 8x8 to 3x8": lambda x: F.adaptive_avg_pool2d(x, (3, 8)),
    "mean over axes all": lambda x: x.mean(),
    "mixes images": lambda x: x.reshape(-1, 8),
    "only slices with constant bounds": lambda x: x[:, None],
    "part of the batch": lambda x: x[1:],
    "only zeros around a tensor": lambda x: F.pad(x, (1, 1), value=1.0),
    "GELU approximated by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "exp, which the exporter does not know": lambda x: torch.exp(x),
    "log_softmax, which the exporter does not know": lambda x: x.log_softmax(1),
}


@pytest.mark.parametrize("said", REFUSED)
def test_other_uses_are_refused(said):
    with pytest.raises(ValueError, match=said):
        deploy(Run(REFUSED[said]), torch.randn(1, 3, 8, 8))
