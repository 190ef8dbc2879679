"""Convolution and linear layers with a quantizer for the weight and one for the input.

The same classes serve the supernet (several choices) and a materialised subnet (one choice), so both run the same
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernet.config import QuantConfig
from supernet.elastic import first, patches
from supernet.quant.quantizer import Quantizer
from supernet.space import Dimension


class QuantLayer(nn.Module):
    """What both layers share: the quantizers, their dimensions, and how a float layer becomes one of these.

    `genes` says which quantizer each dimension chooses for, that in the place of the weight first.
    """

    genes: ClassVar[dict[str, str]] = {"weight": "weight_quantizer", "input": "input_quantizer"}
    weight: Tensor
    bias: Any  # a Parameter or None
    weight_quantizer: Quantizer
    input_quantizer: Quantizer

    def quantize(
        self, weight_choices: Sequence[QuantConfig], input_choices: Sequence[QuantConfig], bypass: int = 0
    ) -> Self:
        """Give the layer its quantizers; scales of the weight start from its values.

        Args:
            weight_choices, input_choices: what the space offers.
            bypass: bits from which on the input is taken as it is, because a site before it has quantized it already
                (0: never).
        """
        self.weight_quantizer = Quantizer(weight_choices, self.weight.shape[0], weight=True)
        self.input_quantizer = Quantizer(input_choices, bypass=bypass)
        return self

    def dimensions(self, prefix: str) -> list[Dimension]:
        """`<prefix>.weight` and `<prefix>.input`."""
        return [Dimension(f"{prefix}.{gene}", getattr(self, name).choices) for gene, name in self.genes.items()]

    def fix(self, weight_choice: int, input_choice: int) -> None:
        """Keep one choice of each quantizer and drop the others."""
        self.weight_quantizer = self.weight_quantizer.only(weight_choice)
        self.input_quantizer = self.input_quantizer.only(input_choice)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """nn.Conv2d of the quantized input with the quantized weight; padding is with real zeros, which are on the grid."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, k, h', w']."""
        product = patches.pays(self, x)
        if not product and (lines := first.linearised(self, x, self.input_quantizer)) is not None:
            return first.convolve(self, lines, self.weight_quantizer(self.weight))
        x, weight = self.input_quantizer(x), self.weight_quantizer(self.weight)
        return patches.convolve(self, x, weight) if product else self._conv_forward(x, weight, self.bias)

    @classmethod
    def from_float(cls, conv: nn.Conv2d) -> QuantConv2d:
        """The same layer with the same parameters, still without quantizers."""
        with torch.device("meta"):
            made = cls(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,  # type: ignore[arg-type]
                conv.stride,  # type: ignore[arg-type]
                conv.padding,  # type: ignore[arg-type]
                conv.dilation,  # type: ignore[arg-type]
                conv.groups,
                conv.bias is not None,
                conv.padding_mode,
            )
        made.weight, made.bias = conv.weight, conv.bias
        return made.train(conv.training)


class QuantLinear(QuantLayer, nn.Linear):
    """nn.Linear of the quantized input with the quantized weight."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., c] -> [..., k]."""
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)

    @classmethod
    def from_float(cls, linear: nn.Linear) -> QuantLinear:
        """The same layer with the same parameters, still without quantizers."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, linear.bias is not None)
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)


ADAPTERS: dict[type[nn.Module], type[QuantConv2d] | type[QuantLinear]] = {
    nn.Conv2d: QuantConv2d,
    nn.Linear: QuantLinear,
}
