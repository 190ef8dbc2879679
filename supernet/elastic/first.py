"""The convolution of a tensor that needs no gradient itself: of the images that a network is given.

A scale's gradient is the sum of g_x (d x^ / d s); where x itself needs no gradient, all of g_x is computed for one
number. A convolution is linear in its input, so the number is also the sum of g_y conv(d x^ / d s, w), and that is the
sum of w times what the gradient of w would be for that input. One pass gives the gradients of w for all three inputs,
x^ and its two derivatives, laid side by side as channels. Images have few channels, and with few channels the gradient
of a convolution's input is slow. *Measured* on CPU in float32, gradients of input and weight against this, in ms:

| first layer of                    | input and weight | this |
|-----------------------------------|------------------|------|
| a ResNet-20, 128x3x32x32          | 3.1              | 1.9  |
| a ResNet-18, 16x3x64x64           | 10.5             | 6.0  |
| a ResNet-18, 16x3x224x224         | 126              | 87   |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernet.quant.quantizer import Quantizer

Pair = tuple[int, int]


class Linearised(NamedTuple):
    """The first arguments of `FirstConv`."""

    quantized: Tensor
    of_scale: Tensor
    of_zero: Tensor
    scale: Tensor
    zero: Tensor


def linearised(conv: nn.Conv2d, x: Tensor, quantizer: nn.Module) -> Linearised | None:
    """The quantized input with its derivatives, if the scale learns and the input does not; None otherwise.

    Args:
        conv: whose input it is; no derivatives are taken for geometries that `FirstConv` does not have.
        x: [n, c, h, w].
        quantizer: of the input, or what an export has put in its place, which learns nothing.
    """
    plain = conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    wanted = torch.is_grad_enabled() and not x.requires_grad
    if not (plain and wanted and isinstance(quantizer, Quantizer) and quantizer.enabled):
        return None
    scale, zero = quantizer.select()
    return Linearised(*quantizer.linearise(x, scale, zero), scale, zero) if scale.requires_grad else None


def convolve(conv: nn.Conv2d, lines: Linearised, weight: Tensor) -> Tensor:
    """The layer's outcome [n, k, h', w'] for a weight that is quantized already."""
    out: Tensor = FirstConv.apply(*lines, weight, conv.bias, conv.stride, conv.padding, conv.dilation)
    return out


class FirstConv(torch.autograd.Function):
    """y = conv(x^, w) + b, with gradients to w, b and to the scale and zero-point that x^ was made with.

    Args (of `apply`):
        quantized: x^ [n, c, h, w].
        of_scale, of_zero: its derivatives, element by element.
        scale, zero: [1]; only their gradients are wanted here.
        weight: [k, c, i, j], quantized.
        bias: [k], or None.
        stride, padding, dilation: of the convolution; padded with zeros, ungrouped.
    """

    @staticmethod
    def forward(
        ctx: Any,
        quantized: Tensor,
        of_scale: Tensor,
        of_zero: Tensor,
        scale: Tensor,
        zero: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
    ) -> Tensor:
        ctx.save_for_backward(quantized, of_scale, of_zero, weight)
        ctx.geometry, ctx.biases = (stride, padding, dilation), None if bias is None else list(bias.shape)
        return F.conv2d(quantized, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        channels, wanted = weight.shape[1], [False, True, ctx.biases is not None]
        stacked = torch.cat([x.to(grad.dtype) for x in inputs], 1)
        # of the weight only shape and layout are read, since no gradient to the input is wanted
        shape = weight.to(grad.dtype).repeat(1, len(inputs), 1, 1)
        _, of_weight, of_bias = torch.ops.aten.convolution_backward(
            grad, stacked, shape, ctx.biases, stride, padding, dilation, False, [0, 0], 1, wanted
        )
        own, *others = of_weight.to(weight.dtype).split(channels, 1)
        of_scale, of_zero = ((weight * other).sum().view(1) for other in others)
        return None, None, None, of_scale, of_zero, own, of_bias, None, None, None
