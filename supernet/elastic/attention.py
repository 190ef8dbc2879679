"""Attention whose two matrix products are modules: counted, quantized and exported like layers.

Fused attention hides its products: an audit finds them in float, and no runtime has an integer kernel for the whole.
Written out, softmax(q k^T / sqrt(d)) v consists of two products of activations with a softmax between them; each
product quantizes both of its operands, the softmax stays in float (its outcome is quantized: 0..1, unsigned).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from supernet.config import QuantConfig
from supernet.quant.quantizer import Quantizer
from supernet.space import Dimension

PARTS = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")


class MatMul(nn.Module):
    """factor * left @ right, both computed from the input of the network.

    Args:
        factor: a constant number; in a file it goes into a scale, so that it costs nothing.
    """

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """[..., m, k], [..., k, n] -> [..., m, n]."""
        product = left @ right
        return product if self.factor == 1.0 else product * self.factor

    def extra_repr(self) -> str:
        """The factor."""
        return f"factor={self.factor:g}"


class QuantMatMul(MatMul):
    """A product of two activations, each quantized in front of it.

    It stands among the layers of a network (`supernet.config.Layer`) with `right` in the place of the weight; both
    operands are inputs where bits are chosen (`w4a8`: 8 bits for both).
    """

    genes: ClassVar[dict[str, str]] = {"right.input": "right_quantizer", "left.input": "left_quantizer"}
    left_quantizer: Quantizer
    right_quantizer: Quantizer

    def quantize(self, right_choices: Sequence[QuantConfig], left_choices: Sequence[QuantConfig]) -> Self:
        """Give the product its quantizers."""
        self.right_quantizer, self.left_quantizer = Quantizer(right_choices), Quantizer(left_choices)
        return self

    def dimensions(self, prefix: str) -> list[Dimension]:
        """`<prefix>.right.input` and `<prefix>.left.input`."""
        return [Dimension(f"{prefix}.{gene}", getattr(self, name).choices) for gene, name in self.genes.items()]

    def fix(self, right_choice: int, left_choice: int) -> None:
        """Keep one choice of each quantizer and drop the others."""
        self.right_quantizer = self.right_quantizer.only(right_choice)
        self.left_quantizer = self.left_quantizer.only(left_choice)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """[..., m, k], [..., k, n] -> [..., m, n]."""
        return super().forward(self.left_quantizer(left), self.right_quantizer(right))

    @classmethod
    def from_float(cls, product: MatMul) -> QuantMatMul:
        """The same product, still without quantizers."""
        return cls(product.factor).train(product.training)


class Attention(nn.Module):
    """Multi-head self-attention with explicit products, made of the parts of another module under their own names.

    Args:
        heads: number of heads.
        scale: of the scores, usually head size ** -0.5.
        parts: `qkv` (c -> 3 heads d, in the order q, k, v) and `proj`; where there are any, `q_norm` and `k_norm` (of a
            head), `norm` (before `proj`), `gate` (c -> heads d; its sigmoid multiplies the outcome), `attn_drop` and
            `proj_drop`.
    """

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Module
    norm: nn.Module
    gate: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, heads: int, scale: float, **parts: nn.Module | None) -> None:
        super().__init__()
        self.heads = heads
        given = {name: part for name, part in parts.items() if part is not None}
        for name in PARTS:
            self.add_module(name, given.pop(name, None) or nn.Identity())
        if given:
            raise ValueError(f"attention has no parts called {', '.join(given)}")
        self.scores, self.mix, self.gated = MatMul(scale), MatMul(), parts.get("gate") is not None

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """[n, t, c] -> [n, t, c']. Masks are refused.

        Raises:
            ValueError: a mask.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attention with a mask is not quantized; leave it in float with allow=[its path]")
        n, t, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (part.reshape(n, t, self.heads, -1).transpose(1, 2) for part in (q, k, v))
        scores = self.scores(self.q_norm(q), self.k_norm(k).transpose(-2, -1))
        mixed = self.mix(self.attn_drop(torch.softmax(scores, -1)), v)
        out = self.norm(mixed.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(out * self.gate(x).sigmoid() if self.gated else out))


def _from_timm(module: Any) -> nn.Module:
    return Attention(module.num_heads, module.scale, **{name: getattr(module, name, None) for name in PARTS})


EXPLICIT: dict[str, Callable[[Any], nn.Module]] = {
    "timm.layers.attention.Attention": _from_timm,
    "timm.models.vision_transformer.Attention": _from_timm,  # where it lay in earlier releases
}
"""Classes whose products can be written out, by full name, so that no library is imported for it."""


def write_out(model: nn.Module, allow: Sequence[str] = ()) -> nn.Module:
    """Replace fused attention by `Attention` with the same parameters under the same names, in place.

    Args:
        model: any network.
        allow: shell patterns of modules that stay as they are.

    Returns:
        The model, or what it became where it is attention itself.
    """
    made: dict[nn.Module, nn.Module] = {}
    for path, module in model.named_modules():
        maker = EXPLICIT.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if maker and not any(fnmatch.fnmatch(path, pattern) for pattern in allow):
            made[module] = maker(module).train(module.training)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module in made:
                setattr(parent, child, made[module])
    return made.get(model, model)
