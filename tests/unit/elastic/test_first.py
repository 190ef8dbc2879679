"""The first convolution: gradients of its scale without the gradient of the image, equal to those by way of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.elastic.layers import QuantConv2d
from supernet.formats.integer import Integer
from supernet.formats.powers import PowersOfTwo

INTEGERS = [QuantConfig(Integer(b), PerTensor(), symmetric=s) for b in (2, 8) for s in (True, False)]
TABLES = [QuantConfig(PowersOfTwo(4)), QuantConfig(Integer(4), PerTensor(), symmetric=False)]
GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1, "bias": False},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
]


def layer(choices: list[QuantConfig], bypass: int = 0, **geometry: Any) -> QuantConv2d:
    """In float64, with an input whose outer values lie beyond the grid."""
    torch.manual_seed(0)
    made = QuantConv2d.from_float(nn.Conv2d(4, 6, **geometry)).quantize(
        [QuantConfig(Integer(3), PerChannel())], choices, bypass
    )
    made.weight_quantizer.start(made.weight)
    made.input_quantizer.start(images())
    made.double()
    with torch.no_grad():
        made.input_quantizer.scale *= 0.6
        made.input_quantizer.zero_point += 0.7
    return made


def images() -> Tensor:
    return torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(1)).double()


def passed_back(made: QuantConv2d, x: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The outcome, and the gradients of everything that learns."""
    made.zero_grad(set_to_none=True)
    out = made(x)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)).sum().backward()
    return out, {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("choices", "choice", "geometry", "bypass"),
    [(c, k, g, 0) for c in (INTEGERS, TABLES) for k, g in itertools.product(range(len(c)), GEOMETRIES)]
    + [(INTEGERS, 3, GEOMETRIES[0], 8)],
)
def test_gradients_are_those_by_way_of_the_image(
    choices: list[QuantConfig], choice: int, geometry: dict[str, Any], bypass: int
) -> None:
    made = layer(choices, bypass, **geometry)
    with made.input_quantizer.using(choice):
        out, short = passed_back(made, images())
        by_image, long = passed_back(made, images().requires_grad_())
    assert out.grad_fn is not None and out.grad_fn.name() == "FirstConvBackward"
    assert torch.equal(out, by_image)
    assert short.keys() == long.keys() and {"weight", "input_quantizer.scale"} <= short.keys()
    for name, gradient in short.items():
        torch.testing.assert_close(gradient, long[name], rtol=1e-9, atol=1e-12)
    if bypass:
        assert not short["input_quantizer.scale"].any()
    else:
        assert short["input_quantizer.scale"].any()
        assert bool(short["input_quantizer.zero_point"].any()) == (not choices[choice].symmetric)


def test_the_gradient_of_the_image_is_not_computed() -> None:
    made = layer(INTEGERS, **GEOMETRIES[0])
    with torch.profiler.profile(record_shapes=True) as short:
        passed_back(made, images())
    with torch.profiler.profile(record_shapes=True) as long:
        passed_back(made, images().requires_grad_())
    wanted = {
        kind: [e.concrete_inputs[-1] for e in profile.events() or [] if e.name == "aten::convolution_backward"]
        for kind, profile in (("short", short), ("long", long))
    }
    assert [w[0] for w in wanted["short"]] == [False] and [w[0] for w in wanted["long"]] == [True]


@pytest.mark.parametrize(
    "geometry",
    [{"groups": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}],
    ids=["groups", "same", "reflect"],
)
def test_other_convolutions_go_by_way_of_the_image(geometry: dict[str, Any]) -> None:
    made = layer(INTEGERS, kernel_size=3, **geometry)
    out, short = passed_back(made, images())
    assert out.grad_fn is not None and out.grad_fn.name() != "FirstConvBackward"
    assert short["input_quantizer.scale"].any()


def test_without_gradients_or_scales_that_learn_it_is_a_plain_convolution() -> None:
    made = layer(INTEGERS, **GEOMETRIES[0])
    with torch.no_grad():
        assert not made(images()).requires_grad
    made.input_quantizer.requires_grad_(False)
    out = made(images())
    assert out.grad_fn is not None and out.grad_fn.name() != "FirstConvBackward"


def test_autocast_gives_gradients_of_the_same_size() -> None:
    made = layer(INTEGERS, **GEOMETRIES[0]).float()
    with made.input_quantizer.using(3):
        _, plain = passed_back(made, images().float())
        with torch.autocast("cpu", torch.bfloat16):
            out, cast = passed_back(made, images().float())
    assert out.dtype == torch.bfloat16
    for name, gradient in cast.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, plain[name], rtol=0.05, atol=0.05 * float(plain[name].abs().max()))
