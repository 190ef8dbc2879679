"""A convolution as one product of matrices, [positions, c i j] x [c i j, k], where that is the faster way.

The rows are the patches under the kernel. Two kinds of layer gain in a compiled graph:

- Patches that do not overlap, as the first layer of a transformer has them, are the image itself in another order. The
  scale of the image needs a gradient that a float network does not compute, and a convolution with such strides is slow
  at it.
- Where there are fewer positions than channels, as at the end of a network for small images, the weight is larger than
  all patches, and convolutions are slow at its gradient: they are made for large images. *Measured* on CPU in float32,
  forward and backward, in ms:

| layer                                   | convolution | this |
|-----------------------------------------|-------------|------|
| 512 to 512 channels, 3x3, 16x2x2        | 24.4        | 10.8 |
| 256 to 512 channels, 3x3 / 2, 16x4x4    | 8.9         | 5.9  |
| 256 to 512 channels, 1x1 / 2, 16x4x4    | 1.1         | 0.8  |
| 256 to 256 channels, 3x3, 16x4x4        | 7.8         | 12.7 |

Only the order of sums differs. Outside of compiled graphs, and in exported ones, a convolution stays one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWER = 2
"""Positions for each of which there are this many output channels make the product the faster way."""


def pays(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether the layer runs as a product for an input [n, c, h, w]: in a compiled graph where that is faster."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and is_faster(conv, x)


def is_faster(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether the product is the faster way; what was measured on CPU alone is done there alone."""
    if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    rows, columns = _positions(conv, x)
    few = x.device.type == "cpu" and FEWER * x.shape[0] * rows * columns <= conv.out_channels
    return few or _apart(conv)


def convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's outcome [n, k, h', w'], in channels_last, for an input and a weight that are quantized already."""
    laid = _tiles(conv, x) if _apart(conv) else _windows(conv, x)
    return F.linear(laid, weight.permute(0, 2, 3, 1).flatten(1), conv.bias).permute(0, 3, 1, 2)


def _apart(conv: nn.Conv2d) -> bool:
    """Whether the patches of a layer wider than 1x1 touch without overlap."""
    whole = conv.kernel_size == conv.stride and conv.kernel_size != (1, 1)
    return whole and conv.dilation == (1, 1) and conv.padding == (0, 0)


def _positions(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """h' and w'."""
    rows, columns = (
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, pad, dilation in zip(
            x.shape[2:], conv.kernel_size, conv.stride, _padding(conv), conv.dilation, strict=True
        )
    )
    return rows, columns


def _padding(conv: nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(conv.padding, str)  # `is_faster` has ruled it out
    return conv.padding


def _tiles(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """[n, h', w', i j c] of patches that do not overlap; what does not fill one at the border is left out."""
    (i, j), (n, c), (rows, columns) = conv.kernel_size, x.shape[:2], _positions(conv, x)
    x = x[..., : rows * i, : columns * j].reshape(n, c, rows, i, columns, j)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, rows, columns, i * j * c)


def _windows(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """[n, h', w', i j c] of any patches."""
    (s, t), (d, e), (rows, columns) = conv.stride, conv.dilation, _positions(conv, x)
    up, left = _padding(conv)
    x = F.pad(x, (left, left, up, up)).permute(0, 2, 3, 1)
    ends = (s * (rows - 1) + 1, t * (columns - 1) + 1)
    shifts = [(d * i, e * j) for i in range(conv.kernel_size[0]) for j in range(conv.kernel_size[1])]
    return torch.stack([x[:, a : a + ends[0] : s, b : b + ends[1] : t] for a, b in shifts], 3).flatten(3)
