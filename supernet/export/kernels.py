"""What onnxruntime's integer convolutions want of a layer so that the faster one of them runs; values stay as they are.

Where weights have zero-point 0, input channels are a multiple of 4 and output channels of 16, a direct kernel convolves
and requantizes in one go; else the image is unrolled and multiplied as a matrix. The product is usually slower, but
some processors multiply tiles of integers (AMX) and only the product uses that.

| convolution (median us, one thread of a processor with AMX, *measured*) | direct | product |
|---|---|---|
| 3x3, 3 -> 32 channels, stride 2, 224 px: direct only with a fourth channel | 196 | 369 |
| 1x1, 16 -> 96, 112 px   | 179 | 597 |
| 1x1, 144 -> 32, 56 px   | 59 | 69 |
| 1x1, 384 -> 64, 14 px   | 18 | 15 |
| 1x1, 960 -> 320, 7 px   | 50 | 24 |
| 3x3, 64 -> 64, 16 px    | 31 | 27 |
| 3x3, 256 -> 256, 4 px   | 34 | 19 |
| 3x3, 512 -> 512, 2 px   | 65 | 75 |
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from supernet.export.graph import Deployed
from supernet.export.operators import Conv, Layer

Array = NDArray[Any]

CHANNELS, WINDOW = 4, 25
"""Channels of the direct kernel, and the largest window (5x5) where it pays to add channels of zeros to have them: a
7x7 convolution of an image takes as long either way."""

TERMS, PIXELS = 320, 16
"""Fewest terms of a sum, and fewest output pixels, from which on tiles are faster than the direct kernel."""


def spare(op: Layer) -> int:
    """How many channels of zeros are to be added to what a layer reads."""
    narrow = isinstance(op, Conv) and op.groups == 1 and op.codes[0, 0].numel() <= WINDOW
    return max(CHANNELS - op.codes.shape[1], 0) if narrow else 0


def pixels(deployed: Deployed) -> dict[str, int]:
    """Height x width of every tensor that has them."""
    tensors = deployed.tensors(deployed.example)
    return {name: t[0, 0].numel() for name, t in tensors.items() if t.dim() == 4}


def tiled(op: Layer, pixels: int) -> bool:
    """Whether tiles compute a layer faster; `pixels` are height x width of its output."""
    return isinstance(op, Conv) and op.groups == 1 and op.codes[0].numel() >= TERMS and pixels >= PIXELS


def shift(codes: Array, zero: Array) -> tuple[Array, Array]:
    """Codes and zero-points moved by one where the zero-points are 0 and an int8 has room, so that the product runs."""
    low, high = int(codes.min()), int(codes.max())
    by = 0 if zero.any() else 1 if high < 127 else -1 if low > -128 else 0
    return codes + by, zero + by


def widen(codes: Array, zero: Array, channels: int) -> Array:
    """Weight codes [k, c, h, w] with `channels` more, which stand for 0.0."""
    more = np.broadcast_to(zero.reshape(-1, 1, 1, 1), (len(codes), channels, *codes.shape[2:]))
    return np.concatenate([codes, more], 1)
