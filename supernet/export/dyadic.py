"""Dyadic factors: real ratios of scales as an integer multiplication and a shift.

Yao et al., HAWQ-V3, ICML 2021, arXiv:2011.10680, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

BITS = 31
MOST = 54
"""Largest shift. One more, and a zero-point of 255 in front of it would leave an int64 no room for the product."""


@dataclass(frozen=True, eq=False, slots=True)
class Dyadic:
    """Factors b / 2^c, 0 <= b < 2^31, 1 <= c <= 54.

    | step        | formula                                                              |
    |-------------|----------------------------------------------------------------------|
    | mantissa    | ratio = m 2^e, 0.5 <= m < 1                                          |
    | b           | floor(m 2^31 + 1/2); where that is 2^31: 2^30, and e + 1             |
    | c           | 31 - e; where that is over 54: 54, and b = floor(ratio 2^54 + 1/2)   |
    | application | (total b + 2^(c-1)) >> c, which is floor(total b / 2^c + 1/2)        |

    A tie goes up, as in a rounding shift; grids elsewhere round it to even. With 31 bits the relative error of the
    factor is at most 2^-31. Where c is capped, a ratio below 2^-23, it is at most 2^-24 of an output step for any
    32-bit total. Departure: the paper's code rounds the product of the input scales to float32 before it divides, to
    follow one compiler; the ratio here is all float64.
    """

    b: Int[Tensor, "..."]
    c: Int[Tensor, "..."]

    @classmethod
    def of(cls, ratio: Float[Tensor, "..."] | float, bits: int = BITS, most: int = MOST) -> Dyadic:
        """The nearest factors to positive float64 ratios, with mantissas of `bits` bits and shifts of `most` at most.

        Raises:
            ValueError: a ratio that is not in (0, 2^(bits-1)).
        """
        ratio = torch.as_tensor(ratio, dtype=torch.float64)
        if not bool(((ratio > 0) & (ratio < 2.0 ** (bits - 1))).all()):
            raise ValueError(
                f"a dyadic factor of {bits} bits stands for a ratio in (0, 2^{bits - 1}), got {float(ratio.min()):g} "
                f".. {float(ratio.max()):g}; recalibrate the scales"
            )
        mantissa, exponent = torch.frexp(ratio)
        b = torch.floor(mantissa * 2.0**bits + 0.5).long()
        full = b == 1 << bits
        b, c = torch.where(full, b >> 1, b), bits - exponent.long() - full.long()
        far = c > most
        return cls(torch.where(far, torch.floor(ratio * 2.0**most + 0.5).long(), b), torch.where(far, most, c))

    @property
    def half(self) -> Int[Tensor, "..."]:
        """What is added before the shift, so that it rounds."""
        return torch.ones_like(self.c) << (self.c - 1)

    def __call__(self, total: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """round(total b / 2^c) in int64, ties up; |total| < 2^31."""
        return (total.long() * self.b + self.half) >> self.c

    def reduced(self) -> Dyadic:
        """The same factors with common powers of two taken out: b is 1 where all ratios are powers of two."""
        b, c = self.b, self.c
        while bool(((b % 2 == 0) & (c > 1)).all()):
            b, c = b >> 1, c - 1
        return Dyadic(b, c)
