"""Augmentation of a whole batch of uint8 images at once."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor


class CropFlip:
    """Random shift against a black border, and random mirroring left to right; each image draws its own.

    The usual augmentation of CIFAR (Lee et al., AISTATS 2015, arXiv:1409.5185): pad, then crop the old size anywhere.

    Args:
        crop_padding: pixels of border on each side, 0 or more; the shift in each axis is uniform over
            -crop_padding..crop_padding.
        flip: mirror each image with probability 1/2.
    """

    def __init__(self, crop_padding: int = 4, flip: bool = True) -> None:
        if crop_padding < 0:
            raise ValueError(f"crop_padding must be 0 or more pixels, got {crop_padding}; 0 switches the crop off")
        self.crop_padding = crop_padding
        self.flip = flip

    def __call__(self, images: UInt8[Tensor, "n c h w"], rng: np.random.Generator) -> UInt8[Tensor, "n c h w"]:
        """The images, each cut out of its padded self at an offset of its own and perhaps mirrored."""
        n, _, h, w = images.shape
        p = self.crop_padding
        if p:
            top, left = torch.from_numpy(rng.integers(0, 2 * p + 1, (2, n)))
            windows = F.pad(images, (p, p, p, p)).unfold(2, h, 1).unfold(3, w, 1)  # a view: n c 2p+1 2p+1 h w
            images = windows[torch.arange(n), :, top, left]
        if self.flip:
            mirrored = torch.from_numpy(rng.random(n) < 0.5)
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images

    def __repr__(self) -> str:
        return f"CropFlip(crop_padding={self.crop_padding}, flip={self.flip})"
