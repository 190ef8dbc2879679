"""Which choices a target runs: each layer's shape with each way to quantize its weight and its input, tried in small.

A trial is one layer with random weights and a normalisation behind it, if it has one in the network, between 8-bit
codes, cut down to a few pixels and channels; its weight's choices are tried on 8-bit inputs, its input's choices with
8-bit weights. It is legal where the target loads and runs it and gives the reference's codes; then it is said which
kernels ran and whether they compute on codes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from supernet.artefacts import VerificationError
from supernet.config import Choice, Layer, PerChannel, QuantConfig
from supernet.elastic.layers import ADAPTERS, QuantLayer
from supernet.elastic.supernet import SuperNet
from supernet.export.fold import fold
from supernet.export.graph import Deployed, Grid
from supernet.export.latency import Writes
from supernet.export.operators import Quantize
from supernet.export.runtime import Parts
from supernet.export.verify import CODES_EQUAL, CODES_OFF
from supernet.formats.integer import Integer
from supernet.interfaces import Target
from supernet.space import SearchSpace

WEIGHT, INPUT = QuantConfig(Integer(8), PerChannel()), QuantConfig(Integer(8))
PIXELS, CHANNELS, ALIGNED = 8, 64, 16
"""A trial has no more pixels a side and no more channels, plus their remainder by ALIGNED: kernels may depend on it."""

IMAGES = 4
LEVELS = ("integer", "any")


@dataclass(frozen=True)
class Shape:
    """What is fixed about a layer, as far as it can matter to a target.

    Attributes:
        kind: `conv` or `linear`.
        weight: shape of the weight, of few channels.
        stride, padding, dilation, groups: of a convolution.
        bias, normed: whether it has a bias, and a BatchNorm behind it.
        size: height and width of the trial's images.
    """

    kind: str
    weight: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: str | tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    normed: bool = True
    size: tuple[int, int] = (PIXELS, PIXELS)

    @classmethod
    def of(cls, module: nn.Module, shape: tuple[int, ...], normed: bool) -> Shape:
        """The shape of a layer that reads [*shape]."""
        assert isinstance(module, nn.Conv2d | nn.Linear)
        weight, bias = tuple(module.weight.shape), module.bias is not None
        if isinstance(module, nn.Linear):
            weight = _few(weight[0]), _few(weight[1])
            return cls("linear", weight, bias=bias, normed=normed)
        reach = [d * (k - 1) + s for d, k, s in zip(module.dilation, weight[2:], module.stride, strict=True)]
        high, wide = (max(min(n, PIXELS), min(n, r + 1)) for n, r in zip(shape[1:], reach, strict=True))
        (down, right), (dh, dw) = module.stride, module.dilation
        groups, each = module.groups, weight[0] // module.groups
        if groups == 1:
            weight = (_few(weight[0]), _few(weight[1]), *weight[2:])
        else:
            groups = _few(groups)
            weight = (each * groups, *weight[1:])
        padding = module.padding if isinstance(module.padding, str) else (module.padding[0], module.padding[-1])
        return cls("conv", weight, (down, right), padding, (dh, dw), groups, bias, normed, (high, wide))

    def __str__(self) -> str:
        parts = [f"{self.kind} {'x'.join(map(str, self.weight))}"]
        if self.kind == "conv":
            padding = self.padding if isinstance(self.padding, str) else "x".join(map(str, self.padding))
            parts.append(f"stride {self.stride[0]}x{self.stride[1]} padding {padding}")
            parts += [f"dilation {self.dilation[0]}x{self.dilation[1]}"] if self.dilation != (1, 1) else []
            parts += [f"groups {self.groups}"] if self.groups > 1 else []
        parts += ["bias"] if self.bias else []
        return " ".join([*parts, *(["normed"] if self.normed else [])])

    def module(self, choice: QuantConfig) -> QuantLayer:
        """A layer of this shape with random weights, its weight quantized by `choice`."""
        outputs, inputs = self.weight[:2]
        layer: nn.Module
        if self.kind == "conv":
            layer = nn.Conv2d(
                inputs * self.groups,
                outputs,
                (self.weight[2], self.weight[3]),
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
                self.bias,
            )
        else:
            layer = nn.Linear(inputs, outputs, self.bias)
        made: QuantLayer = ADAPTERS[type(layer)].from_float(layer)  # type: ignore[arg-type]
        made.quantize([choice], [INPUT])
        made.weight_quantizer.start(made.weight.detach())
        return made.eval()

    def images(self, generator: torch.Generator) -> torch.Tensor:
        """Random inputs."""
        channels = self.weight[1] * self.groups
        shape = (IMAGES, channels, *self.size) if self.kind == "conv" else (IMAGES, channels)
        return torch.randn(shape, generator=generator)


def _few(n: int) -> int:
    return n if n <= CHANNELS else CHANNELS + n % ALIGNED


@torch.no_grad()
def trial(shape: Shape, weight: QuantConfig, data: QuantConfig, seed: int = 0) -> tuple[Deployed, torch.Tensor]:
    """One layer between codes, and inputs of it."""
    random = torch.Generator().manual_seed(seed)
    x = shape.images(random)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = shape.module(weight)
    norm = None
    if shape.normed:
        norm = nn.BatchNorm2d(shape.weight[0]) if shape.kind == "conv" else nn.BatchNorm1d(shape.weight[0])
        norm.weight.copy_(torch.randn(shape.weight[0], generator=random))
        norm.bias.copy_(torch.randn(shape.weight[0], generator=random))
    real = module(x) if norm is None else norm.eval()(module(x))
    layer = fold("layer", module, norm, ("codes", _grid(data, x)), _grid(INPUT, real))
    layer.grid = _grid(INPUT, real)
    entry = Quantize("codes", ["x"])
    entry.grid = _grid(data, x)
    return Deployed([entry, layer], "x", "layer", x[:1], int(shape.normed), tuple(real.shape[1:])), x


def _grid(choice: QuantConfig, values: torch.Tensor) -> Grid:
    """The grid of an activation, set as calibration sets it."""
    from supernet.quant.quantizer import Quantizer

    quantizer = Quantizer([choice])
    quantizer.start(values)
    return Grid.of(quantizer)


def verdict(target: Target, profile: Writes, shape: Shape, weight: QuantConfig, data: QuantConfig) -> dict[str, Any]:
    """What a target does with one trial: `loads`, `runs`, `right`, `integer`, `kernels`, `most_off` and `why` not."""
    said: dict[str, Any] = {"loads": False, "runs": False, "right": False, "integer": False}
    said |= {"kernels": [], "most_off": None, "why": None}
    try:
        deployed, x = trial(shape, weight, data)
        model = Parts(profile.loadable(deployed)).cut(["codes"], "layer")
        kernels, call = target.load(model)
        said |= {"loads": True, "kernels": [kind for kind, _ in kernels]}
        kept = deployed.tensors(x)
        off = np.abs(call({"codes": kept["codes"]}) - kept["layer"].double().numpy())
        said |= {"runs": True, "most_off": float(off.max()), "integer": target.integer(kernels)}
        said["right"] = bool(off.max() <= CODES_OFF and (off <= 0).mean() >= CODES_EQUAL)
        if not said["right"]:
            said["why"] = f"{off.max():.3g} codes off, {100 * (off <= 0).mean():.2f} % equal"
    except (VerificationError, ValueError) as error:
        said["why"] = str(error)
    return said


def trials(net: SuperNet) -> Iterator[tuple[str, Shape, QuantConfig, QuantConfig]]:
    """(key, shape, weight, input) of everything that has to be tried for a supernet, each once."""
    seen: set[str] = set()
    for layer in weighted(net):
        shape = shape_of(net, layer.name)
        for gene, makes in ((layer.weight, weight_trial), (layer.input, input_trial)):
            for choice in net.space.dimensions[net.space.position[gene]].choices:
                assert isinstance(choice, QuantConfig)
                found = makes(shape, choice)
                if found[0] not in seen:
                    seen.add(found[0])
                    yield found


def weighted(net: SuperNet) -> list[Layer]:
    """The layers with weights. Products of activations are not tried: their operands are codes whatever their bits."""
    return [layer for layer in net.layers if layer.kind != "matmul"]


def shape_of(net: SuperNet, name: str) -> Shape:
    """The shape of a layer of a supernet."""
    layer = next(layer for layer in net.layers if layer.name == name)
    return Shape.of(net.model.get_submodule(name), layer.shape, layer.behind_norm)


def weight_trial(shape: Shape, choice: QuantConfig) -> tuple[str, Shape, QuantConfig, QuantConfig]:
    """The trial of one way to quantize the weight."""
    return f"{shape} | weight {choice}", shape, choice, INPUT


def input_trial(shape: Shape, choice: QuantConfig) -> tuple[str, Shape, QuantConfig, QuantConfig]:
    """The trial of one way to quantize the input."""
    return f"{shape} | input {choice}", shape, WEIGHT, choice


def legal(net: SuperNet, records: Mapping[str, Mapping[str, Any]], level: str = "integer") -> SearchSpace:
    """The view of a net's space that holds only choices which a target runs, and runs rightly.

    Args:
        net: the supernet.
        records: of the trials, by key.
        level: `integer`: in kernels that compute on codes alone; `any`: at all.

    Raises:
        ValueError: another level, a choice that was not tried, or a layer that is left without a choice.
    """
    if level not in LEVELS:
        raise ValueError(f"legal is {' or '.join(LEVELS)}, got {level!r}")
    allowed: dict[str, tuple[Choice, ...]] = {}
    for layer in weighted(net):
        shape = shape_of(net, layer.name)
        for gene, makes in ((layer.weight, weight_trial), (layer.input, input_trial)):
            kept = []
            for choice in net.space.dimensions[net.space.position[gene]].choices:
                assert isinstance(choice, QuantConfig)
                key = makes(shape, choice)[0]
                if key not in records:
                    raise ValueError(f"{gene} {choice} was not tried on the target; probe this run (again)")
                record = records[key]
                if record["right"] and (level == "any" or record["integer"]):
                    kept.append(choice)
            if not kept:
                raise ValueError(f"the target runs {gene} in no way of this space as legal={level} asks; see its table")
            allowed[gene] = tuple(kept)
    return net.space.restrict(allowed)


GRID = (
    Shape("conv", (16, 3, 3, 3), padding=(1, 1)),
    Shape("conv", (32, 32, 3, 3), padding=(1, 1)),
    Shape("conv", (64, 32, 3, 3), (2, 2), (1, 1)),
    Shape("conv", (64, 32, 1, 1)),
    Shape("conv", (64, 32, 1, 1), (2, 2)),
    Shape("conv", (32, 1, 3, 3), padding=(1, 1), groups=32),
    Shape("conv", (32, 1, 3, 3), (2, 2), (1, 1), groups=32),
    Shape("conv", (32, 8, 3, 3), padding=(1, 1), groups=4),
    Shape("conv", (32, 32, 3, 3), padding=(1, 1), bias=True, normed=False),
    Shape("linear", (10, 64), bias=True, normed=False),
    Shape("linear", (128, 128), normed=False),
)
"""Shapes that stand for classes of layers, where there is no network to take them from."""
