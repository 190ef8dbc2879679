"""Source of images: scikit-learn's handwritten digits, 1,797 images of 8x8 pixels, which need no download."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor


class Digits:
    """Handwritten digits 0..9, grey, 8x8; E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.

    The 17 grey levels 0..16 become 0..255. scikit-learn bundles the official test part only, so a stratified
    `test_share` of it is held out as our test part and the rest is the train part.

    Args:
        test_share: share of the images that is held out, between 0 and 1.
        split_seed: which ones.
    """

    channels = 1
    class_names = tuple("0123456789")

    def __init__(self, test_share: float = 0.25, split_seed: int = 0) -> None:
        if not 0 < test_share < 1:
            raise ValueError(f"test_share must lie between 0 and 1, got {test_share}; 0.25 holds out 450 images")
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        bunch = load_digits()
        pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
        train, test = train_test_split(
            np.arange(len(pixels)), test_size=test_share, stratify=bunch.target, random_state=split_seed
        )
        self._images = {"train": pixels[train], "test": pixels[test]}
        self._labels = {"train": bunch.target[train].astype(np.int64), "test": bunch.target[test].astype(np.int64)}

    def labels(self, part: str) -> Int64[np.ndarray, " n"]:
        """Labels of `train` or `test`."""
        return self._labels[part]

    def batches(
        self, part: str, chunks: Sequence[Int64[np.ndarray, " b"]], rng: np.random.Generator | None = None
    ) -> Iterator[UInt8[Tensor, "b 1 8 8"]]:
        """The images at each chunk of indices; nothing is drawn from `rng`."""
        return (torch.from_numpy(self._images[part][chunk]) for chunk in chunks)
