"""Powers of two: multiplying by such a weight is a shift."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PowersOfTwo:
    """Grid {0, ±1, ±2, ±4, ..., ±2^(2^(bits-1) - 2)}, in units of its smallest step.

    Levels crowd around zero, where most weights are; a multiplication by one of them is a shift. Miyashita et al.,
    Convolutional Neural Networks using Logarithmic Data Representation, 2016, arXiv:1603.01025; Li et al., Additive
    Powers-of-Two Quantization, ICLR 2020, arXiv:1909.13144, section 2.1. Both write the grid with ±1 as its largest
    level; here the smallest is 1, so that levels are integers and fit an int8 file. The scale absorbs the difference.

    | bits | levels | largest |
    |------|--------|---------|
    | 2    | 3      | 1       |
    | 3    | 7      | 4       |
    | 4    | 15     | 64      |

    Args:
        bits: 2..4; one for the sign, the others for the exponent and zero. With 5 the largest level would be 2^14:
            steps finer than any weight needs next to it, and no int8.

    Raises:
        ValueError: bits outside 2..4.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 4:
            raise ValueError(f"PowersOfTwo takes 2 to 4 bits, got {self.bits}; use Integer for wider grids")

    def levels(self, symmetric: bool) -> tuple[float, ...]:
        """Ascending levels, the same whether `symmetric` or not: no zero-point is offered, it would undo the shifts."""
        powers = [2.0**k for k in range(2 ** (self.bits - 1) - 1)]
        return (*(-p for p in reversed(powers)), 0.0, *powers)

    def __str__(self) -> str:
        return f"pow2-{self.bits}"
