"""Two's-complement integers: the grid that every runtime knows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Integer:
    """Integers of `bits` bits.

    | bits | symmetric      | asymmetric (a zero-point shifts it) |
    |------|----------------|-------------------------------------|
    | 2..7 | -2^(b-1) .. 2^(b-1)-1 | the same                     |
    | 8    | -127 .. 127    | -128 .. 127                         |

    At 8 bits the symmetric grid leaves out -128, so that a folded BatchNorm with a negative gain may negate the codes
    and the result still fits an int8. Below 8 bits the container has room.

    Args:
        bits: 2..8.

    Raises:
        ValueError: bits outside 2..8.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(
                f"Integer takes 2 to 8 bits, got {self.bits}; one-bit and wider grids are formats of their own"
            )

    def levels(self, symmetric: bool) -> tuple[float, ...]:
        """Ascending levels, at most 2^bits of them."""
        half = 1 << (self.bits - 1)
        low = -half + (1 if symmetric and self.bits == 8 else 0)
        return tuple(map(float, range(low, half)))

    def __str__(self) -> str:
        return f"int{self.bits}"
