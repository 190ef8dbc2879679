"""One trained layer and its BatchNorm as one integer layer: quantize, then fold.

The weight codes are those of the trained module (`encode(w)`), up to the sign of the BatchNorm's gain; the rest of the
normalisation goes into per-channel scales and an int32 bias. Folding first would give another network.

| gain g = gamma / sqrt(var + eps) | codes, zero-point                            | weight scale                       |
|----------------------------------|----------------------------------------------|------------------------------------|
| > 0                              | q, z                                         | s_w g                              |
| < 0                              | -q, -z; where they do not fit b bits: ~q, ~z | -s_w g                             |
| = 0                              | 0, 0                                         | such that the bias is held exactly |

The bitwise complement negates what has no room for a plain minus: ~q - ~z = -(q - z).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from supernet.config import QuantConfig
from supernet.elastic.layers import QuantConv2d, QuantLayer
from supernet.export.graph import Grid
from supernet.export.operators import Conv, Layer, Linear
from supernet.formats.integer import Integer
from supernet.quant.quantizer import Quantizer

INT32 = 2**31 - 1
LARGEST = 127
BIAS_STEPS = 1 << 20
NEGLIGIBLE = 2.0**-10
"""A channel whose largest possible contribution is below this share of an output step is constant."""

ROOM = 64
"""Largest code that `fine` may lead to. With 127, two products of uint8 and int8 would not fit the int16 in which
processors without VNNI instructions add them."""


def check(quantizer: Quantizer, name: str) -> None:
    """Raise ValueError unless the quantizer has one choice, on a grid that fits an int8, with usable scales."""
    fits = quantizer.integer or (quantizer.weight and len(quantizer.choices) == 1 and embedding(quantizer.choices[0]))
    if not fits or len(quantizer.choices) != 1:
        found = ", ".join(str(c) for c in quantizer.choices)
        raise ValueError(f"{name} must have one choice, on a grid that fits an int8, to be exported; it has {found}")
    usable = torch.isfinite(quantizer.scale) & torch.isfinite(quantizer.zero_point) & (quantizer.scale > 0)
    if not usable.all():
        bad = quantizer.scale[~usable].tolist()[:4]
        raise ValueError(f"{name} needs positive finite scales, but has {bad}; calibrate the supernet first")


def embedding(choice: QuantConfig) -> int:
    """The smallest factor that makes every level of the grid an integer within +-127; 0 if there is none.

    With codes so multiplied and the scale divided, such a grid is stored exactly in int8.
    """
    levels = torch.tensor(choice.format.levels(choice.symmetric), dtype=torch.float64)
    return next((m for m in range(1, LARGEST + 1) if _integer(levels * m)), 0)


def _integer(values: Tensor) -> bool:
    return bool((values == values.round()).all()) and float(values.abs().max()) <= LARGEST


def fold(name: str, module: QuantLayer, norm: nn.Module | None, source: tuple[str, Grid], grid: Grid | None) -> Layer:
    """The integer layer; see the table at the head of this file.

    Args:
        name: of the operator.
        module: the trained layer.
        norm: the BatchNorm behind it.
        source: name and grid of its input.
        grid: of its output, if it has one.

    Raises:
        ValueError: sums or a bias beyond int32, or padding that is not with zeros.
    """
    quantizer = module.weight_quantizer
    check(quantizer, f"the weight of {name}")
    layer = _empty(name, module, source)
    scale, zero, _, _ = quantizer.parameters_of(module.weight)
    scale, zero = scale.flatten().double() / layer.factor, zero.flatten().long()
    codes = (quantizer.encode(module.weight) * layer.factor).long()
    weight, bias = module.weight.double(), None if module.bias is None else module.bias.double()
    if norm is not None:
        gain, offset = _gain(norm)
        codes, zero = signed(codes, zero, gain, layer.width)
        scale, bias = scale * gain.abs(), offset + (0 if bias is None else bias * gain)
        weight = weight * _like(gain, weight)
    elif len(quantizer.scale) == 1:
        scale, zero = scale[:1], zero[:1]
    unit = source[1].scale
    if bias is not None and len(scale) == len(codes):
        visible = 0.0 if grid is None else grid.scale * NEGLIGIBLE
        constant = (codes - _like(zero, codes)).abs().flatten(1).sum(1) * layer.reach * scale * unit <= visible
        # Their scale is free. 2^20 steps hold the bias to seven digits; a scale of 1 would round it to input steps.
        free = torch.where(bias.abs() < 1e-20, 1.0, bias.abs() / (unit * BIAS_STEPS))
        codes, zero = torch.where(_like(constant, codes), 0, codes), torch.where(constant, 0, zero)
        scale, layer.constant = torch.where(constant, free, scale), int(constant.sum())
    layer.fine, scale = fine(codes - _like(zero, codes)), scale.float()
    steps = None if bias is None else torch.round(bias / (scale * unit / layer.fine).double()).long()
    shift = None if bias is None else bias.float()
    layer.hold(codes=codes.short(), zero=zero.short(), scale=scale, bias=steps, weight=weight.float(), shift=shift)
    _check_sums(layer)
    return layer


def signed(
    codes: Int[Tensor, "k ..."], zero: Int[Tensor, " k"], gain: Float[Tensor, " k"], bits: int
) -> tuple[Int[Tensor, "k ..."], Int[Tensor, " k"]]:
    """Codes and zero-points, negated in the channels of negative gain, within `bits` bits."""
    top = (1 << (bits - 1)) - 1
    fits = (-codes.flatten(1).amin(1) <= top) & (-zero <= top)
    for these, negate in (((gain < 0) & fits, torch.neg), ((gain < 0) & ~fits, torch.bitwise_not)):
        codes = torch.where(_like(these, codes), negate(codes), codes)
        zero = torch.where(these, negate(zero), zero)
    return codes, zero


def fine(centred: Int[Tensor, "k ..."]) -> int:
    """The largest power of two by which centred codes can be multiplied and stay within +-64; 1 if there is none.

    Below 8 bits the unit of the sums is coarse: at 2 bits a bias rounded to it moves an 8-bit site by several steps.
    Such codes have room in an int8 for a finer unit.
    """
    largest = max(int(centred.abs().max()), 1)
    return 1 << max(0, (ROOM // largest).bit_length() - 1)


def _like(values: Tensor, other: Tensor) -> Tensor:
    """One value for each channel, shaped to broadcast against `other`."""
    return values.view(-1, *[1] * (other.dim() - 1))


def _gain(norm: nn.Module) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """y = gain x + offset, in float64, for a BatchNorm in evaluation."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None and norm.running_var is not None
    mean, deviation = norm.running_mean.double(), torch.sqrt(norm.running_var.double() + norm.eps)
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    return gamma / deviation, beta - mean * gamma / deviation


def _empty(name: str, module: QuantLayer, source: tuple[str, Grid]) -> Layer:
    """The operator without its tensors."""
    choice = module.weight_quantizer.choices[0]
    factor = 1 if isinstance(choice.format, Integer) else embedding(choice)
    about = (name, [source[0]], choice, factor, source[1].reach)
    if not isinstance(module, QuantConv2d):
        return Linear(*about)
    if module.padding_mode != "zeros":
        raise ValueError(f"{name} pads with padding_mode={module.padding_mode!r}; only zeros can be exported")
    (down, right), (high, wide) = module.stride, module.dilation
    return Conv(*about, (down, right), _padding(module), (high, wide), module.groups)


def _padding(module: QuantConv2d) -> tuple[int, int, int, int]:
    """Rows above, columns left, rows below, columns right."""
    if not isinstance(module.padding, str):
        top, left = module.padding
        return int(top), int(left), int(top), int(left)
    if module.padding == "valid":
        return 0, 0, 0, 0
    rows, columns = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return rows // 2, columns // 2, rows - rows // 2, columns - columns // 2


def _check_sums(layer: Layer) -> None:
    if layer.largest > INT32:
        raise ValueError(
            f"{layer.name} needs sums up to {layer.largest:.3g} with its bias, more than an int32 holds; its BatchNorm "
            "has an extreme gain or offset: recalibrate it"
        )
